"""The part *kernels* as on a GPU, at the real shapes and without memory: what is listed, and that it can run."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import helios.backend
from helios import op
from helios_cuda import CudaBackend, tables
from helios_cuda.launch import recording

FOLDER = Path(__file__).resolve().parents[2] / "tools" / "gpu"
H100 = "NVIDIA H100 80GB HBM3"
pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True, scope="module")
def _on_path() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        yield


def script(name: str) -> ModuleType:
    return importlib.import_module(name)


@pytest.fixture(scope="module")
def rig() -> Any:
    """As on an H100, with operands on meta."""

    class Meta(script("rig").Rig):  # type: ignore[misc]
        cuda = True

    return Meta(torch.device("meta"), False, H100, 50 << 20)


@pytest.fixture(scope="module")
def forms(rig: Any) -> list[Any]:
    made = script("forms")
    graphs = dict(made.plan_nodes(False))
    graphs["decode fp32"] = made.plan_nodes(False, torch.float32)["decode"]
    for name in script("speeds").QUANTISED:
        graphs |= {f"{graph} {name}": nodes for graph, nodes in made.plan_nodes(False, name=name).items()}
    found: list[Any] = made.forms(graphs, "sm_90")
    return found


@pytest.fixture
def once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A timing is one call of each, and nothing is looked at that meta does not have."""
    timing = script("timing")

    def measure(calls: Any, *_: object) -> Any:
        for call in calls:
            call()
        return timing.Timing(1.0, 1.0, 1.0, 1)

    def same_shape(out: Tensor, ref: Tensor) -> float:
        assert out.shape == ref.shape
        return 0.0

    for name in ("speeds", "tuning"):
        monkeypatch.setattr(script(name), "measure", measure)
    monkeypatch.setattr(script("tuning"), "error_of", same_shape)
    monkeypatch.setattr(script("speeds"), "_finite", lambda _: True)
    monkeypatch.setattr(script("speeds"), "_settle", lambda *_: None)


@pytest.mark.usefixtures("once")
def test_every_form_of_a_chunk_can_be_timed(rig: Any, forms: list[Any], tmp_path: Path) -> None:
    speeds = script("speeds")
    rates = script("rates").of_device(H100, tmp_path)
    items = list(speeds.speeds(rig, CudaBackend(), forms, rates))
    assert len({item.id for item in items}) == len(items) == len(forms)
    records = []
    with tables.assumed("sm_90"), recording() as launched:
        for item in items:
            records.append(item.record("measured", **item.run()))
    assert len(launched) > 100
    assert all(r["floor_ms"] > 0 for r in records)
    graphs = script("forms").plan_nodes(False)
    whole = sum(count * op.cost(node).flops for name, count in speeds.STEPS.items() for node in graphs[name].nodes)
    assert sum(r["a_chunk"] * r["flops"] for r in records) == whole
    for name in speeds.QUANTISED:
        graphs = script("forms").plan_nodes(False, name=name)
        whole = sum(n * op.cost(node).flops for g, n in speeds.STEPS.items() if g in graphs for node in graphs[g].nodes)
        rest = [r for r in records if "decode" not in r["counts"]]
        assert sum(speeds.times(r["counts"], name) * r["flops"] for r in rest) == whole
    table = list(speeds.report([{**r, "ms_median": 2 * r["floor_ms"]} for r in records]))
    assert [line.split(":")[0] for line in table[-5:]] == [
        *("a chunk, decoded in bf16", "   of which decoding", "decoding in fp32"),
        *(f"a chunk in {name}, decoded in bf16" for name in speeds.QUANTISED),
    ]
    assert table[2].startswith("attention 1×11040×40×128 1×11040×40×128 bfloat16")
    at = table.index(next(line for line in table if line.startswith("-- ops that fp8-attention has beside")))
    assert at == speeds.ROWS + 2
    assert table[at + 2].startswith("quantized_attention 1×11040×40×128 1×11040×40×128 bfloat16")


