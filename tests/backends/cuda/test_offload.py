"""Weights that are fetched from the host while the program runs, over a link whose copies come as late as they may."""

from __future__ import annotations

import itertools
import weakref
from typing import Any, NamedTuple

import pytest
import torch
from slow_link import SlowLink
from torch import Tensor

from helios import op
from helios.backend import Kernel
from helios.errors import BackendError, InputError
from helios.fit import low
from helios.graph import Builder, Graph, Rate
from helios.lower import lower
from helios.ops.linear import linear
from helios.ops.pointwise import add, gelu
from helios_cuda import CudaBackend, offload
from helios_cuda.offload import Streamed

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_arenas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "ARENA", 4096)


class Handle(NamedTuple):
    weight: Tensor
    bias: Tensor | None
    parts: tuple[int, ...]


def handle(i: int) -> Handle:
    # A transposed weight keeps its strides; sizes differ from handle to handle.
    return Handle(torch.full((4 + i, 3), float(i)).t(), None if i % 2 else torch.full((5,), i + 0.5), (i, i))


def filled(resident: float, count: int = 6, slots: int = 2, link: SlowLink | None = None, **more: Any) -> Streamed:
    streamed = Streamed(link or SlowLink(), CPU, resident, slots=slots, **more)
    for i in range(count):
        streamed[i] = handle(i)
    return streamed


def same(one: Handle, other: Handle) -> bool:
    biases = one.bias is other.bias is None or torch.equal(one.bias, other.bias)  # type: ignore[arg-type]
    strides = one.weight.stride() == other.weight.stride()
    return torch.equal(one.weight, other.weight) and strides and biases and one.parts == other.parts


@pytest.mark.parametrize("slots", [1, 2, 5, 9])
@pytest.mark.parametrize("resident", [0.0, 0.4, 0.99, 1.0])
def test_handles_are_what_they_were(resident: float, slots: int) -> None:
    streamed = filled(resident, slots=slots)
    order = [0, 1, 2, 3, 4, 5, 5, 0, 3]  # one may be used twice
    for _ in range(2):
        streamed.begin(order)
        assert all(same(streamed[i], handle(i)) for i in order)
        streamed.end()


def test_what_was_taken_stays_until_the_next_is_taken() -> None:
    link = SlowLink()
    streamed = filled(0.0, link=link)
    streamed.begin(range(6))
    taken: list[Handle] = []
    for i in range(6):
        if taken:
            assert same(taken[-1], handle(i - 1))
        taken.append(streamed[i])


def test_copies_run_ahead_and_wait_for_the_kernels_that_read_the_slot() -> None:
    link = SlowLink()
    streamed = filled(0.0, slots=3, link=link)
    streamed.begin(range(6))
    assert len(link.copies) == 3  # before the first is used
    assert link.free == [1, 1, 1]
    streamed[0]
    assert len(link.copies) == 3  # all slots are in use
    streamed[1]
    assert len(link.copies) == 4
    assert link.free[3] == link.clock == 2  # a mark behind the kernel that read the first
    assert not link.copies[2].done  # nobody waits for more than is used
    for i in (2, 3, 4, 5):
        streamed[i]
    assert len(link.copies) == 6
    assert link.waits == 0  # the host never


def test_copies_of_a_run_begin_while_the_one_before_it_computes() -> None:
    link = SlowLink()
    streamed = filled(0.0, slots=3, link=link)
    for _ in range(2):
        streamed.begin(range(6))
        assert all(same(streamed[i], handle(i)) for i in range(6))
        streamed.end()
    # Each waits for the last kernel that read its slot, and not for the end of the run.
    assert link.free[6:9] == [5, 6, 7]
    assert link.clock > 7


