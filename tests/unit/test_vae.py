"""The VAE's ops, how its work is cut, and what it says to bad input."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from helios import op
from helios.backend import ReferenceBackend
from helios.errors import BackendError, InputError
from helios.graph import Graph, Rate
from helios.lower import lower
from helios.model.config import VaeConfig
from helios.model.vae import decode_graph, encode_graph, frames_of, latents_of
from helios.model.vae_run import VaeRunner, decode_graphs, encode_graphs
from helios.model.vae_split import Split, Tile, choose_group, choose_split, live_bytes, peak_bytes
from helios.ops import conv

SMALL = VaeConfig(base_dim=8)
SIZE: dict[str, Any] = {"batch": 1, "height": 16, "width": 24, "dtype": torch.float32}


def random(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(0))


# Ops.


def test_channel_norm_has_root_mean_square_one_over_channels() -> None:
    y = conv.channel_norm(random(2, 5, 2, 3, 4) * 7, torch.ones(5, dtype=torch.float64))
    torch.testing.assert_close(y.square().mean(1), torch.ones(2, 2, 3, 4, dtype=torch.float64))


def test_channel_norm_of_zeros_is_zero() -> None:
    assert not conv.channel_norm(torch.zeros(1, 3, 1, 2, 2), torch.ones(3)).any()


def test_channel_norm_takes_its_statistics_in_float32() -> None:
    x = random(1, 384, 1, 4, 4).bfloat16()
    exact = conv.channel_norm(x.double(), torch.ones(384, dtype=torch.float64))
    once = exact.bfloat16()  # rounded once
    assert (conv.channel_norm(x, torch.ones(384, dtype=torch.bfloat16)) != once).double().mean() < 0.001


def test_upsample_is_nearest() -> None:
    x = random(2, 3, 2, 3, 4)
    assert torch.equal(conv.upsample_nearest(x), F.interpolate(x, scale_factor=(1, 2, 2), mode="nearest-exact"))


def test_interleaved_frames_alternate_between_halves_of_the_channels() -> None:
    x = random(2, 6, 3, 2, 2)
    y = conv.interleave_frames(x)
    assert torch.equal(y[:, :, 0::2], x[:, :3])
    assert torch.equal(y[:, :, 1::2], x[:, 3:])


def test_last_frames_keeps_nothing_else_in_memory() -> None:
    x = random(1, 2, 9, 3, 3)
    y = conv.last_frames(x, count=2)
    assert torch.equal(y, x[:, :, 7:])
    assert y.untyped_storage().nbytes() == y.nbytes


def test_padding_sides() -> None:
    x = torch.ones(1, 1, 2, 2, 2)
    y = conv.pad_zero(x, before=(2, 0, 0), after=(0, 1, 3))
    assert y.shape == (1, 1, 4, 3, 5)
    assert torch.equal(y[:, :, 2:, :2, :2], x)
    assert y.sum() == x.sum()


def test_normalisation_is_undone() -> None:
    stats = {"mean": SMALL.latents_mean, "std": SMALL.latents_std}
    latents = random(1, 16, 2, 2, 2)
    moments = torch.cat((conv.denormalize_latents(latents, **stats), random(1, 16, 2, 2, 2)), dim=1)
    torch.testing.assert_close(conv.sample_posterior(moments, **stats), latents)


@pytest.mark.parametrize("which", ["conv3d", "channel_norm", "channel_norm_silu", "sample_posterior"])
def test_gradients(which: str) -> None:
    record = op.get(which)
    sample = record.samples()[0]
    inputs = [x if x is None else x.requires_grad_() for x in sample.make(torch.float64)]
    assert torch.autograd.gradcheck(lambda *xs: record.fn(*xs, **sample.attrs), inputs, fast_mode=True)


# Graphs.


def test_whole_groups_and_single_frames_have_no_caches() -> None:
    graph = decode_graph(SMALL, latents=3, caches=False, **SIZE)
    assert [name for name, _ in graph.outputs] == ["video"]
    assert [v.name for v in graph.inputs_at(Rate.STEP)] == ["latents"]


@pytest.mark.parametrize("latents", [1, 2])
@pytest.mark.parametrize("half", ["decode", "encode"])
def test_caches_fit_from_group_to_group(half: str, latents: int) -> None:
    def caches(first: bool) -> tuple[dict[str, Any], dict[str, Any]]:
        if half == "decode":
            graph = decode_graph(SMALL, latents=latents, first=first, **SIZE)
        else:
            graph = encode_graph(SMALL, frames=frames_of(SMALL, latents, first=first), first=first, **SIZE)
        op.verify(graph)
        return (
            {v.name: v.type for v in graph.inputs if v.name.startswith("cache.")},
            {name: v.type for name, v in graph.outputs if name.startswith("cache.")},
        )

    (none, given), (taken, passed_on) = caches(True), caches(False)
    assert not none
    assert given == taken == passed_on
    assert len(given) > 20


def test_bfloat16_keeps_latents_wide_and_weights_narrow() -> None:
    graph = decode_graph(SMALL, latents=1, **SIZE | {"dtype": torch.bfloat16})
    dtypes = {v.name: v.dtype for v in graph.inputs}
    assert dtypes.pop("latents") == torch.float32
    assert set(dtypes.values()) == {torch.bfloat16}


def test_weights_are_reshaped_once_at_load() -> None:
    """Published weights of convolutions in two dimensions get a third, once: it is no affair of a step."""
    graph = decode_graph(SMALL, latents=2, **SIZE)
    for node in graph.nodes:
        if any(v.rate == Rate.WEIGHTS for v in node.outputs):
            assert node.op in ("reshape", "full")


# Splits and memory.


class _Allocations(TorchDispatchMode):
    """Bytes of tensors alive beyond the given ones, and their peak."""

    def __init__(self, given: Iterable[Tensor]) -> None:
        super().__init__()
        self._known = {tensor.untyped_storage()._cdata for tensor in given}
        self._live = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._known:
            self._known.add(key)
            self._live += storage.nbytes()
            self.peak = max(self.peak, self._live)
            weakref.finalize(storage, self._forget, key, storage.nbytes())

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._live -= size


def _run(graph: Graph, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Node after node, each value freed after its last use."""
    last = {v.name: i for i, node in enumerate(graph.nodes) for v in (*node.values, *node.outputs)}
    kept = {v.name for _, v in graph.outputs} | set(inputs)
    values = dict(inputs)
    for i, node in enumerate(graph.nodes):
        results = op.get(node.op)(*(_fetch(values, x) for x in node.inputs), **node.attributes)
        results = results if isinstance(results, tuple) else (results,)
        values |= {v.name: r for v, r in zip(node.outputs, results, strict=True)}
        del results
        for name in {v.name for v in (*node.values, *node.outputs)} - kept:
            if last[name] == i:
                del values[name]
    return {name: values[v.name] for name, v in graph.outputs}


