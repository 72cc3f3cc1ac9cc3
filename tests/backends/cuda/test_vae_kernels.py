"""Norms over channels in both layouts, layouts that survive, and rooms: padding that copies nothing."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helios import op
from helios.backend import select
from helios.lower import lower
from helios.model.config import VaeConfig
from helios.model.random_weights import RandomWeights
from helios.model.shapes import vae_shapes
from helios.model.vae_run import VaeRunner, decode_graphs
from helios.model.vae_split import Split
from helios_cuda import convolution
from helios_cuda.kernels import vae
from helios_cuda.kernels.layouts import by_words, channels_last, empty_as, is_last, rows, take_room, video, with_room
from helios_cuda.launch import recording

BF16, F32 = torch.bfloat16, torch.float32


def drawn(*shape: int, dtype: torch.dtype = F32, seed: int = 3) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def last(x: Tensor) -> Tensor:
    return video(rows(x).contiguous())


def run(name: str, *operands: Any, **attrs: Any) -> Tensor:
    out: Tensor = vae.KERNELS[name].run(*operands, **attrs)
    return out


def both(name: str, x: Tensor, **attrs: Any) -> None:
    """In both layouts the body's numbers, in the layout of the input."""
    wanted = op.get(name).fn(x, **attrs)
    for y in (x, last(x)):
        came = run(name, y, **attrs)
        assert torch.equal(came, wanted)
        assert is_last(came) == is_last(y)


@pytest.mark.parametrize("dtype", [BF16, F32], ids=["bf16", "fp32"])
def test_movements_keep_the_layout(dtype: torch.dtype) -> None:
    for channels in (12, 6):  # words of 8 bytes fit, or not
        x = drawn(2, channels, 3, 4, 5, dtype=dtype)
        both("upsample_nearest", x)
        both("interleave_frames", x)
        both("last_frames", x, count=2)
        both("pad_zero", x, before=(2, 0, 0), after=(0, 0, 0))
        both("pad_zero", x, before=(0, 1, 0), after=(0, 1, 1))
        both("pad_zero", x, before=(0, -1, 0), after=(0, 0, 1))
        for y in (x, last(x)):
            for dim in (2, 1, -1):
                came = run("concat", [y, y], dim=dim)
                assert torch.equal(came, torch.cat([x, x], dim))
                assert is_last(came) == is_last(y)


def test_last_frames_are_never_a_view() -> None:
    for x in (drawn(1, 4, 2, 3, 3), last(drawn(1, 4, 2, 3, 3))):
        assert run("last_frames", x, count=2).untyped_storage().data_ptr() != x.untyped_storage().data_ptr()


@pytest.mark.parametrize("name", ["channel_norm", "channel_norm_silu"])
def test_norms_of_any_strides(name: str) -> None:
    """Part of a video, in time and in rows and columns; in either layout; positions that have no common step."""
    gamma = drawn(33) * 0.1 + 1
    whole = drawn(2, 35, 5, 4, 6)
    for x in (whole[:, 1:34, 2:], last(whole)[:, 1:34, 1:4], whole[:, :33, :, 1:, 2:5], last(whole)[:, 2:, :, :, 1:2]):
        wanted = op.get(name).fn(x.double(), gamma.double(), eps=1e-12)
        came = run(name, x, gamma.repeat(2)[33:], eps=1e-12)
        assert torch.allclose(came.double(), wanted, rtol=1e-5, atol=1e-6)


def test_padding_of_a_norm_takes_its_room_and_copies_nothing() -> None:
    gamma = torch.ones(8)
    for x in (drawn(2, 8, 3, 4, 5), last(drawn(2, 8, 3, 4, 5))):
        y = run("channel_norm_silu", x, gamma, eps=1e-12)
        before = y.clone()
        padded = run("pad_zero", y, before=(2, 0, 0), after=(0, 0, 0))
        assert padded.untyped_storage().data_ptr() == y.untyped_storage().data_ptr()
        assert torch.equal(padded, F.pad(before, (0, 0, 0, 0, 2, 0)))
        assert torch.equal(y, before)
        assert is_last(padded) == is_last(x)
        again = run("pad_zero", y, before=(2, 0, 0), after=(0, 0, 0))
        assert torch.equal(again, padded)
        assert again.untyped_storage().data_ptr() != padded.untyped_storage().data_ptr()


