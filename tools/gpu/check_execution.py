"""Steps and videos on a GPU, checked there: however they are queued they give the same bits, and the host never waits.

    python tools/gpu/check_execution.py [--size mini] [--height 128] [--width 128]

Prints a line a check and exits with 1 if one fails. Takes no figures that are worth keeping.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from helios.backend import Backend
from helios.lower import lower
from helios.model import presets
from helios.model.random_weights import RandomWeights
from helios.pipeline import Chunk, Pipeline
from helios.pipeline.denoise import Layout, denoise_graphs
from helios.pipeline.history import Window
from helios.pipeline.model import sized_model
from helios.pipeline.run import Run
from helios.program import Context, Program

Make = Callable[..., Backend]
Check = tuple[str, str]
"""What was checked, and what is wrong with it: empty where nothing is."""


class Alike:
    """Makes backends that choose as the first of them did, by measurement: others would have other bits."""

    def __init__(self, make: Make) -> None:
        self.make = make
        self.first: Backend | None = None

    def __call__(self, **options: str) -> Backend:
        backend = self.make(**options)
        if self.first is None:
            self.first = backend
        else:
            backend.use_execution_plan(self.first.execution_plan())
        return backend


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
    make = Alike(make)
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
    others = Alike(make.make)
    yield "a capture that breaks off is told, and what runs then and is captured later is right", _broken(others, size)
    yield from _videos(Alike(make.make), size)
    with _no_room():
        fetched = Steps(make(memory="low"), size, height, width)
        yield "weights fetched from the host give the same bits", _differences(fetched.all(), wanted)
        yield "the host waits for nothing while they are fetched", _waits(fetched)
    del fetched
    with _no_room(resident=0.5):
        half = Steps(make(memory="low"), size, height, width)
        yield "half of them fetched as well", _differences(half.all(), wanted)
        yield "weights that stepped aside are back when they are used", _aside(half, wanted)


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
    try:
        with _not_waiting():
            for name in steps.names:
                steps.velocity(name, 1, context)
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return ""


@contextlib.contextmanager
def _not_waiting() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _broken(make: Make, size: str) -> str:
    """Wait for the device within a capture, which CUDA forbids; then go on in the same process."""
    from helios_cuda.graphs import CudaRecorder

    eager, real = Steps(make(graphs="off"), size, 64, 64), CudaRecorder.capture
    if eager.backend.device.type != "cuda":
        return ""
    wanted, stream = eager.all(), torch.cuda.current_stream()
    steps = Steps(make(), size, 64, 64)

    def waiting(recorder: CudaRecorder, run: Callable[[], Any]) -> Any:
        def within() -> Any:
            made = run()
            torch.cuda.synchronize()
            return made

        return real(recorder, within)

    with mock.patch.object(CudaRecorder, "capture", waiting), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = _differences(steps.all(), wanted)
    if not any("not permitted" in str(warning.message) for warning in told):
        return f"it says {[str(warning.message) for warning in told]}"
    if torch.cuda.current_stream() != stream:
        return "another stream is the current one"
    again = Steps(make(), size, 64, 64)
    execution: Callable[[], Any] = getattr(again.program, "execution")  # noqa: B009
    return found or _differences(again.all(), wanted) or ("" if execution()["graphs"] else "nothing is captured again")


def _videos(make: Make, size: str) -> Iterator[Check]:
    """Whole chunks, decoded after denoising and beside it, with two prompts."""
    wanted, _ = _video(make(), size)
    found, waits = _video(make(overlap="on"), size)
    yield "chunks decoded beside denoising have the same bits", _unlike(found, wanted)
    yield "the host waits for nothing while it queues a chunk", waits
    plain, _ = _video(make(graphs="off", overlap="on"), size)
    yield "also where steps are not captured", _unlike(plain, wanted)
    times = [chunk.timings for chunk in found]
    bad = [t for t in times if min(t.values()) < 0 or abs(sum(t.values()) - 2 * t["total"]) > 1e-3 * t["total"]]
    yield "the times of their parts make up the whole", str(bad[0]) if bad else ""


def _video(backend: Backend, size: str) -> tuple[list[Chunk], str]:
    """Its chunks, and where the host waited while it queued the last."""
    waits: list[str] = []
    pipeline = Pipeline(sized_model(size, "distilled"), backend, "bf16")
    prompts = [("a lighthouse", 1), ("a harbour", 2)]
    settings = {"height": 64, "width": 64, "max_sequence_length": 64, "steps": 1, "seed": 5}
    with _watched(backend, waits):
        chunks = list(pipeline.stream(prompts=prompts, interpolation_steps=0, **settings))  # type: ignore[arg-type]
    return chunks, waits[0] if waits else ""


@contextlib.contextmanager
def _watched(backend: Backend, waits: list[str]) -> Iterator[None]:
    """Within, queueing a chunk may not wait, from the third on: before that programs are made and memory is taken."""
    calls = itertools.count()

    def queued(name: str, real: Callable[[Run, Any], Any]) -> Callable[[Run, Any], Any]:
        def queue(run: Run, what: Any) -> Any:
            if backend.device.type == "cuda" and next(calls) >= 4:
                try:
                    with _not_waiting():
                        return real(run, what)
                except RuntimeError as error:
                    waits.append(f"{name.strip('_')}: {str(error).splitlines()[0]}")
            return real(run, what)

        return queue

    with contextlib.ExitStack() as stack:
        for name in ("_begin", "_decode"):
            stack.enter_context(mock.patch.object(Run, name, queued(name, getattr(Run, name))))
        yield


def _unlike(found: list[Chunk], wanted: list[Chunk]) -> str:
    for one, other in zip(found, wanted, strict=True):
        for name in ("latents", "frames"):
            if not torch.equal(getattr(one, name), getattr(other, name)):
                return f"not the {name} of chunk {one.index}"
    return ""


@contextlib.contextmanager
def _no_room(resident: float = 0.0) -> Iterator[None]:
    """Within, weights are fetched, all but that part."""
    from helios_cuda import offload, program

    def streamed(link: Any, device: Any, _resident: float, seldom: Any) -> Any:
        return offload.Streamed(link, device, resident, seldom)

    with mock.patch.object(offload, "RESERVE", 1 << 62), mock.patch.object(program, "Streamed", streamed):
        yield


def _aside(steps: Steps, wanted: Mapping[str, Tensor]) -> str:
    """Twice: the second time the host has its copies. Their memory is another's meanwhile."""
    if steps.backend.device.type != "cuda":
        return ""
    for _ in range(2):
        before = torch.cuda.memory_allocated()
        if not steps.program.aside():
            return "they stay"
        freed = before - torch.cuda.memory_allocated()
        if freed <= 0:
            return "nothing is given back"
        other = torch.full((freed,), 255, dtype=torch.uint8, device=steps.backend.device)
        del other
        found = _differences(steps.all(), wanted)
        if found:
            return found
    return ""


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