def test_quantised_ops_have_the_floor_of_what_they_hold_and_multiply(forms: list[Any], tmp_path: Path) -> None:
    rates = script("rates").of_device(H100, tmp_path)
    sheet = rates.flops["products", "bfloat16"]
    by_op: dict[str, Any] = {}
    for form in sorted(forms, key=lambda form: form.moved):
        by_op[form.node.op] = form  # the largest
    # adaln_quantize would stand in the first block alone, which stays in bf16.
    fused = {"gated_add_adaln_quantize", "gelu_quantize", "layer_norm_quantize", "quantize_rows"}
    assert fused | {"packed_linear", "quantized_attention", "quantized_linear", "quantized_qkv_linear"} <= set(by_op)
    up = by_op["quantized_qkv_linear"]
    assert up.moved == 11040 * (5120 + 4) + 3 * 5120 * (5120 + 4 + 2) + 2 * 3 * 11040 * 5120
    busy = 1e3 * up.flops / (2 * sheet)
    assert rates.floor(up.node.op, up.dtype, up.flops, up.moved) == pytest.approx(busy)
    packed = next(form for form in forms if form.node.op == "packed_linear")
    assert rates.floor(packed.node.op, packed.dtype, 10**15, 0) == pytest.approx(1e3 * 10**15 / sheet)
    assert by_op["gelu_quantize"].moved == 11040 * (3 * 13824 + 4)
    assert by_op["gated_add_adaln_quantize"].moved >= 11040 * (7 * 5120 + 4)
    assert by_op["quantize_rows"].moved == 11040 * (3 * 5120 + 4)


def test_quantised_operands_are_made_finite_with_positive_scales(forms: list[Any]) -> None:
    form = next(f for f in forms if f.node.op == "quantized_linear" and f.operands[0].shape[1] == 540)
    x, scale, weight, _ = form.made(torch.device("cpu"))
    assert x.dtype == torch.float8_e4m3fn
    assert 100 < float(x.float().abs().max()) <= 448
    assert bool((scale > 0).all())
    assert float(weight.float().std()) < 1


def test_forms_are_found_without_what_was_chosen_before(forms: list[Any]) -> None:
    """A library that a GPU chose could not run without memory; and nothing is recorded in its place."""
    from helios_cuda import scaled

    made = script("forms")
    form = next(f for f in forms if f.node.op == "quantized_linear")
    key = str(scaled.Form.of(form.node))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scaled.CHOICES, "record", {key: {"variant": "torch"}})
        assert [launch.kernel.name for launch in made.launches(form, made.plain_kernels()[form.node.op], "sm_90")]
        assert scaled.CHOICES.record == {key: {"variant": "torch"}}


@pytest.mark.usefixtures("once")
def test_every_candidate_of_every_kernel_can_be_tried(rig: Any, forms: list[Any]) -> None:
    tuning = script("tuning")
    jobs = tuning.jobs(forms, "sm_90")
    items = list(tuning.items(rig, jobs))
    assert len({item.id for item in items}) == len(items)
    records = []
    with tables.assumed("sm_90"), recording() as launched:
        for item in items:
            before = len(launched)
            records.append(item.record("measured", **item.run()))
            last = launched[-1]
            assert len(launched) > before
            assert (last.kernel.name, last.key) == (records[-1]["kernel"], records[-1]["key"])
            assert tuning.told(last.tile) == records[-1]["tile"]
    tried = {r["kernel"] for r in records}
    assert {"attention", "residual_norm", "qk_rope", "conv3d_broad", "conv3d_boxes_broad"} <= tried
    assert {"norm_quantize", "quantize", "residual_norm_quantize", "scaled_linear"} <= tried
    made = tuning.table(records, "a test")
    assert {(kernel, key) for kernel, rows in made.items() for key in rows} == {(j.kernel.name, j.key) for j in jobs}


def test_what_is_listed_on_a_gpu_is_named_once_and_in_the_order_of_value(
    rig: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = script("part_kernels")
    monkeypatch.setattr(helios.backend, "select", lambda _: CudaBackend())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    options = script("running").parser("kernels", "")
    options.add_argument("--tune", action="store_true")
    results = script("results").Results(tmp_path / "kernels.jsonl", {})
    for tune in ([], ["--tune"]):
        args = options.parse_args(["--out", str(tmp_path), *tune])
        names = [item.id for item in part._items(rig, args, results)]
        assert len(names) == len(set(names))
        groups = list(dict.fromkeys("/".join(name.split("/")[: 2 if name[:5] == "suite" else 1]) for name in names))
        quantised = ["suite/fp8-attention quick", "suite/fp8-weights quick"]
        suite = ["suite/bf16 quick", "execution", *quantised, "choice", "speed"]
        full = [f"suite/{precision} full" for precision in ("bf16", "fp8-attention", "fp8-weights", "fp32")]
        rest = ["suite/fp32 quick", *full]
        assert groups == (["tune", *suite, *rest] if tune else [*suite, "tune", *rest])