def test_a_room_is_taken_once_and_only_by_the_tensor_that_has_it() -> None:
    gamma, past, other = torch.ones(8), drawn(2, 8, 2, 4, 5), drawn(2, 8, 2, 4, 5, seed=4)
    y = run("channel_norm_silu", drawn(2, 8, 3, 4, 5), gamma, eps=1e-12)
    part = y[:, :, 1:]
    assert take_room(part, 1) is None  # the frame before it is a number of y
    assert take_room(y, 3) is None
    one, two = run("concat", [past, y], dim=2), run("concat", [other, y], dim=2)
    assert torch.equal(one, torch.cat([past, y], 2))
    assert torch.equal(two, torch.cat([other, y], 2))
    narrow = with_room(y, 2)
    narrow.copy_(y)
    assert torch.equal(run("pad_zero", narrow, before=(1, 0, 0), after=(0, 0, 0))[:, :, 1:], y)


def test_words_only_where_memory_allows() -> None:
    x = torch.zeros(4, 16, dtype=BF16)
    assert by_words(x).dtype == torch.int64
    for odd in (x[:, 1:], x[:, ::2], x[:, :6], torch.zeros(4, 18, dtype=BF16)[:, :16], x.flatten()[2:34].view(2, 16)):
        assert by_words(odd) is odd
    assert empty_as(last(drawn(1, 4, 2, 3, 3)), (1, 2, 1, 1, 1)).stride(1) == 1


def test_a_decode_copies_for_layout_or_padding_only_where_it_must(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of two latents, then one: channels stay last from the first convolution to the video, caches included."""
    config = dataclasses.replace(VaeConfig(), base_dim=4, dim_mult=(1, 1, 1, 1), num_res_blocks=1)
    latents = drawn(1, config.z_dim, 3, 2, 3)
    wanted = decoded(config, "reference", latents)
    copies, rooms = [], []

    def convolved(x: Tensor, weight: Tensor, bias: Tensor, stride: Any, padding: Any) -> Tensor:
        copies.extend([] if channels_last(x) is x else [tuple(x.shape)])
        return last(F.conv3d(x, weight, bias, stride, padding))  # as the kernel does, which has its own tests

    def taken(x: Tensor, frames: int) -> Tensor | None:
        y = take_room(x, frames)
        rooms.append(y is not None)
        return y

    monkeypatch.setattr(convolution, "conv3d", convolved)
    monkeypatch.setattr(vae, "take_room", taken)
    came = decoded(config, "cuda:interpret", latents)
    assert float((came - wanted).norm() / wanted.norm()) < 1e-4
    assert is_last(came)
    assert copies == [(1, config.z_dim, 2, 2, 3), (1, config.z_dim, 1, 2, 3)]  # what the transformer made
    # Without a room: the first convolution and two over time alone, and the first group's single frame put in front.
    assert (rooms.count(True), rooms.count(False)) == (2 * 21, 2 * 3 + 2)


def decoded(config: VaeConfig, backend: str, latents: Tensor) -> Tensor:
    b, _, count, h, w = latents.shape
    factor, split = config.scale_factor_spatial, Split(2)
    sizes = {"batch": b, "latents": count, "height": h * factor, "width": w * factor}
    program = lower(decode_graphs(config, **sizes, dtype=F32, split=split), select(backend))
    program.load(RandomWeights(vae_shapes(config), seed=1))
    runner = VaeRunner(config, lambda g, x: program.run(g.name, x), dtype=F32, split=split)
    return torch.cat(list(runner.decode_groups(latents)), dim=2)


def test_real_sizes_are_one_pass() -> None:
    x = torch.empty(1, 33, 384, 640, 96, dtype=BF16, device="meta").permute(0, 4, 1, 2, 3)
    with recording() as launches:
        run("channel_norm_silu", x, torch.empty(96, dtype=BF16, device="meta"), eps=1e-12)
    (launch,) = launches
    assert launch.kernel is vae._LAST
    assert launch.grid == (33 * 384 * 640 * 128 // launch.constants["ELEMENTS"], 1)
