#!/usr/bin/env bash
# Everything that needs TensorRT, in one command, on a machine with an NVIDIA GPU, torch for CUDA and TensorRT 10 or 11.
#
#   tools/on_tensorrt.sh [engines|certify|speed|all] [--size tiny|mini|14b] [--tiny] [--budget SECONDS]
#
# engines: versions; builds of tiny, mini and 14b (random weights), transformer and VAE, both ways of holding weights.
# certify: helios certify --backend trt, ops, blocks, model and pipeline, in bf16, fp16 and fp32, and helios verify.
# speed: first and steady chunks, the forwards, the VAE and the memory, both ways of holding weights, beside cuda.
# Results go to ${OUT:-out/tensorrt}; a short table comes last. What is finished is not taken again: repeat the command.
# Engines are kept in $XDG_CACHE_HOME/helios/trt; 14b needs some 60 GB of disk and of host memory (a prediction).
# PYTHON names another interpreter; HELIOS_COMMIT the commit, where the tree came without git.
# Exit code: 0 all well, 1 a result is wrong or failed, 2 the machine cannot run it.
set -euo pipefail

PARTS=(engines certify speed)
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PYTHON=${PYTHON:-python3}
OUT=${OUT:-out/tensorrt}

usage() { sed -n '2,13s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }

wanted=all
if [[ $# -gt 0 && $1 != --* ]]; then wanted=$1; shift; fi
case " ${PARTS[*]} all " in
    *" $wanted "*) ;;
    *) echo "error: no part is called $wanted" >&2; echo "fix: one of ${PARTS[*]} all" >&2; exit 2 ;;
esac
for argument in "$@"; do
    if [[ $argument = --help ]]; then usage; exit 0; fi
done

SCRATCH=$(mktemp -d)
trap 'rm -rf "$SCRATCH"' EXIT
[[ $OUT = /* ]] || OUT=$PWD/$OUT
mkdir -p "$OUT"
# The tree first, so that it and not an installed copy is what runs.
TREE=$ROOT:$ROOT/backends/cpu:$ROOT/backends/cuda:$ROOT/backends/ort:$ROOT/backends/trt:$ROOT/conformance
export PYTHONPATH=$TREE:$ROOT/tools/gpu:$SCRATCH/meta${PYTHONPATH:+:$PYTHONPATH}
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
"$PYTHON" "$ROOT/tools/gpu/entry_points.py" "$SCRATCH/meta" >/dev/null

"$PYTHON" "$ROOT/tools/trt/machine.py" | tee "$OUT/environment.txt"
names=("$wanted")
[[ $wanted != all ]] || names=("${PARTS[@]}")
worst=0
for name in "${names[@]}"; do
    code=0
    "$PYTHON" "$ROOT/tools/trt/trt_$name.py" --out "$OUT" "$@" || code=$?
    ((code <= worst)) || worst=$code
done
exit "$worst"
