"""What CANN says when something goes wrong on an NPU. Numbers are its error codes."""

from __future__ import annotations

from helios.failures import Failures, Memory, sized

__all__ = ["NPU", "Memory", "explain", "explained", "is_busy", "require_room", "sized"]

NPU = Failures(
    no_room=("npu out of memory", "el0004", "207001", "failed to allocate memory"),
    busy=("el0005", "resource_busy", "resource busy", "507033"),
    lost=(
        "507014",  # an operator ran too long on the cube cores
        "507015",  # an exception there: a wrong address, an instruction that failed
        "507018",  # on the device's own processor
        "507034",  # too long on the vector cores
        "507035",  # an exception there
        "507057",  # the device answers no more
        "507899",  # the driver failed
        "aicore exception",
        "aicore timeout",
        "device lost",
        "force stop",
        "heartbeat",
        "uce error",
        "vector core exception",
    ),
    taken="another process, or another container, has it for itself",
    others="`npu-smi info` lists what else is on the device",
    another="choose another (ascend:1)",
    reset="if `npu-smi info` does not show the device as OK, it has to be reset first",
    too_large="take a card with more memory: `helios fit` says what fits; weights are not streamed here",
)
explain, explained, is_busy, require_room = NPU.explain, NPU.explained, NPU.is_busy, NPU.require_room
