"""Running plans: contexts, errors, what is counted, and what is freed."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from helios import op as ops
from helios.backend import Backend, Kernel, ReferenceBackend
from helios.errors import GraphError, InputError, UnsupportedNode
from helios.graph import Builder, Graph, Node, Rate
from helios.lower import lower
from helios.ops.layout import unbind
from helios.ops.linear import linear
from helios.ops.pointwise import add, cast, gelu, silu
from helios.program import Context, Program

F32, BF16 = torch.float32, torch.bfloat16


class Weights:
    """Counts reads, and remembers what it gave without keeping it."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]] | None = None) -> None:
        self.shapes = {"w": (4, 4), "v": (4, 4)} if shapes is None else shapes
        self.reads: list[str] = []
        self.given: dict[str, weakref.ref[Tensor]] = {}

    def read(self, name: str) -> Tensor:
        self.reads.append(name)
        tensor = torch.randn(self.shapes[name], generator=torch.Generator().manual_seed(len(name)))
        self.given[name] = weakref.ref(tensor)
        return tensor


def entry(name: str = "main", sign: int = 1) -> Graph:
    """Work at every rate: text through w, history and text together, both added to the step's linear by v."""
    with Builder(name) as build:
        w, v = (build.input(n, (4, 4), F32, Rate.WEIGHTS) for n in "wv")
        text = linear(build.input("text", (2, 4), F32, Rate.PROMPT), w)
        history = silu(add(build.input("history", (2, 4), F32, Rate.CHUNK), text))
        out = add(linear(build.input("sample", (2, 4), F32, Rate.STEP), v), history)
        for _ in range(sign):
            out = gelu(out)
        build.output("y", out)
    return build.graph()


def program(backend: Backend | None = None, **entries: Graph) -> Program:
    made = lower(entries or {"main": entry()}, backend or ReferenceBackend())
    made.load(Weights())
    return made


def draw(seed: int) -> Tensor:
    return torch.randn((2, 4), generator=torch.Generator().manual_seed(seed))


def contexts(made: Program, seed: int) -> Context:
    prompt = made.bind({"text": draw(seed)})
    return prompt | made.bind({"history": draw(seed + 100)}, prompt)


def test_a_run_is_the_straight_computation() -> None:
    made = program()
    (y,) = made.run("main", {"sample": draw(0)}, contexts(made, 1)).values()
    weights = Weights()
    w, v = weights.read("w"), weights.read("v")
    history = silu(draw(101) + draw(1) @ w.T)
    assert torch.allclose(y, gelu(draw(0) @ v.T + history), atol=1e-6)


def test_a_context_is_never_changed_by_another() -> None:
    """Prompt A after prompt B gives A's first result, bit for bit; also when both were bound before either ran."""
    made = program()
    a = contexts(made, 1)
    first = made.run("main", {"sample": draw(0)}, a)["y"]
    b = contexts(made, 2)
    other = made.run("main", {"sample": draw(0)}, b)["y"]
    assert torch.equal(made.run("main", {"sample": draw(0)}, a)["y"], first)
    assert not torch.equal(other, first)
    assert torch.equal(made.run("main", {"sample": draw(0)}, contexts(made, 1))["y"], first)


def test_writing_to_a_tensor_after_binding_it_changes_no_context() -> None:
    """The step reads the bound input itself, so only a copy protects it."""
    with Builder("main") as build:
        sample, text = build.input("sample", (2, 4), F32, Rate.STEP), build.input("text", (2, 4), F32, Rate.PROMPT)
        build.output("y", add(sample, text))
    made = program(main=build.graph())
    mine = draw(1)
    context = made.bind({"text": mine})
    mine.zero_()
    assert torch.equal(made.run("main", {"sample": torch.zeros(2, 4)}, context)["y"], draw(1))


def test_joining_contexts_makes_a_new_one() -> None:
    made = program()
    a, b = made.bind({"text": draw(1)}), made.bind({"text": draw(2)})
    names = set(a.values)
    joined = a | b
    assert all(torch.equal(joined.values[n], b.values[n]) for n in names)
    assert any(not torch.equal(a.values[n], b.values[n]) for n in names)
    assert set(a.values) == names
    assert a.nbytes == sum(t.nbytes for t in a.values.values()) > 0
    with pytest.raises(dataclasses.FrozenInstanceError):
        a.values = {}  # type: ignore[misc]
    with pytest.raises(TypeError):
        a.values["text"] = draw(3)  # type: ignore[index]


