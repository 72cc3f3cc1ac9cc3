"""Finds the rig of a source tree, in which operators are computed by their documentation, and enters it."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from helios.errors import BackendUnavailable

__all__ = ["enter"]

TOOLS = Path(__file__).parents[3] / "tools" / "ascend"


def enter() -> None:
    """From here on the operators of ``npu`` tensors in this process are emulated.

    Raises:
        BackendUnavailable: there is no source tree around this package, the rig is not built, or torch does not fit it.
    """
    if not (TOOLS / "npu_emulator").is_dir():
        raise BackendUnavailable(
            "the emulation is part of the source tree, and this package is installed without it",
            "install Helios HAL from a checkout: pip install --editable .",
        )
    if str(TOOLS) not in sys.path:
        sys.path.append(str(TOOLS))
    try:
        importlib.import_module("npu_emulator").enter()
    except FileNotFoundError as error:
        raise BackendUnavailable(f"the emulation is not built: {error}", "bash tools/ascend/setup.sh") from error
    except ImportError as error:
        raise BackendUnavailable(
            f"torch_npu of the emulation does not load: {error}",
            "remove .ascend, then bash tools/ascend/setup.sh, with the torch of constraints.txt",
        ) from error
