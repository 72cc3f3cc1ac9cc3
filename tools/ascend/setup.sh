#!/usr/bin/env bash
# Builds .ascend/: the real torch_npu of one version, and a CANN runtime that computes nothing, so that the package can
# be imported, asked for its schemas and shapes, and emulated on a machine without an NPU.
#
#     bash tools/ascend/setup.sh [--python PYTHON]
#
# Repeated calls cost nothing until a source or the version changes. Exit codes: 0 ready, 3 not possible here, for
# which the last line says why (no C compiler; no package index and no wheel in .ascend/wheels).
set -euo pipefail

VERSION=2.13.0
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
out=$root/.ascend
python=${root}/.venv/bin/python
[[ ${1:-} == --python ]] && python=$2
[[ -x $python ]] || python=$(command -v python3)

impossible() { echo "ascend rig: $1" >&2; exit 3; }

mark=$({ echo "$VERSION"; cat "${BASH_SOURCE[0]}" "$here"/runtime/*.c; "$python" -VV; } | sha256sum | cut -d' ' -f1)
mkdir -p "$out/wheels"
exec 9>"$out/lock"
flock 9  # tests run side by side: one of them builds
[[ -f $out/ready && $(<"$out/ready") == "$mark" ]] && exit 0

compiler=$(command -v "${CC:-cc}" || true)
[[ -n $compiler ]] || impossible "no C compiler (${CC:-cc}): install gcc or clang, or set CC"

rm -rf "$out/ready" "$out/lib" "$out/site"
mkdir -p "$out/lib"
library() { "$compiler" -shared -fPIC -O1 -w -Wl,-soname,"lib$1.so" -o "$out/lib/lib$1.so" "${@:2}"; }
library ascendcl "$here/runtime/ascendcl.c"
library acl_op_compiler "$here/runtime/op_compiler.c"
for empty in hccl ge_runner graph acl_tdt_channel; do  # linked against, never called
  library "$empty" -x c /dev/null
done

install=("$python" -m pip install --quiet --disable-pip-version-check --no-deps --only-binary :all: --target "$out/site")
wheels=("$python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: --dest "$out/wheels")
if ! "${install[@]}" --no-index --find-links "$out/wheels" "torch_npu==$VERSION" 2>/dev/null; then
  said=$("${wheels[@]}" "torch_npu==$VERSION" 2>&1) && said=$("${install[@]}" --no-index --find-links "$out/wheels" "torch_npu==$VERSION" 2>&1) \
    || impossible "torch_npu $VERSION is neither in $out/wheels nor to be had by pip (${said##*$'\n'}); put its wheel there"
fi
echo "$mark" >"$out/ready"
