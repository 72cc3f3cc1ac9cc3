"""``tools/on_gpu.sh ceilings`` end to end on the CPU, and each of its measurements at its real shape without memory."""

from __future__ import annotations

import doctest
import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "tools" / "gpu"
TINY = ["--device", "cpu", "--tiny"]


@pytest.fixture(autouse=True)
def _on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scripts import each other by name, as they do when one of them is run."""
    monkeypatch.syspath_prepend(str(FOLDER))


def script(name: str) -> ModuleType:
    return importlib.import_module(name)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "ceilings.jsonl").read_text().splitlines()]


def records(folder: Path) -> dict[str, dict[str, Any]]:
    return {entry["id"]: entry for entry in lines(folder) if "id" in entry}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """One run by the shell script: its folder and what it printed."""
    out = tmp_path_factory.mktemp("ceilings")
    environment = {**os.environ, "PYTHON": sys.executable, "OUT": str(out), "HELIOS_COMMIT": "abc123"}
    run = subprocess.run(
        ["bash", str(ROOT / "tools" / "on_gpu.sh"), "ceilings", *TINY],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        cwd=out,
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    return out, run.stdout


def test_a_run_measures_and_says_what_is_not_there(whole: tuple[Path, str]) -> None:
    found = records(whole[0])
    for group in ("facts", "copy", "gemm", "sustained", "attention", "vae", "bus", "launch", "elementwise"):
        assert any(id_.startswith(f"{group}/") for id_ in found), group
    status = {id_: record["status"] for id_, record in found.items()}
    assert set(status.values()) == {"measured", "not there"}
    assert all(record["why"].startswith("not there: ") for record in found.values() if record["status"] == "not there")
    computed = [r for r in found.values() if r["status"] == "measured" and r.get("tflops")]
    assert len(computed) > 40
    for record in computed:
        assert 0 < record["ms_min"] <= record["ms_median"] <= record["ms_max"]
        assert record["tflops"] == pytest.approx(record["flops"] / record["ms_median"] / 1e9)
        assert record["shape"]
        assert record["dtype"]
        assert record["n"] >= 1
    checked = [record for record in found.values() if "error" in record]
    assert {id_.split("/")[0] for id_ in (r["id"] for r in checked)} >= {
        "copy",
        "gemm",
        "attention",
        "vae",
        "elementwise",
    }
    assert all(record["correct"] and record["error"] < 1e-2 for record in checked)


def test_the_header_says_what_it_was_measured_on(whole: tuple[Path, str]) -> None:
    header = lines(whole[0])[0]["header"]
    assert header["commit"] == "abc123"
    assert header["torch"] == torch.__version__
    assert header["packages"]["torch"] == torch.__version__
    assert header["device"].startswith("cpu")
    assert header["tiny"] is True


def test_the_tables_come_last_and_are_kept(whole: tuple[Path, str]) -> None:
    out, printed = whole
    kept = (out / "tables.txt").read_text()
    assert printed.endswith(kept)
    for title in ("products with bias, TFLOP/s", "attention, TFLOP/s", "totals:", "VAE, conv3d last bf16"):
        assert title in kept
    assert len(kept) < 12_000
    assert (out / "environment.txt").read_text().startswith("commit ")
    assert len(list(out.iterdir())) <= 3  # five parts have to stay within eight files


def test_a_second_run_goes_on_where_the_first_ended(
    whole: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = records(whole[0])
    assert script("part_ceilings").main([*TINY, "--out", str(whole[0])]) == 0
    entries = lines(whole[0])
    second = entries[max(i for i, entry in enumerate(entries) if "header" in entry) :]
    again = {entry["id"] for entry in second if "id" in entry}
    assert again == {id_ for id_, record in before.items() if record["status"] == "not there"}
    after = records(whole[0])
    assert all(after[id_] == record for id_, record in before.items() if record["status"] == "measured")
    assert "-- attention, TFLOP/s" in capsys.readouterr().out


def test_what_there_is_no_time_for_is_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert script("part_ceilings").main([*TINY, "--out", str(tmp_path), "--budget", "0"]) == 0
    found = records(tmp_path)
    assert len(found) > 100
    assert {record["why"] for record in found.values()} == {"not measured: out of time"}
    assert not any("start" in entry for entry in lines(tmp_path))
    assert f"not measured: out of time: {len(found)}, from facts/device on" in capsys.readouterr().out


def real_items(rig: Any) -> list[Any]:
    return list(script("part_ceilings").items(rig))


def test_at_real_shapes_every_measurement_is_named_once_and_the_decoder_is_complete() -> None:
    from helios.fit.costs import vae_flops

    shapes = script("shapes")
    rig = script("rig").Rig(torch.device("cuda", 0), False, "NVIDIA H100 80GB HBM3", 50 * 2**20)
    names = [item.id for item in real_items(rig)]
    assert len(names) == len(set(names))
    titles = script("part_ceilings").TITLES
    assert {name.split("/")[0] for name in names} == {*titles, "facts"}
    convolutions = shapes.convolutions(False)
    assert sum(conv.count for conv in convolutions) == 37
    flops = sum(conv.flops * conv.count for conv in convolutions)
    assert 0.99 < flops / vae_flops(shapes.setting(False)) < 1  # the rest is the attention in the middle


def test_real_shapes_are_those_of_the_model() -> None:
    shapes = script("shapes")
    lengths = {(a.stage, a.q, a.k): a.count for a in shapes.attentions(False)}
    assert lengths["stage2", 11040, 11040] == 39
    assert lengths["stage2", 8640, 11040] == 1  # the last block's history rows are read by nobody
    assert lengths["stage0", 540, 512] == 40
    products = {p.row: p for p in shapes.products(False)}
    assert {p.m for p in products.values()} == {2940, 4560, 11040, 540, 2160, 8640}
    assert {(p.k, p.n) for p in products.values()} == {(5120, 5120), (5120, 13824), (13824, 5120), (5120, 15360)}
    assert [p.gelu for p in (products["11040×5120→13824"], products["11040×13824→5120"])] == [True, False]
    attention = sum(a.flops * a.count for a in shapes.attentions(False) if a.stage == "stage2")
    assert attention == pytest.approx(103.469e12, rel=0.01)  # published; the dead rows of one block less


def test_every_call_is_valid_at_its_real_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device: shapes, strides and dtypes are checked, and no memory is needed."""
    from helios_cuda.launch import recording

    rigs, timing = script("rig"), script("timing")

    class Meta(rigs.Rig):  # type: ignore[name-defined, misc]
        cuda = True

    def same_shape(out: Tensor, ref: Tensor) -> float:
        assert out.shape == ref.shape
        return 0.0

    def once(calls: Any, *_: object) -> Any:
        calls[0]()
        return timing.Timing(1.0, 1.0, 1.0, 1)

    for name in ("rig", "gemms", "attends", "convs", "moves"):
        monkeypatch.setattr(script(name), "error_of", same_shape, raising=False)
        monkeypatch.setattr(script(name), "measure", once, raising=False)
    rig = Meta(torch.device("meta"), False, "NVIDIA H200", 60 * 2**20)
    need_device = ("facts/", "sustained/", "bus/", "launch/", "attention/FA")
    taken = 0
    with torch.inference_mode(), recording() as launches:
        for item in real_items(rig):
            if not item.id.startswith(need_device):
                record = item.run()
                taken += 1
                assert record.get("flops", 0) > 0 or record["bytes"] > 0, item.id
                assert "data sheet" in record["share_of_peak_note"] or item.fields["dtype"] == "float32", item.id
    assert taken > 250
    assert {launch.kernel.name for launch in launches} == {"attention", "laid", "scaled_attention", "scaled_linear"}


