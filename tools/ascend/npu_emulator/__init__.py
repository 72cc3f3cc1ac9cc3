"""CANN's operators by their documentation, on the CPU: what the stand-in runtime refuses to compute is computed here.

Written from the documents alone and per operator in its own right; nothing here has seen a kernel of the backend that
it tests. It says whether a backend calls what it calls rightly: layouts, masks, scales, modes, epsilons, outputs. It
says nothing of an NPU's arithmetic beyond what is documented, and nothing of its speed.
"""

from __future__ import annotations

__all__ = ["enter"]


def enter() -> None:
    """Operators on ``npu`` tensors of this process, from here on, are those of this package; once and for all."""
    from npu_emulator.register import register

    register()
