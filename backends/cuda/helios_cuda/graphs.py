"""Steps as CUDA graphs: captured once over static buffers, replayed from then on.

**What is captured.** The step of each entry that reads a context: the transformer at each pyramid stage, some 900
launches that cost the host some 40 ms (predicted: 45 µs each, through Python and Triton's launcher), half of what stage
0 computes. The prompt and the chunk phase run once a prompt and once a chunk, the solver's steps are single launches,
and the VAE's are long ones: none of them would gain, and a capture keeps its activations' memory to itself.

**Contexts** are switched by copying them. A graph reads fixed addresses, a context may be any tensors. At the published
sizes a prompt's is 419 MB (text keys and values of 40 layers, 512 × 5120 in bf16) and a chunk's 25 MB (2400 history
tokens); a copy reads and writes them once, 0.20 ms and 0.01 ms at 4.3 TB/s, and only where another context arrives than
lay there: never within a chunk without guidance, twice a step with it, beside the 70 ms or more of its two forwards. A
second capture for each context would save that, and would cost a capture at each change of the prompt, the moment whose
latency counts. All entries share one copy, as they share the values.

**Results** of a replay lie where the next one writes, so they are copied out: a velocity of 1.1 MB at most.

**Memory.** All captures share one pool, the largest first, so that the others fit into what it left; nothing in the
pool is alive between two replays, since results were copied out. Each entry is captured after a run outside of it, in
which kernels are compiled and libraries initialise. All results come from replays, the first one too: so equal inputs
give equal bits whether a run goes on or is resumed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from helios.captured import Evaluate, NotCaptured, Recorder, Steps, capture, reads_a_context
from helios_cuda import streams

__all__ = ["CudaRecorder", "Evaluate", "NotCaptured", "Recorder", "Steps", "capture", "reads_a_context"]

T = TypeVar("T")


class CudaRecorder:
    """CUDA graphs with one memory pool, captured on the device's stream for that."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = streams.of_device(device, streams.CAPTURES)
        self._pool = torch.cuda.graph_pool_handle()

    def warm_up(self, run: Callable[[], object]) -> None:
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            run()
        current.wait_stream(self._stream)
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()  # its activations belong to a stream that nothing runs on again

    def capture(self, run: Callable[[], T]) -> tuple[Callable[[], None], T]:
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self._device)
        try:
            # Other threads, which write finished chunks, may go on using CUDA meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                result = run()
        except BaseException:
            # Where the end of a capture fails as well, torch leaves its stream the current one, and its allocator with
            # a function that reads the graph.
            torch.cuda.set_stream(current)
            _BROKEN.append(graph)
            raise
        return graph.replay, result


_BROKEN: list[torch.cuda.CUDAGraph] = []
"""Captures that broke off: they stay, see ``CudaRecorder.capture``."""