@pytest.mark.parametrize("kernel", [(3, 3, 3), (1, 3, 3), (3, 1, 1), (1, 1, 1)])
def test_every_way_to_convolve_is_the_same_convolution(
    kernel: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    convs = script("convs")
    draw = torch.Generator().manual_seed(1)
    x, weight, bias = (
        torch.randn(shape, generator=draw, dtype=torch.float64) for shape in ((5, 4, 6, 7), (3, 4, *kernel), (3,))
    )
    pad = kernel[1] // 2
    wanted = torch.nn.functional.conv3d(x.transpose(0, 1)[None], weight, bias, padding=(0, pad, pad))[0].transpose(0, 1)
    # Fewer patches than a frame's at a time: the pieces have to fit together.
    monkeypatch.setattr(convs, "PATCH_BYTES", 2 * 6 * 7 * weight[0].numel() * 8)
    for name, variant in convs.VARIANTS.items():
        got = variant.run(pad, *variant.pack(x, weight, bias))
        assert got.shape == wanted.shape, name
        assert torch.allclose(got, wanted, atol=1e-12), name
    for point in ((0, 0, 0), (wanted.shape[0] - 1, 5, 6), (1, 3, 2)):
        got = convs.reference(pad, point, x, weight, bias)
        assert torch.allclose(got, wanted[point[0], :, point[1], point[2]], atol=1e-12)


def test_a_library_is_used_where_it_is_there_and_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    attends, shapes = script("attends"), script("shapes")
    rig = script("rig").Rig.on("cpu", True)

    def right(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, None]:
        scores = torch.einsum("bqhd,bkhd->bhqk", q.float(), k.float()) * q.shape[-1] ** -0.5
        return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v.float()).to(q.dtype), None

    def unscaled(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, None]:
        return right(q * 2, k, v)

    first = shapes.attentions(True)[0].row
    items = {item.id: item for item in attends.items(rig)}
    for function, correct in ((right, True), (unscaled, False)):
        library = ModuleType("flash_attn_interface")
        library.flash_attn_func = function  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "flash_attn_interface", library)
        assert items[f"attention/FA3/{first}"].run()["correct"] is correct
    with pytest.raises(script("results").NotThereError, match="flash_attn"):
        items[f"attention/FA2/{first}"].run()


