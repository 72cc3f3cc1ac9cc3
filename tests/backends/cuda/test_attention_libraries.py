"""Each adapter against its library's signature: fakes have the parameters of the published functions, and no more."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

from helios_cuda import attention_libraries
from helios_cuda.attention_libraries import LIBRARIES, Device, Form, Library

H200 = Device("NVIDIA H200", (9, 0))
A100 = Device("NVIDIA A100", (8, 0))
B200 = Device("NVIDIA B200", (10, 0))
STAGE2 = Form(1, 11040, 11040, 40, 128, torch.bfloat16)
SCALE = 0.3


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    attention_libraries._function.cache_clear()
    yield
    attention_libraries._function.cache_clear()


def library(name: str) -> Library:
    return next(one for one in LIBRARIES if one.name == name)


def right(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale=scale)
    return out.transpose(1, 2)


# As in Dao-AILab/flash-attention: flash_attn/flash_attn_interface.py, hopper/flash_attn_interface.py and
# flash_attn/cute/interface.py.
def flash2(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    assert (dropout_p, causal, return_attn_probs) == (0.0, False, False)
    assert softmax_scale is not None
    return right(q, k, v, softmax_scale)


def flash3(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Any = None,
    q_descale: Any = None,
    k_descale: Any = None,
    v_descale: Any = None,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: Any = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Any:
    assert (causal, return_attn_probs) == (False, False)
    assert softmax_scale is not None
    return right(q, k, v, softmax_scale)


def flash3_before_2025_09(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None = None, **rest: Any) -> Any:
    return flash3(q, k, v, softmax_scale, **rest), q.new_zeros(1)


def flash4(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (None, None),
    learnable_sink: Any = None,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: Any = None,
    deterministic: bool = False,
    mask_mod: Any = None,
    full_block_cnt: Any = None,
    full_block_idx: Any = None,
    mask_block_cnt: Any = None,
    mask_block_idx: Any = None,
    block_size: Any = None,
    return_lse: bool = False,
) -> Any:
    assert (causal, return_lse) == (False, False)
    assert softmax_scale is not None
    return right(q, k, v, softmax_scale), None


PACKAGES: dict[str, tuple[str, str, Callable[..., Any]]] = {
    "flash2": ("flash_attn", "flash-attn", flash2),
    "flash3": ("flash_attn_interface", "flash-attn-3", flash3),
    "flash4": ("flash_attn.cute", "flash-attn-4", flash4),
}


def unknown(name: str) -> str:
    raise importlib.metadata.PackageNotFoundError(name)


def install(monkeypatch: pytest.MonkeyPatch, module: str, distribution: str, function: Callable[..., Any]) -> None:
    fake = types.ModuleType(module)
    vars(fake)["flash_attn_func"] = function
    if "." in module:
        parent = types.ModuleType(module.partition(".")[0])
        parent.__path__ = []
        monkeypatch.setitem(sys.modules, parent.__name__, parent)
    monkeypatch.setitem(sys.modules, module, fake)
    known = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "9.8.7" if name == distribution else known(name))


@pytest.mark.parametrize("name", PACKAGES)
def test_a_package_is_called_as_it_wants_to_be(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, distribution, function = PACKAGES[name]
    install(monkeypatch, module, distribution, function)
    q, k, v = (torch.randn(2, n, 3, 8) for n in (5, 7, 7))
    assert library(name).there(STAGE2, H200) is None
    assert torch.equal(library(name).run(q, k, v, SCALE), right(q, k, v, SCALE))
    assert library(name).version() == f"{distribution} 9.8.7"


def test_an_older_flash3_gives_a_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "flash_attn_interface", "flash-attn-3", flash3_before_2025_09)
    q, k, v = (torch.randn(1, 4, 2, 8) for _ in range(3))
    assert torch.equal(library("flash3").run(q, k, v, SCALE), right(q, k, v, SCALE))


@pytest.mark.parametrize("name", PACKAGES)
def test_a_package_that_is_not_installed_is_not_there(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    top = PACKAGES[name][0].partition(".")[0]
    monkeypatch.setitem(sys.modules, top, None)
    monkeypatch.setattr(importlib.metadata, "version", unknown)
    assert top in str(library(name).there(STAGE2, H200))
    with pytest.raises(ImportError):
        library(name).version()


def test_flash4_alone_is_no_flash2(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "flash_attn.cute", "flash-attn-4", flash4)
    assert library("flash4").there(STAGE2, H200) is None
    assert "has no attribute 'flash_attn_func'" in str(library("flash2").there(STAGE2, H200))


def test_a_package_that_breaks_on_import_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    (tmp_path / "flash_attn_interface.py").write_text("raise OSError('libcudart.so.12: cannot open\\nand more')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "flash_attn_interface", raising=False)
    assert library("flash3").there(STAGE2, H200) == "libcudart.so.12: cannot open"


@pytest.mark.parametrize(
    ("name", "device", "change", "reason"),
    [
        ("flash2", H200, {"dtype": torch.float32}, "no kernel for fp32"),
        ("flash2", H200, {"width": 12}, "head size 12: it takes multiples of 8 up to 256"),
        ("flash2", Device("NVIDIA T4", (7, 5)), {}, "no kernel for NVIDIA T4, sm_75"),
        ("flash3", A100, {}, "no kernel for NVIDIA A100, sm_80"),
        ("flash3", B200, {}, "no kernel for NVIDIA B200, sm_100"),
        ("flash4", A100, {}, "no kernel for NVIDIA A100, sm_80"),
        ("flash4", H200, {"width": 256}, "head size 256"),
        ("flash2", H200, {"queries": 1 << 20}, "2³¹ elements"),
    ],
)
def test_what_a_package_cannot_run(
    name: str, device: Device, change: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, *PACKAGES[name])
    assert reason in str(library(name).there(dataclasses.replace(STAGE2, **change), device))


@pytest.fixture
def cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)


@pytest.mark.usefixtures("cudnn")
@pytest.mark.parametrize(
    ("name", "device", "change", "reason"),
    [
        ("cudnn", H200, {}, None),
        ("cudnn", A100, {}, None),
        ("cudnn", H200, {"width": 256}, None),
        ("cudnn", A100, {"width": 256}, "up to 128"),
        ("cudnn", H200, {"keys": 1}, "single key"),
        ("cudnn", H200, {"width": 33}, "head size 33"),
        ("cudnn", H200, {"dtype": torch.float32}, "fp32"),
        ("cudnn", Device("cpu", (0, 0)), {}, "no kernel for cpu"),
        ("torch-flash", A100, {"width": 256}, None),
        ("torch-flash", A100, {"width": 264}, "up to 256"),
    ],
)
def test_what_torch_can_run(name: str, device: Device, change: dict[str, Any], reason: str | None) -> None:
    told = library(name).there(dataclasses.replace(STAGE2, **change), device)
    assert told is None if reason is None else reason in str(told)


def test_no_cudnn_an_old_one_and_determinism(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    assert library("cudnn").there(STAGE2, H200) == "torch has no cuDNN"
    assert library("torch-flash").there(STAGE2, H200) == "this torch is built without it"
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 8906)
    assert library("cudnn").there(STAGE2, H200) == "cuDNN 8906 is older than 9.0"
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert "deterministic" in str(library("cudnn").there(STAGE2, H200))


@pytest.mark.parametrize(
    ("name", "backend"), [("cudnn", SDPBackend.CUDNN_ATTENTION), ("torch-flash", SDPBackend.FLASH_ATTENTION)]
)
def test_torch_is_asked_for_one_backend_alone(name: str, backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    @contextlib.contextmanager
    def only(backends: Any, set_priority: bool = False) -> Iterator[None]:
        asked.append(backends)
        yield

    monkeypatch.setattr(attention_libraries, "sdpa_kernel", only)
    q, k, v = (torch.randn(2, n, 3, 8) for n in (5, 7, 7))
    assert torch.equal(library(name).run(q, k, v, SCALE), right(q, k, v, SCALE))
    assert asked == [[backend]]


def test_one_backend_alone_never_becomes_another() -> None:
    """Not even torch's own, where it has no kernel: it refuses."""
    q, k, v = (torch.randn(1, 4, 2, 8) for _ in range(3))
    with pytest.raises(RuntimeError, match=r"No available kernel|No viable backend"):
        library("cudnn").run(q, k, v, SCALE)


def test_versions_say_all_that_bits_depend_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)
    assert library("cudnn").version() == f"cuDNN 91900, torch {torch.__version__}"
    assert library("torch-flash").version() == f"torch {torch.__version__}"
    monkeypatch.setattr(torch.nn.attention, "current_flash_attention_impl", lambda: "FA4", raising=False)
    assert library("torch-flash").version() == f"torch {torch.__version__} with FA4"
    assert library("triton").version().startswith(f"triton {importlib.metadata.version('triton')}, helios-hal ")


def test_triton_is_there_for_everything_and_none_is_quantised() -> None:
    odd = Form(1, 1, 1, 1, 33, torch.float32)
    assert library("triton").there(odd, Device("cpu", (0, 0))) is None
    assert [one.name for one in LIBRARIES] == ["cudnn", "flash4", "flash3", "flash2", "torch-flash", "triton"]
