"""What of a machine with NPUs is there, in the order in which things go wrong; each with one reason and one fix."""

from __future__ import annotations

import importlib.util
from typing import Any

from helios.backend import DeviceInfo
from helios.errors import BackendUnavailable
from helios_ascend import failures, operators, versions

__all__ = ["AUTOLOAD", "devices", "require_torch_npu"]

AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"
SOURCE = "source /usr/local/Ascend/ascend-toolkit/set_env.sh"
NOTABLE = 1 << 30
"""Bytes on a device before this process has any there: more than that is another process."""


def devices() -> list[DeviceInfo]:
    """The NPUs of this machine. Raises BackendUnavailable with the first thing that is missing."""
    require_torch_npu()
    npu = _imported().npu
    try:
        count = int(npu.device_count())
    except RuntimeError as error:
        raise _refused(error) from error
    if not count:
        raise BackendUnavailable(
            "CANN shows no NPU to this process",
            "`npu-smi info` lists them; check ASCEND_RT_VISIBLE_DEVICES, and that you may read /dev/davinci*",
        )
    return [_device(npu, index) for index in range(count)]


def require_torch_npu() -> None:
    """Raises BackendUnavailable where torch_npu is absent, or not the one for this torch and this CANN."""
    if importlib.util.find_spec("torch_npu") is None:
        raise BackendUnavailable(
            "torch_npu is not installed", "pip install 'helios-hal[ascend]', on a machine with CANN: docs/ascend.md"
        )
    versions.require_matching()


def _imported() -> Any:
    try:
        return operators.torch_npu()
    except (ImportError, OSError, RuntimeError) as error:
        raise _not_imported(str(error)) from error


def _not_imported(text: str) -> BackendUnavailable:
    line = next((line.strip() for line in text.splitlines() if line.strip()), "no reason given")
    if "Two accelerators" in text:
        return BackendUnavailable("torch_npu refuses this torch, which has another accelerator", _CPU_BUILD)
    if "cannot open shared object file" in text or "libascendcl" in text:
        library = line.split(":")[0]
        if versions.toolkit() is None:
            return BackendUnavailable(
                f"CANN is not installed: torch_npu misses {library}",
                "install CANN's toolkit and kernels: docs/ascend.md",
            )
        return BackendUnavailable(f"CANN is not in this shell's environment: torch_npu misses {library}", SOURCE)
    return BackendUnavailable(
        f"torch_npu fails on import: {line[:120]}", "`python -c 'import torch_npu'` shows all of it"
    )


_CPU_BUILD = "install the CPU build of torch beside torch_npu: https://download.pytorch.org/whl/cpu"


def _device(npu: Any, index: int) -> DeviceInfo:
    """A device by name and memory; what others hold of it stands behind its name."""
    try:
        name = str(npu.get_device_name(index))
        free, total = npu.mem_get_info(index)
    except RuntimeError as error:
        raise _refused(error) from error
    taken = int(total) - int(free) - int(npu.memory_reserved(index))
    others = f" ({failures.sized(taken)} of it taken by other processes)" if taken > NOTABLE else ""
    return DeviceInfo(index, name + others, int(total))


def _refused(error: RuntimeError) -> BackendUnavailable:
    text = str(error)
    line = next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)
    if failures.is_busy(text):
        return BackendUnavailable(
            "the NPU is busy: another process or container has it for itself",
            "`npu-smi info` lists the processes; end that one, or choose another with ASCEND_RT_VISIBLE_DEVICES",
        )
    return BackendUnavailable(
        f"CANN cannot start the NPU: {line[:120]}", "`npu-smi info` says whether the driver sees it"
    )
