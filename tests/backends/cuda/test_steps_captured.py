"""Steps as graphs, without a GPU: what a graph does to memory is done by a stand-in for the recorder.

The stand-in notes every torch operation of a run with the tensors it read and wrote. A replay does the same operations
on the same tensors, whatever the program holds by then; and all that other captures of the pool wrote is destroyed
first, as it may be on a GPU, where they share memory.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from helios import op
from helios.backend import Kernel
from helios.errors import BackendError
from helios.graph import Builder, Graph, Rate
from helios.lower import lower
from helios.ops.linear import linear
from helios.ops.pointwise import add, gelu, silu
from helios.program import Program
from helios_cuda import CudaBackend
from helios_cuda.graphs import Recorder

T = TypeVar("T")
F32 = torch.float32


class Noted(TorchDispatchMode):
    """Notes operations: the function, its arguments, its results."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result


class Capture:
    def __init__(self, calls: list[tuple[Any, Any, Any, Any]]) -> None:
        self.calls = calls
        inputs = {_memory(x) for _, args, kwargs, _ in calls for x in _tensors((args, kwargs))}
        made = [x for *_, result in calls for x in _tensors(result)]
        self.made = [x for x in made if x.is_floating_point()]
        self.first_read = inputs - {_memory(x) for x in made}

    def replay(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, result in self.calls:
                again = func(*args, **kwargs)
                for old, new in zip(_tensors(result), _tensors(again), strict=True):
                    if _memory(old) != _memory(new):
                        old.copy_(new)

    def destroy(self) -> None:
        for tensor in self.made:
            if _memory(tensor) not in self.first_read:
                tensor.fill_(torch.nan)


class Pool:
    """The stand-in for ``CudaRecorder``; ``refuses`` is raised by a capture."""

    def __init__(self, refuses: Exception | None = None) -> None:
        self.refuses = refuses
        self.log: list[str] = []
        self.captures: list[Capture] = []

    def warm_up(self, run: Callable[[], object]) -> None:
        self.log.append("warm up")
        run()

    def capture(self, run: Callable[[], T]) -> tuple[Callable[[], None], T]:
        self.log.append("capture")
        with Noted() as noted:
            result = run()
        if self.refuses is not None:
            raise self.refuses
        mine = Capture(noted.calls)
        mine.destroy()  # a capture computes nothing
        self.captures.append(mine)

        def replay() -> None:
            self.log.append("replay")
            for capture in self.captures:
                capture.destroy()
            mine.replay()

        return replay, result


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


def _memory(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


class OnCpu(CudaBackend):
    """The CUDA backend with kernels of torch on the CPU and the stand-in for its recorder."""

    def __init__(self, refuses: Exception | None = None, *, graphs: str = "on") -> None:
        super().__init__(graphs=graphs)
        self.pools: list[Pool] = []
        self.prepared = 0
        self.refuses = refuses
        kernels = {name: Kernel(op.get(name).fn) for name in ("silu", "gelu", "add")}
        self.__dict__["kernels"] = {**kernels, "linear": Kernel(self.product, self.pack, ("weight", "bias"))}

    fusions = ()  # type: ignore[assignment]

    def pack(self, x: None, weight: Tensor, bias: Tensor | None) -> Tensor:
        self.prepared += 1
        return weight.T.contiguous()

    def product(self, packed: Tensor, x: Tensor) -> Tensor:
        return x @ packed

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def memory(self) -> tuple[int, int] | None:
        return None

    def link(self) -> None:
        return None

    def reusable(self) -> int:
        return 0

    def recorder(self) -> Recorder:
        self.pools.append(Pool(self.refuses))
        return self.pools[-1]


class Weights:
    def read(self, name: str) -> Tensor:
        shape = (1, 4) if name == "row" else (4, 4)
        return torch.randn(shape, generator=torch.Generator().manual_seed(ord(name[0])))


def entry(name: str, depth: int = 1) -> Graph:
    """Text through w and history, each its own rate; the step reads both, a weight of its own and one as it is."""
    with Builder(name) as build:
        w, v = (build.input(n, (4, 4), F32, Rate.WEIGHTS) for n in ("w", "v"))
        row = build.input("row", (1, 4), F32, Rate.WEIGHTS)
        text = linear(build.input("text", (2, 4), F32, Rate.PROMPT), w)
        history = silu(add(build.input("history", (2, 4), F32, Rate.CHUNK), text))
        x = build.input("sample", (2, 4), F32, Rate.STEP)
        out = add(add(add(linear(x, v), row), text), history)
        for _ in range(depth):
            out = gelu(linear(out, w))
        build.output("y", out)
        build.output("z", add(out, out))
    return build.graph()


def solver() -> Graph:
    with Builder("step") as build:
        build.output("x", silu(build.input("x", (2, 4), F32, Rate.STEP)))
    return build.graph()


def program(backend: CudaBackend) -> Program:
    made = lower({"small": entry("small"), "large": entry("large", 3), "step": solver()}, backend)
    made.load(Weights())
    return made


def contexts(made: Program, seed: int) -> Any:
    g = torch.Generator().manual_seed(seed)
    text = made.bind({"text": torch.randn((2, 4), generator=g)})
    return text, made.bind({"history": torch.randn((2, 4), generator=g)}, text)


def sample(seed: int) -> dict[str, Tensor]:
    return {"sample": torch.randn((2, 4), generator=torch.Generator().manual_seed(seed))}


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_replays_give_what_kernels_give_through_every_switch_of_context() -> None:
    captured, eager = OnCpu(), OnCpu(graphs="off")
    one, other = program(captured), program(eager)
    a, b = [contexts(one, s) for s in (1, 2)], [contexts(other, s) for s in (1, 2)]
    order = [(0, 0), (1, 1), (0, 0), (0, 1), (1, 0), (1, 0)]  # prompt and history change apart and together
    for i, (prompt, history) in enumerate(order):
        for name in ("small", "large", "small"):
            x = a[prompt][0] | a[history][1]
            y = b[prompt][0] | b[history][1]
            assert same(one.run(name, sample(i), x), other.run(name, sample(i), y)), (i, name)
    assert eager.pools == []
    assert captured.pools[0].log == ["warm up", "capture"] * 2 + ["replay"] * 18


def test_results_are_the_callers_own() -> None:
    made = program(OnCpu())
    text, history = contexts(made, 1)
    first = made.run("small", sample(1), text | history)
    kept = {name: t.clone() for name, t in first.items()}
    made.run("small", sample(2), text | history)
    made.run("large", sample(3), text | history)
    assert same(first, kept)


def test_a_context_stays_as_it_is() -> None:
    made = program(OnCpu())
    a, b = contexts(made, 1), contexts(made, 2)
    kept = {name: t.clone() for name, t in (a[0] | a[1]).values.items()}
    for context in (a, b, a, b):
        made.run("large", sample(1), context[0] | context[1])
    assert same((a[0] | a[1]).values, kept)


def test_one_copy_of_a_context_and_only_when_it_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    made = program(OnCpu())
    a, b = contexts(made, 1), contexts(made, 2)
    made.run("small", sample(1), a[0] | a[1])
    copies: list[int] = []
    real = Tensor.copy_

    def copy_(self: Tensor, source: Tensor, *rest: Any) -> Tensor:
        copies.append(_memory(source))
        return real(self, source, *rest)

    def copied(name: str, context: Any) -> int:
        copies.clear()
        with monkeypatch.context() as patch:
            patch.setattr(Tensor, "copy_", copy_)
            made.run(name, sample(5), context[0] | context[1])
        held = {_memory(t) for t in (context[0] | context[1]).values.values()}
        return len([m for m in copies if m in held])

    assert copied("small", a) == 0
    assert copied("large", a) == 0  # entries share the copy
    assert copied("small", b) == 2  # what the prompt's phase made of the text, and the chunk's of the history
    assert copied("large", (a[0], b[1])) == 1


def test_replays_neither_prepare_nor_read_weights_again() -> None:
    backend = OnCpu()
    made = program(backend)
    text, history = contexts(made, 1)
    assert backend.prepared == 2
    for i in range(3):
        made.run("small", sample(i), text | history)
    assert backend.prepared == 2


def test_entries_without_a_context_are_not_captured() -> None:
    backend = OnCpu()
    made = program(backend)
    made.run("step", {"x": torch.ones(2, 4)})
    assert backend.pools == []


def test_captures_share_a_pool_the_largest_first() -> None:
    backend = OnCpu()
    made = program(backend)
    assert made.execution() == {"graphs": [], "eager": "nothing ran yet"}  # type: ignore[attr-defined]
    made.capture()  # type: ignore[attr-defined]
    assert len(backend.pools) == 1
    assert made.execution() == {"graphs": ["large", "small"], "static_bytes": 4 * 2 * 4 * 4}  # type: ignore[attr-defined]
    text, history = contexts(made, 1)
    made.run("small", sample(1), text | history)
    assert backend.pools[0].log == ["warm up", "capture"] * 2 + ["replay"]


def test_new_weights_are_captured_anew() -> None:
    backend = OnCpu()
    made = program(backend)
    text, history = contexts(made, 1)
    before = made.run("small", sample(1), text | history)

    class Other(Weights):
        def read(self, name: str) -> Tensor:
            return super().read(name) * 2

    made.load(Other())
    text, history = contexts(made, 1)
    assert not same(made.run("small", sample(1), text | history), before)
    assert len(backend.pools) == 2


def test_what_cannot_be_captured_runs_kernel_by_kernel_and_says_so() -> None:
    backend = OnCpu(RuntimeError("CUDA error: operation not permitted when stream is capturing"))
    made, plain = program(backend), program(OnCpu(graphs="off"))
    a, b = contexts(made, 1), contexts(plain, 1)
    with pytest.warns(RuntimeWarning, match=r"kernel by kernel, not as CUDA graphs: large: .*not permitted"):
        first = made.run("small", sample(1), a[0] | a[1])
    assert same(first, plain.run("small", sample(1), b[0] | b[1]))
    made.run("large", sample(1), a[0] | a[1])  # no second try, no second warning
    assert len(backend.pools) == 1
    told = made.execution()  # type: ignore[attr-defined]
    assert told["graphs"] == []
    assert "not permitted" in told["eager"]
    assert plain.execution() == {"graphs": [], "eager": "asked for"}  # type: ignore[attr-defined]


def test_no_room_for_a_capture_is_an_error() -> None:
    full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of …")
    made = program(OnCpu(full))
    text, history = contexts(made, 1)
    with pytest.raises(BackendError, match=r"no room for the graphs of its steps: it needs 2.00 GiB more"):
        made.run("small", sample(1), text | history)


def test_errors_of_a_kernel_are_not_taken_for_a_refused_capture() -> None:
    backend = OnCpu()
    made = program(backend)
    text, history = contexts(made, 1)

    def broken(*operands: Any) -> Tensor:
        raise RuntimeError("a defect")

    object.__setattr__(made._sequences["large"].calls[0].kernel, "run", broken)  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match="a defect"):
        made.run("large", sample(1), text | history)


def test_captures_hold_neither_their_program_nor_a_dropped_context() -> None:
    made = program(OnCpu())
    text, history = contexts(made, 1)
    made.run("small", sample(1), text | history)
    dropped = [weakref.ref(t) for t in history.values.values()]
    gc.disable()
    try:
        del history
        assert [r() for r in dropped if r() is not None] == []
        gone = weakref.ref(made)
        del made
        assert gone() is None  # or two programs' weights would lie on the device until the collector runs
    finally:
        gc.enable()


def test_the_stand_in_destroys_what_a_gpu_may_destroy() -> None:
    pool = Pool()
    x = torch.ones(3)
    replay, first = pool.capture(lambda: x + 1)
    again, second = pool.capture(lambda: x * 5)
    assert first.isnan().all()
    replay()
    assert first.tolist() == [2.0] * 3
    x.fill_(2)
    again()
    assert first.isnan().all()
    assert second.tolist() == [10.0] * 3