def test_the_chunk_phase_takes_what_it_needs_of_the_prompt() -> None:
    made = program()
    with pytest.raises(InputError, match="'chunk' lacks"):
        made.bind({"history": draw(0)})


def test_phases_are_counted() -> None:
    made = program(one=entry("one", 1), two=entry("two", 2))
    assert made.evaluations == {Rate.WEIGHTS: 1}
    for seed in (1, 2):
        context = contexts(made, seed)
        for _ in range(5):
            made.run("one", {"sample": draw(0)}, context)
            made.run("two", {"sample": draw(0)}, context)
    assert made.evaluations == {Rate.WEIGHTS: 1, Rate.PROMPT: 2, Rate.CHUNK: 2}


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda p, c: p.run("min", {}, c), GraphError, "has no entry 'min'; it has main"),
        (lambda p, c: p.run("main", {}, c), InputError, "'main' lacks sample"),
        (lambda p, c: p.run("main", {"sample": draw(0)}), InputError, "'main' lacks"),
        (lambda p, c: p.run("main", {"smaple": draw(0)}, c), InputError, "main has no input 'smaple'; it has sample"),
        (lambda p, c: p.run("main", {"sample": draw(0)[:1]}, c), InputError, "has shape [1, 4], main takes [2, 4]"),
        (lambda p, c: p.run("main", {"sample": draw(0), "text": draw(1)}, c), InputError, "main has no input 'text'"),
        (lambda p, c: p.bind({"text": draw(0)[:1]}), InputError, "input 'text' has shape [1, 4], prompt takes [2, 4]"),
        (lambda p, c: p.bind({"txt": draw(0)}), InputError, "['text'] or ['history']; got ['txt']"),
        (lambda p, c: p.bind({"text": draw(0), "history": draw(1)}), InputError, "bind takes all inputs of one phase"),
        (lambda p, c: p.bind({}), InputError, "bind takes all inputs of one phase"),
    ],
)
def test_wrong_calls(call: Callable[[Program, Context], Any], error: type[Exception], text: str) -> None:
    made = program()
    with pytest.raises(error) as refused:
        call(made, contexts(made, 1))
    assert text in str(refused.value)


def test_without_weights() -> None:
    made = lower({"main": entry()}, ReferenceBackend())
    for call in (lambda: made.bind({"text": draw(0)}), lambda: made.run("main", {"sample": draw(0)})):
        with pytest.raises(GraphError, match="no weights yet"):
            call()


def test_a_weight_of_another_shape() -> None:
    made = lower({"main": entry()}, ReferenceBackend())
    with pytest.raises(InputError, match=r"weight 'v' has shape \[4, 5\], the graph takes \[4, 4\]"):
        made.load(Weights({"w": (4, 4), "v": (4, 5)}))
    with pytest.raises(GraphError, match="no weights yet"):
        made.bind({"text": draw(0)})


def test_inputs_are_brought_into_the_declared_dtype_and_stay_as_they_are() -> None:
    made = program()
    wide, context = draw(0).double(), contexts(made, 1)
    before = wide.clone()
    result = made.run("main", {"sample": wide}, context)["y"]
    assert torch.equal(result, made.run("main", {"sample": draw(0)}, context)["y"])
    assert torch.equal(wide, before)


def test_weights_can_be_loaded_again() -> None:
    made = program()
    first = made.run("main", {"sample": draw(0)}, contexts(made, 1))["y"]

    class Zeros(Weights):
        def read(self, name: str) -> Tensor:
            return torch.zeros(4, 4)

    made.load(Zeros())
    assert not torch.equal(made.run("main", {"sample": draw(0)}, contexts(made, 1))["y"], first)
    made.load(Weights())
    assert torch.equal(made.run("main", {"sample": draw(0)}, contexts(made, 1))["y"], first)


# What a backend without all kernels gives.


