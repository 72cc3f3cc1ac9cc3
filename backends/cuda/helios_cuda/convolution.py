"""Convolutions of the VAE, by whichever right way is fastest: a kernel of ours, or cuDNN and cuBLASLt through torch.

What a way must keep is one rounding of the sum with its bias (``docs/conformance.md``). Judged by the suite's budget on
its own samples in bf16, statistic / bound, with the same sums as float32 on a CPU:

=====================================================  =======  ==========
way                                                    norm     misrounded
=====================================================  =======  ==========
bias after the rounding, as torch calls cuDNN          1.06     4.8
a sum of three 2-D convolutions, each rounded          1.23     7.4
bias as a channel of ones                              0.67     0.01
=====================================================  =======  ==========

So in 16 bits cuDNN gets x with eight more channels, of which the first is one and the others zero, and the bias as
their weights: a copy of x in each call, which is timed with it. In float32 the two roundings are far within the budget.
TF32 is off. cuDNN's 3-D convolution may be missing in 16 bits (torch leaves it out for some versions of cuDNN, which
were wrong on large inputs), and what then runs takes much memory; so another way lays the frames that a kernel sees
side by side as channels and convolves in 2-D, where cuDNN is at its best: again one rounding, and ``kt`` copies of x.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from helios.backend import Kernel
from helios_cuda.choice import CHOICES, Variant
from helios_cuda.kernels.conv import conv3d
from helios_cuda.kernels.layouts import channels_last, rows, video
from helios_cuda.launch import name_of

__all__ = ["KERNELS", "VARIANTS", "Filter"]

Triple = tuple[int, int, int]

ONES = 8
"""Channels that carry the bias: eight numbers of 16 bits are the 16 bytes that cuDNN wants rows aligned to."""


class Filter:
    """Weight ``[o, c, kt, kh, kw]``, dense with channels last, and bias ``[o]``; other forms are made when first asked.

    Args:
        weight, bias: as the op has them.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight = video(rows(weight).contiguous())
        self.bias = None if bias is None else bias.contiguous()
        self._forms: dict[str, Tensor] = {}

    def forget(self) -> None:
        """Drop other forms: those that only a measurement needed."""
        self._forms.clear()

    def extended(self, pad: Triple) -> Tensor:
        """The weight with ``ONES`` more channels in front of none: the bias where no padding reaches, else zero."""
        if "extended" not in self._forms:
            assert self.bias is not None
            more = self.weight.new_zeros(self.weight.shape[0], ONES, *self.weight.shape[2:])
            more[:, 0, pad[0], pad[1], pad[2]] = self.bias
            self._forms["extended"] = video(torch.cat([rows(self.weight), rows(more)], dim=-1))
        return self._forms["extended"]

    def flat(self, pad: Triple) -> Tensor:
        """``[o, kt·c (+ ONES), kh, kw]`` with channels last: frames beside each other."""
        if "flat" not in self._forms:
            o, c, kt, kh, kw = self.weight.shape
            taps = self.weight.permute(0, 3, 4, 2, 1).reshape(o, kh, kw, kt * c)
            if self.bias is not None:
                more = taps.new_zeros(o, kh, kw, ONES)
                more[:, pad[1], pad[2], 0] = self.bias
                taps = torch.cat([taps, more], dim=-1)
            self._forms["flat"] = taps.permute(0, 3, 1, 2)
        return self._forms["flat"]


def _exact() -> AbstractContextManager[None]:
    """cuDNN without TF32, and choosing its algorithm by rules and not by a race, which may end otherwise next time, and
    then in other last bits."""
    exact: AbstractContextManager[None] = torch.backends.cudnn.flags(
        enabled=True, benchmark=False, deterministic=True, allow_tf32=False
    )
    return exact


def _triton(x: Tensor, w: Filter, stride: Triple, padding: Triple) -> Tensor:
    return conv3d(x, w.weight, w.bias, stride, padding)


def _cudnn_there(x: Tensor, w: Filter, _stride: Triple, padding: Triple) -> str:
    if not x.is_cuda:
        return "no CUDA device"
    if not torch.backends.cudnn.is_available():
        return "torch has no cuDNN"
    if x.numel() >= 2**31 - x.numel() // x.shape[1] * ONES:
        return "more elements than 32 bits count"
    return _bias_fits(w, padding)


