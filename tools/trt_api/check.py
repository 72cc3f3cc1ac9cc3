"""What ``helios_trt`` does with the real bindings alone, tried on them: no library of TensorRT, no engine, no GPU.

    python tools/trt_api/check.py 10.16.1.11 11.4.0.106

The bindings are imported as by ``extract.py``. Then the classes that the backend derives are derived and called; what
it makes of a library that is not there, and of one that gives no object, is what the real bindings raise.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from extract import downloaded, stand_ins

ROOT = Path(__file__).parents[2]

DERIVED = """
from io import StringIO
from helios.errors import BackendError
from helios_trt import library, progress

module = library.tensorrt()
log = library.logger(module)
log.log(module.ILogger.Severity.ERROR, "two\\nlines")
assert log.errors == ["two lines"], log.errors
watch = progress.monitor(module, "x", progress.Line(StringIO()))
watch.phase_start("phase", None, 2)
assert watch.step_complete("phase", 0) is True
watch.phase_finish("phase")
assert watch.stopped is None
assert tuple(module.Dims((1, 2))) == (1, 2)
for name in ("Builder", "Runtime"):  # the stand-in library gives a null pointer, as TensorRT does where it cannot start
    try:
        library.started(lambda: getattr(module, name)(log), name.lower(), log)
    except BackendError as error:
        assert "two lines" in error.why, error
    else:
        raise AssertionError(name)
print(f"TensorRT {module.__version__}: log, monitor, flags and failures are as the backend takes them")
"""

ABSENT = """
from helios.errors import BackendUnavailable
from helios_trt import library

try:
    library.tensorrt()
except BackendUnavailable as error:
    assert "its libraries are not" in error.why, error
    print(error.why)
else:
    raise AssertionError("the libraries are here")
"""


def main() -> None:
    """Try the versions that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="+", help="of the wheel, such as 11.4.0.106")
    for version in parser.parse_args().versions:
        with tempfile.TemporaryDirectory() as scratch:
            tried(version, Path(scratch))


def tried(version: str, scratch: Path) -> None:
    """One version, without its libraries and with such that give nothing."""
    package = scratch / "package"
    with zipfile.ZipFile(downloaded(version, scratch)) as archive:
        archive.extractall(package)
    module = package / "tensorrt_bindings" / "tensorrt.so"
    libraries = stand_ins(module, scratch / "libraries", version, does="")
    paths = [package, ROOT, ROOT / "backends" / "cuda", ROOT / "backends" / "trt"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    for code, found in ((ABSENT, ""), (DERIVED, str(libraries))):
        subprocess.run([sys.executable, "-c", code], check=True, env={**environment, "LD_LIBRARY_PATH": found})


if __name__ == "__main__":
    main()