class Partial(ReferenceBackend):
    """Lacks gelu, and refuses silu of long rows."""

    name = "partial"

    @property
    def kernels(self) -> Mapping[str, Kernel]:  # type: ignore[override]
        return {name: Kernel(ops.get(name).fn) for name in ops.names() if name != "gelu"}

    def supports(self, node: Node) -> str | None:
        if node.op == "silu" and node.outputs[0].shape[-1] > 3:
            return "rows longer than 3"
        return super().supports(node)


def test_an_op_without_kernel_is_an_error_that_says_all() -> None:
    with pytest.raises(UnsupportedNode) as refused:
        lower({"main": entry()}, Partial())
    text = str(refused.value)
    assert "backend 'partial' cannot run" in text
    assert "silu" in text
    assert "float32[2,4]" in text
    assert "reason: rows longer than 3" in text
    assert "--fallback reference" in text


def test_a_fallback_is_allowed_and_counted() -> None:
    made = lower({"main": entry(sign=2)}, Partial(), fallback="reference")
    made.load(Weights())
    rows = {row[0]: row[1:] for row in made.coverage.rows()}
    assert rows["gelu"] == (0, 0, 2, "no kernel")
    assert rows["silu"] == (0, 0, 1, "rows longer than 3")
    assert rows["linear"] == (2, 0, 0, "")
    assert made.coverage.fallbacks == 3
    same = program(main=entry(sign=2))
    y = made.run("main", {"sample": draw(0)}, contexts(made, 1))["y"]
    assert torch.equal(y, same.run("main", {"sample": draw(0)}, contexts(same, 1))["y"])


def test_an_unknown_fallback() -> None:
    with pytest.raises(InputError, match="unknown fallback 'cpu'"):
        lower({"main": entry()}, ReferenceBackend(), fallback="cpu")


# Packed weights and memory.


class Packing(ReferenceBackend):
    """Keeps the transposed weight of each linear as its own handle."""

    name = "packing"

    def __init__(self) -> None:
        super().__init__()
        self.packed = 0

    @property
    def kernels(self) -> Mapping[str, Kernel]:  # type: ignore[override]
        bodies = {name: Kernel(ops.get(name).fn) for name in ops.names()}
        return bodies | {"linear": Kernel(lambda w, x: x @ w, self.pack, ("weight", "bias"))}

    def pack(self, x: None, weight: Tensor, bias: Tensor | None) -> Tensor:
        assert x is None
        assert bias is None
        self.packed += 1
        return weight.T.clone()


def test_weights_that_were_packed_are_let_go() -> None:
    backend, weights = Packing(), Weights()
    made = lower({"one": entry("one", 1), "two": entry("two", 2)}, backend)
    made.load(weights)
    assert sorted(weights.reads) == ["v", "w"]
    assert backend.packed == 2  # the two entries share the handle of v
    assert {name: ref() for name, ref in weights.given.items()} == {"w": None, "v": None}
    plain = program(one=entry("one", 1))
    context, wanted = contexts(made, 1), contexts(plain, 1)
    y = made.run("one", {"sample": draw(0)}, context)["y"]
    assert torch.allclose(y, plain.run("one", {"sample": draw(0)}, wanted)["y"], atol=1e-6)


def test_weights_that_were_packed_and_are_read_as_well_are_kept() -> None:
    with Builder("g") as build:
        w = build.input("w", (4, 4), F32, Rate.WEIGHTS)
        build.output("y", add(linear(build.input("x", (4, 4), F32, Rate.STEP), w), w))
    weights = Weights()
    made = lower({"g": build.graph()}, Packing())
    made.load(weights)
    w_ = weights.given["w"]()
    assert w_ is not None
    x = torch.eye(4)
    assert torch.allclose(made.run("g", {"x": x})["y"], w_.T + w_, atol=1e-6)


def test_a_weight_that_is_none_is_packed_at_each_call() -> None:
    with Builder("g") as build:
        x, w = (build.input(n, (4, 4), F32, Rate.STEP) for n in "xw")
        build.output("y", linear(x, w))
    backend = Packing()
    made = lower({"g": build.graph()}, backend)
    made.load(Weights())
    x_ = torch.randn((4, 4), generator=torch.Generator().manual_seed(0))
    for calls in (1, 2):
        assert torch.allclose(made.run("g", {"x": torch.eye(4), "w": x_})["y"], x_.T)
        assert backend.packed == calls