def test_handles_step_aside_and_return_as_they_were() -> None:
    link = SlowLink()
    streamed = filled(0.5, link=link)
    streamed["odd"] = Handle(torch.zeros(4, 8)[:, :3], None, ())
    kept = {key: weakref.ref(h.weight) for key, h in streamed._kept.items() if key != "odd"}
    assert len(kept) == 3
    for _ in range(2):
        assert streamed.aside()
        taken = link.taken  # a second time nothing is copied
        assert [ref() for ref in kept.values() if ref() is not None] == []
        assert len(streamed) == 7
        assert {*streamed} == {0, 1, 2, 3, 4, 5, "odd"}
        assert all(key in streamed for key in kept)
        streamed.begin(range(6))
        assert all(same(streamed[i], handle(i)) for i in range(6))
        streamed.end()
        assert link.taken == taken
        kept = {key: weakref.ref(streamed[key].weight) for key in kept}
    assert streamed.aside()
    assert all(same(streamed[i], handle(i)) for i in range(6))  # outside of a run too
    assert streamed.aside()
    del streamed[next(iter(kept))]
    assert len(streamed) == 6


def test_nothing_steps_aside_where_the_host_has_no_room() -> None:
    link = SlowLink()
    streamed = filled(1.0, link=link)
    link.fails_after = link.taken
    assert not streamed.aside()
    assert len(streamed._kept) == 6


def test_residents_are_spread_evenly() -> None:
    streamed = Streamed(SlowLink(), CPU, 0.5)
    for i in range(16):
        streamed[i] = Handle(torch.zeros(64, 4), None, ())
    away = sorted(key for key in streamed._away if isinstance(key, int))
    assert len(away) == 8
    assert {b - a for a, b in itertools.pairwise(away)} <= {1, 2, 3}
    kept, fetched = streamed.nbytes
    assert kept == fetched == 8 * 1024


def test_seldom_used_handles_go_first() -> None:
    streamed = filled(0.999999, seldom={1, 4})
    assert {1, 4} <= set(streamed._away)
    assert len(streamed._away) <= 3
    assert same(filled(1.0, seldom={1})[1], handle(1))  # outside of a run: in memory of its own
    halves = Streamed(SlowLink(), CPU, 0.5, seldom={0, 1, 2, 3})
    for i in range(8):
        halves[i] = Handle(torch.zeros(64, 4), None, ())
    assert len(halves._away) == 4 + 2  # half of the others: the seldom ones are none of their share


def test_what_is_no_plain_piece_of_memory_stays() -> None:
    streamed = Streamed(SlowLink(), CPU, 0.0)
    streamed["rows"] = Handle(torch.zeros(4, 8)[:, :3], None, ())
    streamed["empty"] = Handle(torch.zeros(0), None, ())
    streamed["none"] = (1, "text")
    assert set(streamed._kept) == {"rows", "empty", "none"}


def test_it_is_a_mapping() -> None:
    streamed = filled(0.5)
    assert len(streamed) == 6
    assert {*streamed} == {0, 1, 2, 3, 4, 5}
    assert 3 in streamed
    assert 9 not in streamed
    del streamed[3]
    assert 3 not in streamed
    streamed.clear()
    assert len(streamed) == 0
    assert streamed.nbytes == (0, 0)


def test_another_order_than_announced_is_a_defect() -> None:
    streamed = filled(0.0)
    streamed.begin([0, 1])
    with pytest.raises(AssertionError, match="fetched for 0, and 1 is used"):
        streamed[1]


def test_a_run_that_broke_off_is_forgotten() -> None:
    link = SlowLink()
    streamed = filled(0.0, link=link)
    streamed.begin(range(6))
    streamed[0]
    streamed.end()
    assert len(link.copies) == 2
    assert all(copy.done for copy in link.copies)  # the second was under way, and its memory may be given back
    streamed.begin([4, 5])
    assert same(streamed[4], handle(4))


def test_the_host_has_no_room() -> None:
    with pytest.raises(BackendError, match=r"the host has no 4096 bytes to pin for weights, after 0 bytes"):
        filled(0.0, link=SlowLink(fails_after=100))


# In a program.


