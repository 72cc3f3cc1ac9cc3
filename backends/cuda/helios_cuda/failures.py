"""What CUDA says when something goes wrong on a GPU.

A kernel that fails is noticed by whatever asks the device next, so these may surface in another call than their own.
"""

from __future__ import annotations

from helios.failures import Failures, Memory, sized

__all__ = ["GPU", "Memory", "explain", "explained", "require_room", "sized"]

_LOW = "--memory low (--backend-option memory=low)"

GPU = Failures(
    no_room=("out of memory", "cublas_status_alloc_failed", "cudnn_status_alloc_failed"),
    busy=("busy or unavailable",),
    lost=(
        "context is destroyed",
        "device-side assert",
        "driver shutting down",
        "ecc error",
        "fallen off the bus",
        "hardware stack error",
        "illegal instruction",
        "illegal memory access",
        "launch timed out",
        "misaligned address",
        "no longer available",
        "unknown error",
        "unspecified launch failure",
    ),
    taken="another process has the GPU for itself, in exclusive mode",
    others="`nvidia-smi` lists what else is on the GPU",
    another="choose another (cuda:1)",
    reset="if `nvidia-smi` does not list the GPU, it has to be reset first",
    too_large=f"stream them from the host: {_LOW}; `helios fit` says what fits",
    instead=f"stream the weights: {_LOW}",
)
explain, explained, require_room = GPU.explain, GPU.explained, GPU.require_room
