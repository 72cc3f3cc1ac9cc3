"""Steps on a GPU, checked there: captured, fetched from the host and eager give the same bits; the host never waits.

    python tools/gpu/check_execution.py [--size mini] [--height 128] [--width 128]

Prints a line a check and exits with 1 if one fails. Takes no figures that are worth keeping.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from helios.backend import Backend
from helios.lower import lower
from helios.model import presets
from helios.model.random_weights import RandomWeights
from helios.pipeline.denoise import Layout, denoise_graphs
from helios.pipeline.history import Window
from helios.program import Context, Program

Make = Callable[..., Backend]
Check = tuple[str, str]
"""What was checked, and what is wrong with it: empty where nothing is."""


class Steps:
    """The transformer's program at every stage with random weights, on one backend.

    Args:
        backend: to run it.
        size: of the networks.
        height, width: of the video in pixels.
    """

    def __init__(self, backend: Backend, size: str, height: int, width: int) -> None:
        config, variant = presets.size(size), presets.variant("distilled")
        layout = Layout(1, height // 8, width // 8, 64, Window())
        made = denoise_graphs(config.transformer, variant.scheduler, variant.pipeline, layout, torch.bfloat16)
        graphs = {name: graph for name, graph in made.items() if name.startswith("denoise.")}
        self.backend, self.names = backend, sorted(graphs)
        self.program: Program = lower(graphs, backend)
        self.program.load(RandomWeights({n: v.shape for n, v in self.program.weight_inputs().items()}, seed=0))
        values = (v for graph in self.program.plan.graphs.values() for v in graph.inputs)
        self.shapes = {v.name: v.shape for v in values}

    def drawn(self, names: set[str], seed: int) -> dict[str, Tensor]:
        g = torch.Generator().manual_seed(seed)
        return {name: torch.randn(self.shapes[name], generator=g) for name in sorted(names)}

    def context(self, seed: int) -> Context:
        text = self.program.bind(self.drawn({"text"}, seed))
        history = {name for name in self.shapes if name.startswith("history_")}
        return text | self.program.bind(self.drawn(history, seed), text)

    def velocity(self, name: str, seed: int, context: Context) -> Tensor:
        graph = self.program.plan.steps[name]
        sample = next(v for v in graph.inputs if v.name == "sample")
        noise = torch.randn(sample.shape, generator=torch.Generator().manual_seed(seed))
        inputs = {"sample": noise, "timestep": torch.tensor([500.0 + seed])}
        return self.program.run(name, inputs, context)["velocity"]

    def all(self) -> dict[str, Tensor]:
        """Every stage under two contexts that take turns."""
        contexts = [self.context(seed) for seed in (1, 2)]
        kept = {
            f"{name}, turn {turn}": self.velocity(name, turn // 2, contexts[turn % 2])
            for turn in range(4)
            for name in self.names
        }
        return {key: tensor.cpu() for key, tensor in kept.items()}  # only now: a replay must not have written to them


def checks(make: Make, size: str, height: int, width: int) -> Iterator[Check]:
    """Each check, as it is done.

    Args:
        make: the backend with its options.
    """
    eager = Steps(make(graphs="off"), size, height, width)
    wanted = eager.all()
    yield "results come to the host as they are, behind what computes them", _fetched(eager.backend)
    yield "the device's own time is that of the host", _timed(eager.backend)
    yield "steps differ from stage to stage and from context to context", _distinct(wanted)
    captured = Steps(make(), size, height, width)
    yield "captured steps give the bits of eager ones", _differences(captured.all(), wanted)
    yield "a second time", _differences(captured.all(), wanted)
    for kind, steps in (("captured", captured), ("eager", eager)):
        yield f"the host waits for nothing in {kind} steps", _waits(steps)
    del captured
    with _no_room():
        fetched = Steps(make(memory="low"), size, height, width)
        yield "weights fetched from the host give the same bits", _differences(fetched.all(), wanted)
        yield "the host waits for nothing while they are fetched", _waits(fetched)


def _distinct(results: Mapping[str, Tensor]) -> str:
    values = [(tensor.shape, tensor.double().sum().item()) for tensor in results.values()]
    if not all(torch.isfinite(tensor).all() for tensor in results.values()):
        return "some are not finite"
    return "" if len(set(values)) == len(values) else "some are equal"


def _differences(results: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str:
    unlike = [key for key in wanted if not torch.equal(results[key], wanted[key])]
    if not unlike:
        return ""
    worst = max(float((results[k].double() - wanted[k].double()).abs().max()) for k in unlike)
    return f"{len(unlike)} of {len(wanted)} differ, by {worst:.3g} at most: {unlike[0]}"


def _fetched(backend: Backend) -> str:
    """Sizes around those of the slices, and work that is still under way when its result is asked for."""
    for count in (0, 1, 4 << 20, (4 << 20) + 1, 24_330_240):
        made = torch.arange(count, device=backend.device).to(torch.uint8)
        for _ in range(50):
            made = made + 1
        came = backend.fetch(made)
        if came.device.type != "cpu" or not torch.equal(came, made.cpu()):
            return f"not with {count} bytes"
    return ""


def _timed(backend: Backend) -> str:
    backend.synchronize()
    begin, first = time.perf_counter(), backend.mark()
    time.sleep(0.1)
    seconds = backend.seconds_between(first, backend.mark())
    whole = time.perf_counter() - begin
    return "" if 0.09 < seconds <= whole else f"{seconds:.3f} s of {whole:.3f} s"


def _waits(steps: Steps) -> str:
    """torch raises where the host waits for the current device, if it is asked to."""
    context = steps.context(1)
    if steps.backend.device.type != "cuda":
        return ""
    steps.backend.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for name in steps.names:
            steps.velocity(name, 1, context)
    except RuntimeError as error:
        return str(error).splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return ""


@contextlib.contextmanager
def _no_room() -> Iterator[None]:
    """Within, all weights are fetched."""
    from helios_cuda import offload

    reserve, offload.RESERVE = offload.RESERVE, 1 << 62
    try:
        yield
    finally:
        offload.RESERVE = reserve


def main() -> int:
    """The command line; 1 if a check fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="mini")
    parser.add_argument("--height", type=int, default=128)
    parser.add_argument("--width", type=int, default=128)
    given = parser.parse_args()
    from helios_cuda import CudaBackend

    failed, last = 0, time.perf_counter()
    for what, wrong in checks(CudaBackend, given.size, given.height, given.width):
        now = time.perf_counter()
        print(f"{'FAIL' if wrong else 'ok':4}  {now - last:6.1f} s  {what}{': ' + wrong if wrong else ''}", flush=True)
        failed, last = failed + bool(wrong), now
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
