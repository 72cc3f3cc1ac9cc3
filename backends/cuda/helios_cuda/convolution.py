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

::

    settle(forms(plan), device, described)    # at compile time: measures every form that is new
    CHOICES.record                            # {"bf16 1x96x35x384x640 by …": {"variant": "triton_boxes", …}, …}
    CHOICES.replay(record, described)         # the same bits again, or a BackendError that says what is different

cuDNN chooses its algorithm by rules and not by a race, which might end otherwise next time, and then in other bits.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from helios.backend import Kernel
from helios.graph import Node
from helios.passes import Plan
from helios_cuda.choice import Choices, Clock, Variant, device_clock
from helios_cuda.kernels import conv_boxes
from helios_cuda.kernels.conv import conv3d
from helios_cuda.kernels.layouts import channels_last, rows, video
from helios_cuda.launch import name_of

__all__ = ["CHOICES", "KERNELS", "VARIANTS", "Filter", "Form", "forms", "settle"]

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
    """cuDNN without TF32, and the same algorithm every time."""
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


def _boxes_there(x: Tensor, w: Filter, stride: Triple, _padding: Triple) -> str:
    if not x.is_cuda or torch.cuda.get_device_capability(x.device) < (9, 0):
        return "no device that copies boxes"
    return conv_boxes.fits(channels_last(x), w.weight, stride)


def _boxes(x: Tensor, w: Filter, _stride: Triple, padding: Triple) -> Tensor:
    return conv_boxes.conv3d(x, w.weight, w.bias, padding)


def _cudnn_version() -> str:
    return f"cudnn {torch.backends.cudnn.version()}"


VARIANTS = (
    Variant("triton", _triton, version=lambda: f"triton {triton.__version__}"),
    Variant("triton_boxes", _boxes, _boxes_there, lambda: f"triton {triton.__version__}"),
    Variant("cudnn", _cudnn, _cudnn_there, _cudnn_version),
    Variant("cudnn_frames", _frames, _frames_there, _cudnn_version),
    Variant("cublas", _point, _point_there, lambda: f"torch {torch.__version__}"),
)
"""The first is ours, serves everywhere, and is what the others must agree with."""

CHOICES = Choices(VARIANTS)
"""Of this process: plans record and replay them."""

BOUND = {torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9, torch.float32: 2.0**-16}
"""How far a frame of a library's result may be from ours, relative, in the Euclidean norm: four roundings and more."""


@dataclasses.dataclass(frozen=True, slots=True)
class Form:
    """All that a choice depends on: shapes of x and weight, their dtype, whether there is a bias, the attributes."""

    x: tuple[int, ...]
    weight: tuple[int, ...]
    dtype: torch.dtype
    bias: bool
    stride: Triple
    padding: Triple

    @classmethod
    def of(cls, node: Node) -> Form:
        """That of a node ``conv3d``."""
        x, weight = node.values[:2]
        attrs: dict[str, Any] = node.attributes
        return cls(x.shape, weight.shape, x.dtype, len(node.values) > 2, attrs["stride"], attrs["padding"])

    def __str__(self) -> str:
        numbers = ("x".join(map(str, row)) for row in (self.x, self.weight, self.stride, self.padding))
        shape, weight, stride, padding = numbers
        return f"{name_of(self.dtype)} {shape} by {weight}{' + bias' * self.bias} step {stride} pad {padding}"

    def drawn(self, device: torch.device) -> tuple[Tensor, Filter, Triple, Triple]:
        """Operands with random numbers; x has channels last."""
        b, c, *size = self.x
        x = video(torch.randn(b, *size, c, device=device, dtype=self.dtype))
        scale = math.prod(self.weight[1:]) ** -0.5
        weight = torch.randn(self.weight, device=device, dtype=self.dtype) * scale
        bias = torch.randn(self.weight[0], device=device, dtype=self.dtype) if self.bias else None
        return x, Filter(weight, bias), self.stride, self.padding


def forms(plan: Plan) -> list[Form]:
    """The different convolutions of a plan."""
    nodes = (node for graph in plan.graphs.values() for node in graph.nodes if node.op == "conv3d")
    return list(dict.fromkeys(map(Form.of, nodes)))


def settle(wanted: Iterable[Form], device: torch.device, described: str, clock: Clock = device_clock) -> None:
    """Measure each form that nobody chose for, on a device that is a GPU; on any other nothing is measured.

    Args:
        device: where it will run.
        described: the device as plans name it.
        clock: see ``Clock``.
    """
    if device.type != "cuda":
        return
    with torch.no_grad(), torch.cuda.device(device):
        for form in wanted:
            if str(form) not in CHOICES.record:
                CHOICES.choose(str(form), functools.partial(form.drawn, device), clock, alike, described)
        torch.cuda.empty_cache()  # a decode shares the memory with the transformer


def alike(result: Tensor, wanted: Tensor) -> str:
    """How two results differ by more than roundings: frame by frame, so that a wrong part does not hide."""
    for i in range(wanted.shape[2]):
        one, other = result[:, :, i].float(), wanted[:, :, i].float()
        far = float((one - other).norm() / other.norm())
        if not far <= BOUND[wanted.dtype]:
            return f"frame {i} is wrong by {far:.2g} of its norm"
    return ""


def _prepare(_x: None, weight: Tensor, bias: Tensor | None, **_attrs: Any) -> Filter:
    return Filter(weight, bias)


def _run(w: Filter, x: Tensor, *, stride: Triple, padding: Triple) -> Tensor:
    form = Form(tuple(x.shape), tuple(w.weight.shape), x.dtype, w.bias is not None, stride, padding)
    out: Tensor = CHOICES.run(str(form), x, w, stride, padding)
    return out


KERNELS = {"conv3d": Kernel(_run, _prepare, ("weight", "bias"))}