def _fetch(values: Mapping[str, Tensor], operand: Any) -> Any:
    if operand is None:
        return None
    return [values[v.name] for v in operand] if isinstance(operand, tuple) else values[operand.name]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("latents", "first"), [(1, True), (2, False), (5, True)])
@pytest.mark.parametrize("half", ["decode", "encode"])
def test_predicted_memory_is_measured_memory(half: str, latents: int, first: bool, dtype: torch.dtype) -> None:
    size: dict[str, Any] = {"batch": 1, "height": 48, "width": 64, "dtype": dtype, "first": first, "caches": not first}
    if half == "decode":
        graph = decode_graph(SMALL, latents=latents, **size)
    else:
        graph = encode_graph(SMALL, frames=frames_of(SMALL, latents, first=first), **size)
    inputs = {v.name: (random(*v.shape) * 0.05).to(v.dtype) for v in graph.inputs}
    held = sum(v.type.nbytes for v in graph.inputs_at(Rate.STEP))
    with torch.no_grad(), _Allocations(inputs.values()) as allocations:
        _run(graph, inputs)
    assert allocations.peak + held == pytest.approx(live_bytes(graph), rel=0.05)


def test_spans_cover_the_side_as_published() -> None:
    assert Tile().spans(640, 8) == [(0, 32), (24, 56), (48, 80), (72, 80)]
    assert Tile(32, 32).spans(64, 8) == [(0, 4), (4, 8)]


def test_groups() -> None:
    assert list(Split(4).groups(9)) == [(0, 4), (4, 8), (8, 9)]
    assert list(Split(9).groups(9)) == [(0, 9)]


PUBLISHED: dict[str, Any] = {"latents": 9, "height": 384, "width": 640, "dtype": torch.float32}


def _needs(group: int) -> int:
    whole = group == 9
    return peak_bytes(VaeConfig(), **PUBLISHED | {"latents": group}, first=whole, caches=not whole)


@pytest.mark.parametrize("group", [1, 3, 9])
def test_the_chosen_group_is_the_largest_that_fits(group: int) -> None:
    need = _needs(group)
    assert choose_group(VaeConfig(), **PUBLISHED, budget_bytes=need) == group
    assert choose_group(VaeConfig(), **PUBLISHED, budget_bytes=need - 1) < group


def test_tensors_stay_within_32_bit_indices() -> None:
    size = PUBLISHED | {"height": 480, "width": 832}
    group = choose_group(VaeConfig(), **size, budget_bytes=2**60)
    assert group < 9  # one pass would hold 192 × 33 × 480 × 832 = 2.5e9 elements in one tensor
    graph = decode_graph(VaeConfig(), **size | {"latents": group}, batch=1, first=False)
    assert max(o.type.numel for node in graph.nodes for o in node.outputs) < 2**31


def test_tiles_only_where_whole_frames_do_not_fit() -> None:
    assert choose_split(VaeConfig(), **PUBLISHED, budget_bytes=_needs(9)) == Split(9)
    assert choose_split(VaeConfig(), **PUBLISHED, budget_bytes=_needs(1) - 1).tile == Tile()
    with pytest.raises(InputError, match=r"MiB for one latent of a 256×256 tile, but 1 MiB are left"):
        choose_split(VaeConfig(), **PUBLISHED, budget_bytes=2**20)