class OnCpu(CudaBackend):
    """The CUDA backend with kernels of torch on the CPU, the link that is late, and as much memory as is said."""

    def __init__(self, free: int, **more: Any) -> None:
        super().__init__(**more)
        self.free = free
        self.slow = SlowLink()
        kernels = {name: Kernel(op.get(name).fn) for name in ("gelu", "add")}
        self.__dict__["kernels"] = {**kernels, "linear": Kernel(lambda w, x: x @ w, self.pack, ("weight", "bias"))}

    fusions = ()  # type: ignore[assignment]

    def pack(self, x: None, weight: Tensor, bias: Tensor | None) -> Tensor:
        return weight.t().contiguous()

    @property
    def device(self) -> torch.device:
        return CPU

    def memory(self) -> tuple[int, int] | None:
        return self.free, 10 << 30

    def reusable(self) -> int:
        return 0

    def link(self) -> SlowLink:
        return self.slow


WIDTH, LAYERS = 16, 6
ALL = (LAYERS + 2) * WIDTH * WIDTH * 4


def network() -> Graph:
    with Builder("main") as build:
        text = linear(build.input("text", (2, WIDTH), torch.float32, Rate.PROMPT), weight(build, "t"))
        x = build.input("x", (2, WIDTH), torch.float32, Rate.STEP)
        for i in range(LAYERS):
            x = add(gelu(linear(x, weight(build, f"w{i}"))), text)
        build.output("y", linear(x, weight(build, "last")))
    return build.graph()


def weight(build: Builder, name: str) -> Any:
    return build.input(name, (WIDTH, WIDTH), torch.float32, Rate.WEIGHTS)


class Weights:
    def read(self, name: str) -> Tensor:
        return torch.randn((WIDTH, WIDTH), generator=torch.Generator().manual_seed(sum(map(ord, name)))) / 4


def results(backend: CudaBackend) -> tuple[list[Tensor], Any]:
    program = lower({"main": network()}, backend)
    program.load(Weights())
    context = program.bind({"text": torch.ones(2, WIDTH)})
    inputs = [torch.full((2, WIDTH), float(i)) for i in range(3)]
    return [program.run("main", {"x": x}, context)["y"] for x in inputs], program


def test_programs_give_the_same_with_their_weights_on_the_host() -> None:
    room = offload.RESERVE + ALL // 2
    plain, _ = results(OnCpu(10 << 30, graphs="off"))
    fetched, program = results(OnCpu(room, memory="low"))
    assert all(torch.equal(a, b) for a, b in zip(plain, fetched, strict=True))
    told = program.execution()
    assert told["eager"] == "weights are fetched from the host"
    assert told["graphs"] == []
    assert told["resident_bytes"] <= ALL // 2
    assert told["resident_bytes"] + told["fetched_bytes"] == ALL
    program.load(Weights())  # anew, and not on top of the old ones
    assert program.execution() == told


def test_a_program_steps_aside_and_computes_the_same_after_it() -> None:
    backend = OnCpu(offload.RESERVE + ALL // 2, memory="low")
    wanted, program = results(backend)
    assert program.aside()
    context = program.bind({"text": torch.ones(2, WIDTH)})
    assert torch.equal(program.run("main", {"x": torch.ones(2, WIDTH)}, context)["y"], wanted[1])
    _, all_there = results(OnCpu(10 << 30, memory="low", graphs="off"))
    assert not all_there.aside()


def test_low_memory_changes_nothing_where_all_fits() -> None:
    _, program = results(OnCpu(10 << 30, memory="low", graphs="off"))
    assert program.execution() == {"graphs": [], "eager": "asked for"}


def test_weights_that_do_not_fit_are_refused_with_the_way_out() -> None:
    with pytest.raises(BackendError) as caught:
        results(OnCpu(ALL - 1, graphs="off"))
    assert caught.value.why == "the weights need 8192 bytes on cuda; 8191 bytes of 10.0 GiB is free, 10.0 GiB is in use"
    assert "nvidia-smi" in caught.value.fix
    assert "--memory low" in caught.value.fix


def test_memory_is_full_or_low() -> None:
    with pytest.raises(InputError, match="did you mean 'low'"):
        CudaBackend(memory="lo")


def test_helios_fit_leaves_as_much_free_and_knows_the_slots() -> None:
    assert low.LEFT_FREE == offload.RESERVE
    assert low.offers_low("cuda")
    largest = 3 * 5120 * 5120 * 2  # q, k and v in one
    assert offload.SLOTS * largest <= low.SLOTS < 1.1 * offload.SLOTS * largest
