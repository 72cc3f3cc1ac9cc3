#!/usr/bin/env bash
# Everything that needs an Ascend NPU, in one command, on a machine with CANN, torch and torch_npu.
#
#   tools/on_ascend.sh [environment|certify|diff|graphs|realtime|all] [--device N] [--backend NAME] [--tiny]
#
# environment: CANN, driver, torch and torch_npu, held against the table of versions; the devices.
# certify: helios certify in bf16, fp16 and fp32 up to the level pipeline, the full suite, and helios verify.
# diff: the first op whose result leaves the CPU reference's, in a forward of each pyramid stage.
# graphs: a forward of each stage kernel by kernel, as NPU graphs and by torchair: which is fastest.
# realtime: 14b (random weights) at [1,1,1] and [2,2,2]: frames a second, and every op's share of the roofline.
# Results go to ${OUT:-out/ascend}, with one bundle of all of them last; docs/ascend.md says how to read them.
# PYTHON names another interpreter. --tiny takes the smallest network and two ops: a trial of the command itself.
# Exit code: 0 all well, 1 a result is wrong or failed, 2 the machine cannot run it.
set -euo pipefail

PARTS=(environment certify diff graphs realtime)
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PYTHON=${PYTHON:-python3}
OUT=${OUT:-out/ascend}

usage() { sed -n '2,14s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }

wanted=all device='' backend=ascend tiny=
if [[ $# -gt 0 && $1 != --* ]]; then wanted=$1; shift; fi
while [[ $# -gt 0 ]]; do
    case $1 in
        --device) device=:${2:?--device takes a number}; shift 2 ;;
        --backend) backend=${2:?--backend takes a name}; shift 2 ;;
        --tiny) tiny=yes; shift ;;
        --help) usage; exit 0 ;;
        *) echo "error: no option is called $1" >&2; echo "fix: tools/on_ascend.sh --help" >&2; exit 2 ;;
    esac
done
case " ${PARTS[*]} all " in
    *" $wanted "*) ;;
    *) echo "error: no part is called $wanted" >&2; echo "fix: one of ${PARTS[*]} all" >&2; exit 2 ;;
esac
backend=$backend$device

SCRATCH=$(mktemp -d)
trap 'rm -rf "$SCRATCH"' EXIT
[[ $OUT = /* ]] || OUT=$PWD/$OUT
mkdir -p "$OUT"
# The tree first, so that it and not an installed copy is what runs. The backend imports torch_npu itself.
TREE=$ROOT:$ROOT/backends/ascend:$ROOT/backends/cpu:$ROOT/backends/cuda:$ROOT/conformance
export PYTHONPATH=$TREE:$SCRATCH/meta${PYTHONPATH:+:$PYTHONPATH}
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 TORCH_DEVICE_BACKEND_AUTOLOAD=0
"$PYTHON" "$ROOT/tools/gpu/entry_points.py" "$SCRATCH/meta" >/dev/null

helios() { "$PYTHON" -m helios "$@"; }
say() { printf '\n== %s\n' "$*"; }

environment() {
    "$PYTHON" "$ROOT/tools/ascend/npu_machine.py" --backend "$backend" | tee "$OUT/environment.txt"
}

certify() {
    local precision folder code=0 options=(--suite full --level pipeline)
    [[ -z $tiny ]] || options=(--suite quick --level ops --filter 'gated_add[*,odd]' --filter 'rope[*,small]')
    for precision in bf16 fp16 fp32; do
        folder=$OUT/certify-$precision
        say "certify in $precision"
        if [[ -d $folder ]]; then
            helios certify --backend "$backend" --precision "$precision" --out "$folder" --resume || code=1
        else
            helios certify --backend "$backend" --precision "$precision" --out "$folder" "${options[@]}" || code=1
        fi
        helios verify "$folder" || code=1
    done
    return "$code"
}

sizes() { if [[ -n $tiny ]]; then echo tiny; else echo mini; fi; }

diff() {
    local stage code=0
    : >"$OUT/diff.txt"
    for stage in 0 1 2; do
        say "stage $stage against the CPU reference"
        helios diff "$backend" reference --size "$(sizes)" --pyramid-stage "$stage" --out "$OUT/diff-$stage" \
            | tee -a "$OUT/diff.txt" || code=1
    done
    return "$code"
}

graphs() {
    local kind stage size=14b
    [[ -z $tiny ]] || size=tiny
    for kind in off npu torchair; do
        for stage in 0 1 2; do
            say "graphs=$kind, stage $stage"
            helios bench --backend "$backend" --backend-option "graphs=$kind" --size "$size" --pyramid-stage "$stage" \
                --json >"$OUT/graphs-$kind-$stage.json" || echo "graphs=$kind does not run here: see above"
        done
    done
    "$PYTHON" "$ROOT/tools/ascend/npu_fastest.py" "$OUT"
}

realtime() {
    local size=14b folder=$OUT/realtime
    [[ -z $tiny ]] || size=tiny
    say "realtime at [1,1,1] and [2,2,2], $size"
    helios certify --backend "$backend" --suite full --level realtime --filter ceilings --filter realtime \
        --size "$size" --out "$folder"
}

names=("$wanted")
[[ $wanted != all ]] || names=("${PARTS[@]}")
worst=0
for name in "${names[@]}"; do
    code=0
    "$name" || code=$?
    ((code <= worst)) || worst=$code
    ((code < 2)) || break
done
tar -C "$(dirname "$OUT")" -czf "$OUT.tar.gz" "$(basename "$OUT")"
echo "results: $OUT.tar.gz"
exit "$worst"