def test_an_fp8_product_takes_scales_of_rows_and_columns() -> None:
    gemms = script("gemms")
    draw = torch.Generator().manual_seed(2)
    x, weight = torch.randn(6, 32, generator=draw), torch.randn(16, 32, generator=draw)
    x8, weight8, scale_x, scale_w, _ = gemms.quantised(x, weight, torch.zeros(16), by_row=True)
    assert (list(scale_x.shape), list(scale_w.shape)) == ([6, 1], [16, 1])
    product = (x8.double() * scale_x) @ (weight8.double() * scale_w).t()
    assert script("rig").error_of(product, x.double() @ weight.double().t()) < 0.05
    with torch.device("meta"):
        operands = [t.to("meta") for t in (x8, weight8, scale_x, scale_w)]
        bias = torch.empty(16, dtype=torch.bfloat16)
        assert gemms.scaled_product(*operands, bias, fast=True).shape == (6, 16)
        with pytest.raises(RuntimeError, match="scal"):
            gemms.scaled_product(operands[0], operands[1], scale_x.t().to("meta"), operands[3], bias, fast=True)


def test_a_result_that_is_wrong_or_no_number_is_never_correct() -> None:
    rigs = script("rig")
    rig = rigs.Rig.on("cpu", True)
    for error, correct in ((1e-3, True), (0.5, False), (math.nan, False)):
        record = rigs.take(rig, rigs.Trial([lambda: None], 10, 0, lambda _, error=error: error, 1e-2))
        assert record["correct"] is correct
        json.loads(json.dumps(record, allow_nan=False))


def test_a_long_run_tells_the_warm_rate_from_the_first() -> None:
    gemms, shapes = script("gemms"), script("shapes")
    product = shapes.Product("stage2", 1000, 1000, 1000, 1)
    times = [5.0] + [1.0] * 10 + [2.0] * 90  # the first batch holds what libraries do once
    record = gemms._summary(script("rig").Rig.on("cpu", True), product, times, [])
    assert record["ms_median"] == 2.0
    assert record["tflops"] == 1.0  # 2·10⁹ FLOP in 2 ms
    assert record["tflops_at_first"] == 2 * record["tflops"]


def test_the_commit_is_the_one_that_is_told_or_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = script("environment")
    assert len(environment.commit().removesuffix("-dirty")) in (40, len("unknown"))
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert environment.commit() == "unknown"
    (tmp_path / ".helios-commit").write_text("from a file\n")
    assert environment.commit() == "from a file"
    monkeypatch.setenv("HELIOS_COMMIT", "from outside")
    assert environment.commit() == "from outside"


def test_nvidia_smi_is_asked_and_may_be_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = script("environment")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment.smi("clocks.sm", "power.draw") == {}
    fake = tmp_path / "nvidia-smi"
    fake.write_text("#!/bin/sh\necho '1980, 650.25'\n")
    fake.chmod(0o755)
    assert environment.smi("clocks.sm", "power.draw") == {"clocks.sm": "1980", "power.draw": "650.25"}
    assert environment.smi("clocks.sm") == {}  # an answer to another question


def test_examples_in_the_scripts() -> None:
    for name in ("timing", "rig"):
        outcome = doctest.testmod(script(name))
        assert outcome.attempted > 0
        assert outcome.failed == 0
