"""helios_trt on ``trt_strict`` instead of TensorRT: emulated, and not run on a device."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import trt_acts
from torch import Tensor
from trt_strict import Strict

from helios.backend import DeviceInfo
from helios_trt import TrtBackend
from helios_trt.machine import ALIGNMENT, Machine

EMULATED = "a recorder of TensorRT's interface and ONNX Runtime on the CPU"


class HostMachine(Machine):
    """The host, whose memory engines of the recorder read."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))

    def identity(self) -> Mapping[str, str]:
        return {"name": trt_acts.device(), "capability": "0.0", "driver": "0.0"}

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Aligned as a GPU's memory is, where torch gives 64 bytes. What an engine does not write is not a number."""
        size = math.prod(shape) * dtype.itemsize
        raw = torch.full((size + ALIGNMENT,), 0 if os.environ.get(trt_acts.ZEROS) else 0xFF, dtype=torch.uint8)
        start = -raw.data_ptr() % ALIGNMENT
        return raw[start : start + size].view(dtype).view(tuple(shape))


class RecordedTrt(TrtBackend):
    """The backend with the host in the GPU's place."""

    emulated = EMULATED

    def _machine(self) -> Machine:
        return HostMachine()

    def devices(self) -> list[DeviceInfo]:
        return [DeviceInfo(0, EMULATED)]


@contextmanager
def recorded(major: int) -> Iterator[Strict]:
    """Within, ``import tensorrt`` gives the recorder of that version."""
    strict = Strict(major, trt_acts.ACTS)
    before: Any = sys.modules.get("tensorrt")
    sys.modules["tensorrt"] = strict.module
    try:
        yield strict
    finally:
        del sys.modules["tensorrt"]
        if before is not None:
            sys.modules["tensorrt"] = before