class Watching(ReferenceBackend):
    """Notes at each silu how many tensors that silus made, or were given, are alive."""

    name = "watching"

    def __init__(self) -> None:
        super().__init__()
        self.refs: list[weakref.ref[Tensor]] = []
        self.alive: list[int] = []

    @property
    def kernels(self) -> Mapping[str, Kernel]:  # type: ignore[override]
        return {name: Kernel(ops.get(name).fn) for name in ops.names()} | {"silu": Kernel(self.silu)}

    def silu(self, x: Tensor) -> Tensor:
        result = ops.get("silu").fn(x)
        self.refs.append(weakref.ref(result))
        self.alive.append(sum(ref() is not None for ref in self.refs))
        return result


def test_values_are_freed_after_their_last_use() -> None:
    with Builder("g") as build:
        x = build.input("x", (2, 4), F32, Rate.STEP)
        for _ in range(6):
            x = silu(x)
        build.output("y", x)
    backend = Watching()
    made = lower({"g": build.graph()}, backend)
    made.load(Weights())
    made.run("g", {"x": draw(0)})
    assert max(backend.alive) == 2  # what is read, and what is made


def test_outputs_that_nobody_reads_are_freed_at_once() -> None:
    with Builder("g") as build:
        x = build.input("x", (2, 4), F32, Rate.STEP)
        build.output("y", silu(unbind(x, dim=0)[1]))
    made = lower({"g": build.graph()}, ReferenceBackend())
    made.load(Weights())
    assert torch.equal(made.run("g", {"x": draw(0)})["y"], silu(draw(0)[1]))


def test_a_converted_step_input_is_freed_after_its_last_use() -> None:
    """What ``run`` itself made of an input, in another dtype, does not live until the end of the step."""
    with Builder("g") as build:
        x = build.input("x", (2, 4), BF16, Rate.STEP)
        build.output("y", silu(silu(cast(x, dtype=F32))))
    placed: list[weakref.ref[Tensor]] = []
    alive: list[bool] = []

    class Spy(ReferenceBackend):
        name = "spy"

        @property
        def kernels(self) -> Mapping[str, Kernel]:  # type: ignore[override]
            def first(x: Tensor, *, dtype: torch.dtype) -> Tensor:
                placed.append(weakref.ref(x))
                return x.to(dtype)

            def later(x: Tensor) -> Tensor:
                alive.append(placed[0]() is not None)
                return torch.nn.functional.silu(x)

            bodies = {name: Kernel(ops.get(name).fn) for name in ops.names()}
            return bodies | {"cast": Kernel(first), "silu": Kernel(later)}

    made = lower({"g": build.graph()}, Spy())
    made.load(Weights())
    made.run("g", {"x": draw(0)})
    assert alive == [False, False]


def test_an_input_may_be_an_output() -> None:
    with Builder("g") as build:
        x = build.input("x", (2, 4), F32, Rate.STEP)
        build.output("x", x)
        build.output("y", silu(x))
        build.output("z", silu(silu(x)))
    made = lower({"g": build.graph()}, ReferenceBackend())
    made.load(Weights())
    result = made.run("g", {"x": draw(0)})
    assert list(result) == ["x", "y", "z"]
    assert torch.equal(result["x"], draw(0))


def test_a_profile_names_every_node_of_the_step() -> None:
    made = program()
    laps = made.profile("main", {"sample": draw(0)}, contexts(made, 1))
    assert [node.op for node, _ in laps] == [node.op for node in made.plan.steps["main"].nodes]
    assert all(seconds >= 0 for _, seconds in laps)


def test_gradients_are_not_recorded() -> None:
    made = program()
    sample = draw(0).requires_grad_()
    assert not made.run("main", {"sample": sample}, contexts(made, 1))["y"].requires_grad


def test_the_whole_thing_without_arithmetic() -> None:
    made = program(ReferenceBackend("meta"))
    y = made.run("main", {"sample": draw(0)}, contexts(made, 1))["y"]
    assert y.device.type == "meta"
    assert y.shape == (2, 4)
