"""The libraries that have an attention, each behind one small adapter; Triton's is ours and always there.

All take ``q`` ``[b, s, h, d]``, ``k`` and ``v`` ``[b, t, h, d]`` and the scale, and give ``[b, s, h, d]``. What an
adapter knows of its library, checked against its published sources:

* **cuDNN** through torch: 16-bit types, head sizes in eights up to 128 (256 on capability 9.0), more than one key, and
  torch keeps it off where deterministic algorithms are demanded. It was silently wrong before (on capability 10.0 with
  few heads of keys), which is one reason why nothing is chosen whose result was not looked at.
* **torch's FlashAttention** is version 2, unless another one was activated in torch; then the version says so.
* **FlashAttention 2, 3, 4** are three packages with one function name, and results that differ: version 2 and a recent
  3 give a tensor, an older 3 and version 4 also the logarithms of the sums. With version 4 alone ``flash_attn`` is a
  namespace without the function, so that finding the package is no proof of version 2.

None of them is a quantised one. Attention of e4m3 numbers belongs to a precision of its own, and no library here offers
it with a scale a row: ``QUANTISED`` is ours, and in no list to choose from. torch switches its backends for the whole
process, so two threads must not run attention at once.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.metadata
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from helios_cuda.launch import name_of

__all__ = ["E4M3", "LIBRARIES", "QUANTISED", "TRITON", "Device", "Form", "Library", "describe"]

E4M3 = torch.float8_e4m3fn
"""The dtype of forms whose operands are quantised, whatever they come in."""

Run = Callable[[Tensor, Tensor, Tensor, float], Tensor]
_SINCE_AMPERE = (8, 9, 10, 11, 12)


class Device(NamedTuple):
    """Where attention runs: what the vendor calls it, and its compute capability; (0, 0) for what is no GPU."""

    name: str
    capability: tuple[int, int]

    def __str__(self) -> str:
        major, minor = self.capability
        return f"{self.name}, sm_{major}{minor}" if major else self.name


def describe(device: torch.device) -> Device:
    """The device as plans record it."""
    if device.type != "cuda":
        return Device(device.type, (0, 0))
    return Device(torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device))


class _Typed(Protocol):
    @property
    def shape(self) -> Sequence[int]: ...
    @property
    def dtype(self) -> torch.dtype: ...


@dataclasses.dataclass(frozen=True, slots=True)
class Form:
    """All that decides which library is fastest: sizes and dtype, ``E4M3`` where operands are quantised."""

    batch: int
    queries: int
    keys: int
    heads: int
    width: int
    dtype: torch.dtype

    @staticmethod
    def of(q: _Typed, k: _Typed) -> Form:
        """Of operands ``[b, s, h, d]`` and ``[b, t, h, d]``: tensors, or values of a graph."""
        b, s, h, d = q.shape
        return Form(b, s, k.shape[1], h, d, q.dtype)

    def __str__(self) -> str:
        sizes = f"b={self.batch} s={self.queries} t={self.keys} h={self.heads} d={self.width}"
        return f"{name_of(self.dtype)} {sizes}"

    @property
    def numel(self) -> int:
        """Elements of the largest operand."""
        return self.batch * max(self.queries, self.keys) * self.heads * self.width

    @property
    def flops(self) -> int:
        """Of both products."""
        return 4 * self.batch * self.queries * self.keys * self.heads * self.width


@dataclasses.dataclass(frozen=True, slots=True)
class Library:
    """One way to compute attention.

    Args:
        name: in plans and on the command line.
        there: ``None`` where it can run a form on a device, else the reason why not.
        run: computes; ``(q, k, v, scale)``.
        version: of all that its bits depend on.
        aligned: whether it wants addresses and strides of whole 16 bytes; operands that are not are copied for it.
    """

    name: str
    there: Callable[[Form, Device], str | None]
    run: Run
    version: Callable[[], str]
    aligned: bool = True


def _sixteen_bits(form: Form, device: Device, widest: int, capabilities: Sequence[int]) -> str | None:
    """What all libraries have in common."""
    if device.capability[0] not in capabilities:
        return f"it has no kernel for {device}"
    if form.dtype not in (torch.bfloat16, torch.float16):
        return f"it has no kernel for {name_of(form.dtype)}"
    if form.width % 8 or form.width > widest:
        return f"head size {form.width}: it takes multiples of 8 up to {widest}"
    if form.numel >= 1 << 31:
        return "an operand has 2³¹ elements or more"
    return None


# --- torch's own ------------------------------------------------------------------------------------------------------


def _sdpa(backend: SDPBackend) -> Run:
    def run(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        with sdpa_kernel([backend]):
            out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale=scale)
        return out.transpose(1, 2)

    return run


def _cudnn_there(form: Form, device: Device) -> str | None:
    version = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    if version is None or version < 90000:
        return "torch has no cuDNN" if version is None else f"cuDNN {version} is older than 9.0"
    if torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled():
        return "torch keeps it off while deterministic algorithms are demanded"
    if form.keys < 2:
        return "it takes no single key"
    return _sixteen_bits(form, device, 256 if device.capability == (9, 0) else 128, _SINCE_AMPERE)


def _torch_flash_there(form: Form, device: Device) -> str | None:
    if not torch.backends.cuda.is_flash_attention_available():
        return "this torch is built without it"
    return _sixteen_bits(form, device, 256, _SINCE_AMPERE)


def _torch_flash_version() -> str:
    current = getattr(torch.nn.attention, "current_flash_attention_impl", lambda: None)()
    return f"torch {torch.__version__}" + (f" with {current}" if current else "")


# --- packages ---------------------------------------------------------------------------------------------------------


@functools.cache
def _function(module: str) -> Callable[..., Any] | str:
    """``flash_attn_func`` of a module, or why there is none."""
    try:
        found: Callable[..., Any] = importlib.import_module(module).flash_attn_func
    except Exception as error:  # whatever a broken build raises on import, there are other libraries
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    return found


def _package(name: str, module: str, distribution: str, widest: int, capabilities: Sequence[int]) -> Library:
    """A library whose ``module`` has ``flash_attn_func(q, k, v, softmax_scale=…, causal=…)``."""

    def there(form: Form, device: Device) -> str | None:
        reason = _sixteen_bits(form, device, widest, capabilities)  # first: an import takes seconds
        function = _function(module) if reason is None else None
        return function if isinstance(function, str) else reason

    def run(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        function = _function(module)
        assert callable(function)
        result = function(q, k, v, softmax_scale=scale, causal=False)
        out: Tensor = result[0] if isinstance(result, tuple) else result
        return out

    def version() -> str:
        try:
            return f"{distribution} {importlib.metadata.version(distribution)}"
        except importlib.metadata.PackageNotFoundError:
            told = getattr(importlib.import_module(module), "__version__", "of unknown version")
            return f"{distribution} {told}"

    return Library(name, there, run, version)


# --- ours -------------------------------------------------------------------------------------------------------------


def _triton(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    from helios_cuda.kernels.attention import flash  # here: importing the kernels needs Triton

    return flash(q, k, v, scale=scale)


def _triton_version() -> str:
    return f"triton {importlib.metadata.version('triton')}, helios-hal {importlib.metadata.version('helios-hal')}"


def _any_float(form: Form, device: Device) -> str | None:
    return f"it is not for {name_of(form.dtype)}" if form.dtype == E4M3 else None


def _quantised_there(form: Form, device: Device) -> str | None:
    if form.dtype != E4M3:
        return f"it rounds to e4m3, and {name_of(form.dtype)} is asked for"
    return None if device.capability >= (8, 9) else f"only GPUs from sm_89 on multiply e4m3 numbers, this is {device}"


def _quantised(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    from helios_cuda.kernels.scaled_attention import quantized  # here: importing the kernels needs Triton

    return quantized(q, k, v, scale=scale)


TRITON = Library("triton", _any_float, _triton, _triton_version, aligned=False)
QUANTISED = Library("triton e4m3", _quantised_there, _quantised, _triton_version, aligned=False)
"""Attention that quantises its operands. It is no choice for any other op."""

LIBRARIES: Sequence[Library] = (
    Library(
        "cudnn",
        _cudnn_there,
        _sdpa(SDPBackend.CUDNN_ATTENTION),
        lambda: f"cuDNN {torch.backends.cudnn.version()}, torch {torch.__version__}",
    ),
    _package("flash4", "flash_attn.cute", "flash-attn-4", 128, (9, 10, 11)),
    _package("flash3", "flash_attn_interface", "flash-attn-3", 256, (9,)),
    _package("flash2", "flash_attn", "flash-attn", 256, _SINCE_AMPERE),
    Library("torch-flash", _torch_flash_there, _sdpa(SDPBackend.FLASH_ATTENTION), _torch_flash_version),
    TRITON,
)
"""In the order in which they win a draw."""