def _bias_fits(w: Filter, padding: Triple) -> str:
    """The bias rides on the tap at the padding's depth, which meets no padding unless that is half a kernel or more."""
    fits = all(2 * pad < kernel for pad, kernel in zip(padding, w.weight.shape[2:], strict=True))
    return "" if fits or w.bias is None else "more padding than half a kernel"


def _cudnn(x: Tensor, w: Filter, stride: Triple, padding: Triple) -> Tensor:
    x = channels_last(x)
    with _exact():
        if w.bias is None or x.dtype == torch.float32:
            return F.conv3d(x, w.weight, w.bias, stride=stride, padding=padding)
        b, c, t, h, width = x.shape
        longer = x.new_empty(b, t, h, width, c + ONES)
        longer[..., :c] = rows(x)
        _set_ones(longer)
        return F.conv3d(video(longer), w.extended(padding), stride=stride, padding=padding)


def _set_ones(longer: Tensor) -> None:
    longer[..., -ONES:] = 0.0
    longer[..., -ONES] = 1.0


def _frames_there(x: Tensor, w: Filter, stride: Triple, padding: Triple) -> str:
    if padding[0]:
        return "padding in time"
    kt = w.weight.shape[2]
    return _cudnn_there(x, w, stride, padding) or (
        "more elements than 32 bits count" if x.numel() * kt >= 2**31 else ""
    )


def _frames(x: Tensor, w: Filter, stride: Triple, padding: Triple) -> Tensor:
    """2-D, of the frames that a kernel sees side by side as channels."""
    b, c, t, h, width = x.shape
    kt = w.weight.shape[2]
    count = (t - kt) // stride[0] + 1
    ones = 0 if w.bias is None else ONES
    if kt == 1 and not ones:
        beside = rows(channels_last(x))[:, :: stride[0]]
    else:
        beside = x.new_empty(b, count, h, width, kt * c + ones)
        for i in range(kt):
            beside[..., i * c : (i + 1) * c] = rows(x)[:, i : i + (count - 1) * stride[0] + 1 : stride[0]]
        if ones:
            _set_ones(beside)
    with _exact():
        pictures = beside.flatten(0, 1).permute(0, 3, 1, 2)
        out = F.conv2d(pictures, w.flat(padding), stride=stride[1:], padding=padding[1:])
    return video(out.permute(0, 2, 3, 1).unflatten(0, (b, count)))


def _point_there(x: Tensor, w: Filter, stride: Triple, padding: Triple) -> str:
    if w.weight[0, 0].numel() > 1 or any(padding) or max(stride) > 1:
        return "not a product of rows"
    return "" if x.is_cuda else "no CUDA device"


def _point(x: Tensor, w: Filter, stride: Triple, padding: Triple) -> Tensor:
    """A kernel of one tap is a matrix product over positions."""
    wide = rows(x)
    matrix = w.weight.flatten(1).t()
    flat = wide.reshape(-1, wide.shape[-1])
    out = torch.mm(flat, matrix) if w.bias is None else torch.addmm(w.bias, flat, matrix)
    return video(out.view(*wide.shape[:-1], out.shape[1]))


VARIANTS = (
    Variant("triton", _triton),
    Variant("cudnn", _cudnn, _cudnn_there),
    Variant("cudnn_frames", _frames, _frames_there),
    Variant("cublas", _point, _point_there),
)


def _prepare(_x: None, weight: Tensor, bias: Tensor | None, **_attrs: Any) -> Filter:
    return Filter(weight, bias)


def _key(x: Tensor, w: Filter, stride: Triple, padding: Triple) -> str:
    parts = ("x".join(map(str, numbers)) for numbers in (x.shape, w.weight.shape, stride, padding))
    return f"conv3d {name_of(x.dtype)} " + " ".join(parts) + ("" if w.bias is None else " bias")


def _run(w: Filter, x: Tensor, *, stride: Triple, padding: Triple) -> Tensor:
    key = _key(x, w, stride, padding)
    fresh = not CHOICES.chosen(key)
    out: Tensor = CHOICES.run(key, VARIANTS, x, w, stride, padding)
    if fresh:
        w.forget()
    return out


KERNELS = {"conv3d": Kernel(_run, _prepare, ("weight", "bias"))}
