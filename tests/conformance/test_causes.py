"""Products beyond their budget on a CUDA device name the setting of torch that is to be looked at first."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from helios import op
from helios.backend import Backend, Kernel, ReferenceBackend
from helios_conformance import causes, diff, execute, suite
from helios_conformance.case import Observation
from helios_conformance.draws import Root, normal
from helios_conformance.mutants.mutant import backend_with
from helios_conformance.one_node import OneNode, types_of
from helios_conformance.references import committed
from helios_conformance.session import Session

ROOT = Root(3)
TF32 = "torch.backends.cuda.matmul.allow_tf32 = False"
SPLIT_K = "torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False"


@pytest.mark.parametrize(
    ("name", "dtype", "setting"),
    [
        ("linear", torch.float32, TF32),
        ("qkv_linear", torch.float32, TF32),
        ("conv3d", torch.float32, "torch.backends.cudnn.allow_tf32 = False"),
        ("linear_gelu", torch.bfloat16, SPLIT_K),
    ],
)
def test_what_is_named(name: str, dtype: torch.dtype, setting: str) -> None:
    told = causes.likely(name, dtype, "cuda")
    assert told.endswith(f"set {setting}")
    *path, flag = setting.removesuffix(" = False").removeprefix("torch.").split(".")
    holder: Any = torch
    for part in path:
        holder = getattr(holder, part)
    assert isinstance(getattr(holder, flag), bool), "torch has such a setting"


@pytest.mark.parametrize(
    ("name", "dtype", "device"),
    [
        ("linear", torch.float32, "cpu"),
        ("linear", torch.float64, "cuda"),
        ("conv3d", torch.bfloat16, "cuda"),
        ("rms_norm", torch.float32, "cuda"),
        ("", torch.float32, "cuda"),
    ],
)
def test_where_nothing_is_likelier_than_the_kernel(name: str, dtype: torch.dtype, device: str) -> None:
    assert causes.likely(name, dtype, device) == ""


def test_every_name_is_an_ops() -> None:
    assert set(op.names()) >= causes._PRODUCTS | causes._CONVOLUTIONS


def on(device: str) -> Session:
    """A session at work on such a device, as far as is asked here."""
    return cast(Session, SimpleNamespace(backend=SimpleNamespace(device=torch.device(device), label="x")))


def test_the_device_is_a_fact_where_it_is_not_the_host() -> None:
    seen = Observation(facts={"a": 1})
    assert execute._placed(seen, on("cpu")) == seen
    assert execute._placed(seen, on("cuda:1")).facts == {"a": 1, "device": "cuda"}


def narrow(x: torch.Tensor, weight: torch.Tensor, *rest: Any, **attrs: Any) -> Any:
    """A product of factors that lost their last bits."""
    return op.get("linear").fn(x.bfloat16().to(x.dtype), weight.bfloat16().to(x.dtype), *rest, **attrs)


def wrong(name: str, run: Any) -> Backend:
    backend = ReferenceBackend()
    return backend_with(backend, kernels={**backend.kernels, name: Kernel(run)})


@pytest.mark.parametrize(("device", "told"), [("cpu", False), ("cuda", True)])
def test_a_product_beyond_its_budget_says_so(device: str, told: bool) -> None:
    case = suite.find("linear[fp32,small]")
    seen = execute.observe(case, Session(wrong("linear", narrow), ROOT))
    assert "device" not in seen.facts, "of the host nothing is said"
    seen = dataclasses.replace(seen, facts={**seen.facts, "device": device})
    verdict = execute.judge(case, seen, ROOT, committed())
    assert verdict.state == "fail"
    assert (TF32 in verdict.reason) == told
    assert "is beyond" in verdict.reason


def test_a_right_product_says_nothing() -> None:
    case = suite.find("linear[fp32,small]")
    seen = execute.observe(case, Session(ReferenceBackend(), ROOT))
    seen = dataclasses.replace(seen, facts={**seen.facts, "device": "cuda", "inputs_unchanged": False})
    verdict = execute.judge(case, seen, ROOT, committed())
    assert verdict.state == "fail"
    assert "likely" not in verdict.reason, "its numbers are within their bounds"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_comparison_says_so_too(device: str) -> None:
    x, weight = (normal(ROOT.key(name), (64, 64), torch.float32) for name in "xw")
    (node,) = OneNode.of("linear", types_of([x[None], weight, None]), {}).graph.nodes
    values = dict(zip((v.name for v in node.values), (x[None], weight), strict=True))
    came = {node.outputs[0].name: narrow(x[None], weight)}
    found = diff._judge(node, values | came, on(device), "")
    assert found is not None
    assert (TF32 in found.note) == (device == "cuda")
    right = {node.outputs[0].name: op.get("linear").fn(x[None], weight)}
    assert diff._judge(node, values | right, on(device), "") is None
