"""Steps as graphs of the device: what ``helios.captured`` captures with.

``npu`` is an NPU graph (aclgraph): the launches of a step, recorded once and replayed by one call of the host. Its
attention must be capturable: npu_fused_infer_attention_score is, npu_fusion_attention (float32, 2.9) is not, see
``operators``. ``torchair`` traces a step to one graph of torch operators and has torchair compile it for CANN's graph
engine, which may fuse on its own; torch_npu brings it along. Neither is the default: which of them gains anything is
for ``tools/on_ascend.sh`` to measure.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from helios.captured import Recorder
from helios_ascend import streams

__all__ = ["NpuRecorder", "Recorder", "TorchairRecorder", "recorder"]

T = TypeVar("T")


def recorder(graphs: str, device: torch.device) -> Recorder | None:
    """What captures, by the value of the option ``graphs``."""
    if graphs == "off":
        return None
    return NpuRecorder(device) if graphs == "npu" else TorchairRecorder(device)


class NpuRecorder:
    """NPU graphs with one memory pool, captured on the device's stream for that."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = streams.of_device(device, streams.CAPTURES)
        self._pool = streams.npu().graph_pool_handle()

    def warm_up(self, run: Callable[[], object]) -> None:
        npu = streams.npu()
        current = npu.current_stream(self._device)
        self._stream.wait_stream(current)
        with npu.stream(self._stream):
            run()
        current.wait_stream(self._stream)
        npu.synchronize(self._device)
        npu.empty_cache()  # its activations belong to a stream that nothing runs on again

    def capture(self, run: Callable[[], T]) -> tuple[Callable[[], None], T]:
        npu = streams.npu()
        graph, current = npu.NPUGraph(), npu.current_stream(self._device)
        try:
            # Other threads, which write finished chunks, may go on using the device meanwhile.
            with npu.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                result = run()
        except BaseException:
            npu.set_stream(current)  # where the end of a capture fails as well, its stream stays the current one
            _BROKEN.append(graph)
            raise
        return graph.replay, result


_BROKEN: list[Any] = []
"""Captures that broke off: they stay, since the allocator may still ask them."""


class TorchairRecorder:
    """Steps compiled by torchair. Static buffers are the constants of its graph, and results are copied into place."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def warm_up(self, run: Callable[[], object]) -> None:
        run()
        streams.npu().synchronize(self._device)

    def capture(self, run: Callable[[], T]) -> tuple[Callable[[], None], T]:
        compiled = torch.compile(_traced(run), backend=_backend(), dynamic=False, fullgraph=True)
        result: Any = compiled()

        def replay() -> None:
            for name, tensor in compiled().items():
                result[name].copy_(tensor)

        return replay, result


def _traced(run: Callable[[], Any]) -> Callable[[], dict[str, Tensor]]:
    """The operators of one run as a graph module that returns the same mapping."""
    from torch.fx.experimental.proxy_tensor import make_fx

    found: Callable[[], dict[str, Tensor]] = make_fx(run, tracing_mode="real")()
    return found


def _backend() -> Any:
    try:
        import torchair
    except ImportError as error:
        raise RuntimeError(f"torchair is not there: {error}; take graphs=npu or graphs=off") from error
    config = torchair.CompilerConfig()
    return torchair.get_npu_backend(compiler_config=config)
