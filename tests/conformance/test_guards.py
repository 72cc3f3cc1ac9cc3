"""Buffers with known surroundings: that they hold what they should, and that they tell when they do not."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from helios_conformance import guards
from helios_conformance.guards import Allocations, Guarded, Layout, share_memory

CPU = torch.device("cpu")
SHAPES = [(), (5,), (3, 4), (2, 3, 1, 5), (2, 0, 3)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64])
@pytest.mark.parametrize("layout", guards.LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_guarded_operand_is_the_operand(shape: tuple[int, ...], layout: Layout, dtype: torch.dtype) -> None:
    host = torch.arange(math.prod(shape), dtype=dtype).reshape(shape)
    guarded = Guarded.of(host, CPU, layout)
    assert torch.equal(guarded.tensor, host)
    assert guarded.tensor.dtype == dtype
    assert guarded.broken() == (False, False)
    guarded.write(host + 1)
    assert torch.equal(guarded.tensor, host + 1)
    assert guarded.broken() == (False, False)


def test_layouts_are_what_they_say() -> None:
    host = torch.ones(4, 5, 6)
    plain, padded, permuted = (Guarded.of(host, CPU, layout).tensor for layout in guards.LAYOUTS)
    assert plain.is_contiguous()
    assert plain.data_ptr() % 64 == 0
    assert not padded.is_contiguous()
    assert padded.stride() == (45, 9, 1)
    assert padded.data_ptr() % 8 == 4
    assert permuted.stride() == (1, 7, 35)
    assert permuted.data_ptr() % 8 == 4
    assert not Guarded.of(torch.ones(5), CPU, "permuted").tensor.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_guards_read_as_nan(dtype: torch.dtype) -> None:
    assert guards._pattern(4096).view(dtype).isnan().all()


def beyond(tensor: Tensor, places: int) -> Tensor:
    """The element so many places after the last, or before the first."""
    at = tensor.storage_offset() + (places if places < 0 else tensor.numel() - 1 + places)
    return torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage(), at, (1,), (1,))


def test_a_write_inside_and_one_outside_are_told_apart() -> None:
    inside, after, before = (Guarded.of(torch.ones(3, 4), CPU) for _ in range(3))
    inside.tensor[1, 2] = 7
    beyond(after.tensor, 1).fill_(0)
    beyond(before.tensor, -100).fill_(0)
    assert inside.broken() == (True, False)
    assert after.broken() == (False, True)
    assert before.broken() == (False, True)


def test_a_write_between_rows_is_seen() -> None:
    padded = Guarded.of(torch.ones(3, 4), CPU, "padded")
    gap = padded.tensor.storage_offset() + 5
    torch.empty(0).set_(padded.tensor.untyped_storage(), gap, (1,), (1,)).fill_(0)
    assert padded.broken() == (False, True)


LIKE = torch.ones(3, 4)
FACTORIES: dict[str, Callable[[], Tensor]] = {
    "empty": lambda: torch.empty(3, 4),
    "empty_like": lambda: torch.empty_like(LIKE),
    "new_empty": lambda: LIKE.new_empty(3, 4),
    "empty_strided": lambda: torch.empty_strided((3, 4), (1, 3)),
    "new_empty_strided": lambda: LIKE.new_empty_strided((3, 4), (4, 1)),
    "channels_last": lambda: torch.empty((1, 3, 4, 2), memory_format=torch.channels_last),
    "narrow": lambda: torch.empty(3, dtype=torch.bfloat16),
}


@pytest.mark.parametrize("name", FACTORIES)
def test_allocations_are_served_poisoned_and_guarded(name: str) -> None:
    wanted = FACTORIES[name]()
    with Allocations("zero", torch.device("cpu")):
        cleared = FACTORIES[name]()
    with Allocations("nan", torch.device("cpu")) as nan:
        made = FACTORIES[name]()
    assert nan.count == 1
    assert (made.shape, made.stride(), made.dtype) == (wanted.shape, wanted.stride(), wanted.dtype)
    assert made.isnan().all()
    assert (cleared == 0).all()
    assert nan.broken() == 0
    made.fill_(1)
    assert nan.broken() == 0
    beyond(made, 1).fill_(0)
    assert nan.broken() == 1


def test_zeros_stay_zeros_and_are_guarded() -> None:
    with Allocations("nan", torch.device("cpu")) as mode:
        made = [torch.zeros(3), torch.zeros_like(LIKE), LIKE.new_zeros(2)]
    assert mode.count == 3
    assert all((t == 0).all() for t in made)
    beyond(made[1], -1).fill_(0)
    assert mode.broken() == 1


def test_results_of_compiled_kernels_are_left_alone() -> None:
    with Allocations("nan", torch.device("cpu")) as mode:
        total = LIKE + LIKE
    assert mode.count == 0
    assert (total == 2).all()


def test_memory_is_shared_or_not() -> None:
    x = torch.ones(4, 4)
    assert share_memory(x, x[2:].t())
    assert not share_memory(x, x.clone())
    assert not share_memory(torch.ones(3, device="meta"), torch.ones(3, device="meta"))


DIRTY = """
import torch
from helios_conformance import guards

size = 1 << 13
for treatment in ("nan", "zero"):
    guards.dirty(torch.device("cpu"), [size] * 8, treatment)
    # Which free block comes first is the allocator's business. The first bytes of one belong to it.
    found = [torch.empty(size, dtype=torch.uint8) for _ in range(8)]
    print(sum(int(x[size // 2]) == (255 if treatment == "nan" else 0) for x in found))
"""


def test_dirty_memory_is_found_by_the_next_allocations() -> None:
    # In a process of its own: where other blocks of this size are free, the allocator may hand out some of those.
    done = subprocess.run([sys.executable, "-c", DIRTY], capture_output=True, text=True, check=True)
    dirty, zero = map(int, done.stdout.split())
    assert dirty >= 1
    assert zero >= 4  # what was dirty before is so no more
