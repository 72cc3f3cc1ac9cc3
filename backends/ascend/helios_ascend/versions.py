"""Which versions of torch, torch_npu and CANN belong together; read from files, before anything of them is imported.

torch_npu is built against one release of torch (its wheel requires exactly that), and calls CANN's operators, which
grow with it. The table is the one in torch_npu's own documentation, as far as it reaches.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
from collections.abc import Mapping
from pathlib import Path

from helios.errors import BackendUnavailable

__all__ = ["NEWEST", "OLDEST", "OLDEST_CANN", "cann", "require_matching", "toolkit"]

Version = tuple[int, ...]
OLDEST, NEWEST = (2, 9), (2, 13)
"""Of torch_npu: what this backend's calls were checked against."""
OLDEST_CANN: Mapping[Version, Version] = {(2, 9): (8, 5)}
"""By torch_npu (major, minor) from which it holds: 2.9.0 is made with CANN 8.5.0, and the table in the wheel of 2.13.0
names 8.5.0 for 2.12 as well."""
PLACES = ("/usr/local/Ascend/ascend-toolkit/latest", "/usr/local/Ascend/cann", "/usr/local/Ascend/latest")


def toolkit() -> Path | None:
    """The folder of CANN's toolkit: that of the environment, or where its installer puts it."""
    named = os.environ.get("ASCEND_HOME_PATH") or os.environ.get("ASCEND_TOOLKIT_HOME")
    places = [named] if named else list(PLACES)
    return next((Path(place) for place in places if Path(place).is_dir()), None)


def cann(folder: Path) -> str | None:
    """The version that a toolkit's folder says, such as ``8.5.0``; None where it says none."""
    for file in (*sorted(folder.glob("*-linux/ascend_toolkit_install.info")), folder / "version.cfg"):
        try:
            found = re.search(r"(?im)^(?:toolkit_running_)?version\s*=\s*\D*(\d+\.\d+[\w.]*)", file.read_text())
        except OSError:
            continue
        if found:
            return found[1]
    return None


def require_matching() -> None:
    """Raises BackendUnavailable with the first pair that does not match."""
    npu, torch = importlib.metadata.version("torch-npu"), importlib.metadata.version("torch")
    if _numbers(npu)[:3] != _numbers(torch)[:3]:
        release = ".".join(map(str, _numbers(torch)[:3]))
        raise BackendUnavailable(
            f"torch_npu {npu} is built for another torch than {torch}",
            f"pip install 'torch-npu=={release}.*', or torch {'.'.join(map(str, _numbers(npu)[:3]))}",
        )
    if _numbers(npu)[:2] < OLDEST:
        raise BackendUnavailable(
            f"torch_npu {npu} is older than {_dotted(OLDEST)}, the first that this backend was checked against",
            f"pip install 'torch-npu>={_dotted(OLDEST)}', with its torch",
        )
    _require_cann(npu)


def _require_cann(npu: str) -> None:
    folder = toolkit()
    version = None if folder is None else cann(folder)
    if version is None:
        return  # what is missing shows when torch_npu is imported
    oldest = max((v for of, v in OLDEST_CANN.items() if of <= _numbers(npu)[:2]), default=(0,))
    if _numbers(version)[:2] < oldest:
        raise BackendUnavailable(
            f"CANN {version} is older than {_dotted(oldest)}, which torch_npu {npu} is made with",
            f"install CANN {_dotted(oldest)} or newer, toolkit and kernels, and source its set_env.sh",
        )


def _numbers(version: str) -> Version:
    """``2.9.0.post2+cpu`` as (2, 9, 0)."""
    return tuple(int(number) for number in re.match(r"[\d.]+", version + ".")[0].strip(".").split("."))  # type: ignore[index]


def _dotted(version: Version) -> str:
    return ".".join(map(str, version))
