"""What of a machine with TensorRT is there, in the order in which things go wrong; each with one reason and one fix."""

from __future__ import annotations

from helios.backend import DeviceInfo
from helios.errors import BackendError, BackendUnavailable
from helios_cuda.probe import gpus, require_cuda
from helios_trt import library

__all__ = ["devices"]


def devices() -> list[DeviceInfo]:
    """The GPUs that engines can be built for. Raises BackendUnavailable with the first thing that is missing."""
    module = library.tensorrt()
    library.require_onnx()
    require_cuda()
    found = gpus()
    log = library.logger(module)
    try:
        library.started(lambda: module.Runtime(log), "runtime", log)
    except BackendError as error:
        raise BackendUnavailable(error.why, error.fix) from error
    return found