# Running a program.


class _Weights:
    def __init__(self, graphs: Mapping[str, Graph], dtype: torch.dtype) -> None:
        inputs = {v.name: v for graph in graphs.values() for v in graph.inputs_at(Rate.WEIGHTS)}
        self.tensors = {name: (random(*v.shape) * 0.1).to(dtype) for name, v in inputs.items()}

    def read(self, name: str) -> Tensor:
        return self.tensors[name]


def _runner(split: Split, latents: int, dtype: torch.dtype) -> VaeRunner:
    size: dict[str, Any] = {"batch": 1, "height": 16, "width": 24, "dtype": dtype, "split": split}
    graphs = decode_graphs(SMALL, latents=latents, **size)
    graphs |= encode_graphs(SMALL, frames=frames_of(SMALL, latents), **size)
    program = lower(graphs, ReferenceBackend("cpu"))
    program.load(_Weights(graphs, dtype))
    return VaeRunner(SMALL, lambda graph, inputs: program.run(graph.name, inputs), dtype=dtype, split=split)


@pytest.mark.parametrize("group", [1, 2, 4])
def test_a_program_gives_the_same_in_groups_and_in_one_pass(group: int) -> None:
    latents, video = random(1, 16, 5, 2, 3), random(1, 3, 17, 16, 24).clamp(-1, 1)
    whole, parts = (_runner(Split(g), 5, torch.float64) for g in (5, group))
    torch.testing.assert_close(parts.decode(latents), whole.decode(latents), rtol=0, atol=1e-12)
    torch.testing.assert_close(parts.encode(video), whole.encode(video), rtol=0, atol=1e-12)
    assert torch.equal(torch.cat(list(parts.decode_groups(latents)), dim=2), parts.decode(latents))


def test_bfloat16_through_a_program() -> None:
    run = _runner(Split(2), 3, torch.bfloat16)
    video = run.decode(random(1, 16, 3, 2, 3, dtype=torch.float32))
    assert (video.dtype, tuple(video.shape)) == (torch.bfloat16, (1, 3, 9, 16, 24))
    assert video.abs().max() <= 1
    latents = run.encode(video)
    assert (latents.dtype, tuple(latents.shape)) == (torch.float32, (1, 16, 3, 2, 3))


# Bad input.


@pytest.mark.parametrize(
    ("frames", "first", "fix"), [(0, True, 1), (2, True, 1), (34, True, 33), (5, False, 4), (3, False, 4)]
)
def test_frames_that_do_not_fill_a_latent(frames: int, first: bool, fix: int) -> None:
    with pytest.raises(InputError, match=f"cannot take {frames} frames") as caught:
        latents_of(SMALL, frames, first=first)
    assert caught.value.fix == f"pass {fix} frames"


@pytest.mark.parametrize(("height", "width", "fix"), [(20, 16, "use 16×16"), (4, 16, "use 8×16"), (0, 8, "use 8×8")])
def test_sizes_that_are_no_multiple(height: int, width: int, fix: str) -> None:
    with pytest.raises(InputError, match="not a multiple of 8") as caught:
        decode_graph(SMALL, latents=1, **SIZE | {"height": height, "width": width})
    assert caught.value.fix == fix
    with pytest.raises(InputError, match="not a multiple of 8"):
        encode_graph(SMALL, frames=1, **SIZE | {"height": height, "width": width})


def test_wrong_tensors() -> None:
    run = _runner(Split(2), 2, torch.float32)
    with pytest.raises(InputError, match=r"latents \[1, 4, 2, 2, 3\]: wanted \[batch, 16,"):
        run.decode(torch.zeros(1, 4, 2, 2, 3))
    with pytest.raises(InputError, match=r"video \[3, 5, 16, 24\]"):
        run.encode(torch.zeros(3, 5, 16, 24))
    with pytest.raises(InputError, match="none of them 0"):
        run.decode(torch.zeros(1, 16, 0, 2, 3))


@pytest.mark.parametrize(("count", "frames"), [(3, 7), (5, 11)])
def test_groups_that_come_short_or_long_are_told(count: int, frames: int) -> None:
    right = _runner(Split(1), 3, torch.float32)

    def run(graph: Graph, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        out = right.run(graph, dict(inputs))
        video = out["video"]
        return {**out, "video": video if video.shape[2] == 1 else video[:, :, :1].expand(-1, -1, count, -1, -1)}

    with pytest.raises(BackendError, match=f"gave {frames} frames in all, wanted 9"):
        VaeRunner(SMALL, run, dtype=torch.float32, split=Split(1)).decode(torch.zeros(1, 16, 3, 2, 3))


def test_wrong_splits() -> None:
    with pytest.raises(InputError, match="at least 1"):
        Split(0)
    with pytest.raises(InputError, match="0 < stride ≤ size"):
        Tile(32, 40)
    with pytest.raises(InputError, match="wanted multiples of 8 pixels"):
        dataclasses.replace(Split(1), tile=Tile(36, 24)).require(SMALL)
