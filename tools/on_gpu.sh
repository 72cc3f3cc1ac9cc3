#!/usr/bin/env bash
# Everything that needs a GPU, in one command, on a bare machine with torch, Triton and no network.
#
#   tools/on_gpu.sh [ceilings|kernels|realtime|certify|diffusers|all] [--device cuda|cpu] [--tiny] [--budget SECONDS] …
#
# A part is a file tools/gpu/part_NAME.py. Each ends inside 8 minutes, goes on where the last run ended, writes to
# ${OUT:-out/gpu} and prints a short table last. Nothing is installed and no setting of the device is changed.
# PYTHON names another interpreter; HELIOS_COMMIT the commit, where the tree came without git; PREVIOUS a folder of
# earlier results to go on with. What stands after the options of this list goes to the part; all takes none of those.
# Exit code: 0 all well, 1 a result is wrong or failed, 2 a part is not written yet or the machine cannot run it.
set -euo pipefail

PARTS=(ceilings kernels realtime certify diffusers)
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PYTHON=${PYTHON:-python3}
OUT=${OUT:-out/gpu}
BUDGET=420    # seconds of a part; the rest of the 8 minutes is for starting and for the last measurement
GRACE=40
LOST=75       # a part's exit code when a fresh process can go on
RESTARTS=6

usage() { sed -n '2,11s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }

wanted=all
if [[ $# -gt 0 && $1 != --* ]]; then wanted=$1; shift; fi
arguments=()
while [[ $# -gt 0 ]]; do
    case $1 in
        --budget) BUDGET=${2:?--budget takes seconds}; shift 2 ;;
        --help) usage; exit 0 ;;
        *) arguments+=("$1"); shift ;;
    esac
done
if [[ ! $BUDGET =~ ^[0-9]+$ ]]; then
    echo "error: --budget $BUDGET is no number of seconds" >&2; echo "fix: --budget 420" >&2; exit 2
fi
case " ${PARTS[*]} all " in
    *" $wanted "*) ;;
    *) echo "error: no part is called $wanted" >&2; echo "fix: one of ${PARTS[*]} all" >&2; exit 2 ;;
esac

SCRATCH=$(mktemp -d)
trap 'rm -rf "$SCRATCH"' EXIT
[[ $OUT = /* ]] || OUT=$PWD/$OUT
mkdir -p "$OUT"
if [[ -n ${PREVIOUS:-} ]]; then  # results of an earlier machine, to go on with
    for log in "$PREVIOUS"/*.jsonl "$PREVIOUS"/certify.zip; do
        if [[ -f $log && ! -e $OUT/${log##*/} ]]; then cp "$log" "$OUT/"; fi
    done
fi

# The tree first, so that it and not an installed copy is what runs.
TREE=$ROOT:$ROOT/backends/cpu:$ROOT/backends/cuda:$ROOT/conformance
set_up() {
    "$PYTHON" "$ROOT/tools/gpu/entry_points.py" "$SCRATCH/meta" >/dev/null
    local site=
    if compgen -G "$ROOT/.whl/*.whl" >/dev/null; then
        "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir \
            --target "$SCRATCH/site" "$ROOT"/.whl/*.whl
        site=:$SCRATCH/site
    fi
    # Python looks here before it looks at what is installed: carry wheels of what is missing only.
    export PYTHONPATH=$TREE:$SCRATCH/meta${PYTHONPATH:+:$PYTHONPATH}$site
    export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
}

# A library that kills its process loses one measurement: a fresh process goes on, with the time that is left.
run_part() {
    local name=$1 file=$ROOT/tools/gpu/part_$1.py began=$SECONDS left restarts=0 code
    if [[ ! -f $file ]]; then echo "$name: not written yet"; return 2; fi
    while :; do
        left=$((BUDGET - (SECONDS - began)))
        ((left > 0)) || left=0
        code=0
        timeout --kill-after=10 $((left + GRACE)) "$PYTHON" "$file" --budget "$left" --out "$OUT" \
            ${arguments[@]+"${arguments[@]}"} || code=$?
        case $code in
            "$LOST" | 134 | 135 | 136 | 139) ;;   # lost device; SIGABRT, SIGBUS, SIGFPE, SIGSEGV
            124 | 137) echo "$name: stopped after $((left + GRACE)) s; run it again: it goes on" >&2; return 1 ;;
            *) return "$code" ;;
        esac
        restarts=$((restarts + 1))
        if ((restarts > RESTARTS || left < 20)); then return 1; fi
        echo "$name: the process was lost (exit code $code); a fresh one goes on" >&2
    done
}

set_up
"$PYTHON" "$ROOT/tools/gpu/environment.py" ${arguments[@]+"${arguments[@]}"} | tee "$OUT/environment.txt"
worst=0
names=("$wanted")
[[ $wanted != all ]] || names=("${PARTS[@]}")
for name in "${names[@]}"; do
    code=0
    run_part "$name" || code=$?
    ((code <= worst)) || worst=$code
done
exit "$worst"
