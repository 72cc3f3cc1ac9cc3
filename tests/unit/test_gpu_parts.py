"""What the parts of ``tools/on_gpu.sh`` make of their measurements, on made-up ones and on shapes without memory."""

from __future__ import annotations

import importlib
import itertools
import json
import signal
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from helios.backend import Kernel, ReferenceBackend
from helios.model.random_weights import RandomWeights

FOLDER = Path(__file__).resolve().parents[2] / "tools" / "gpu"
H100 = "NVIDIA H100 80GB HBM3"


@pytest.fixture(autouse=True)
def _on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))


def script(name: str) -> ModuleType:
    return importlib.import_module(name)


# --- floors -----------------------------------------------------------------------------------------------------------


def ceilings(folder: Path, device: str = H100, tiny: bool = False, **changed: Any) -> Path:
    """A log as the part *ceilings* leaves it."""
    record = {"id": "gemm/addmm/a", "status": "measured", "tflops": 700.0, "dtype": "bfloat16"}
    lines = [
        {"header": {"device": device, "tiny": tiny}},
        {**record, **changed},
        {**record, "id": "gemm/fp8/a", "tflops": 1400.0, "dtype": "float8_e4m3fn"},
        {**record, "id": "gemm/odd/a", "tflops": 900.0, "status": "wrong"},
        {"id": "copy/device/1", "status": "measured", "gbps": 3000.0},
    ]
    (folder / "ceilings.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"cut')
    return folder


def test_floors_are_of_what_was_measured_on_this_device_and_else_of_its_data_sheet(tmp_path: Path) -> None:
    rates = script("rates")
    sheet = rates.of_device(H100, tmp_path)
    assert (sheet.memory, sheet.flops["products", "bfloat16"]) == (3.35e12, 989e12)
    assert sheet.source.startswith("data sheet of NVIDIA H100 SXM for products, attention, convolutions, memory")
    measured = rates.of_device(H100, ceilings(tmp_path))
    assert (measured.memory, measured.flops["products", "bfloat16"]) == (
        3.0e12,
        700e12,
    )  # never by fp8, nor what is wrong
    assert measured.flops["attention", "bfloat16"] == 989e12
    assert measured.source == "data sheet of NVIDIA H100 SXM for attention, convolutions"
    for other in ({"device": "NVIDIA H200"}, {"tiny": True}):
        assert rates.of_device(H100, ceilings(tmp_path, **other)) == sheet
    assert rates.of_device("a card", tmp_path).floor("linear", torch.bfloat16, 10, 10) is None


def test_a_floor_is_the_longer_of_arithmetic_and_memory(tmp_path: Path) -> None:
    known = script("rates").of_device(H100, ceilings(tmp_path))
    assert known.floor("qkv_linear", torch.bfloat16, 7 * 10**11, 3 * 10**9) == pytest.approx(1.0)
    assert known.floor("qkv_linear", torch.bfloat16, 7 * 10**11, 6 * 10**9) == pytest.approx(2.0)
    assert known.floor("conv3d", torch.float32, 7 * 10**11, 3 * 10**9) == pytest.approx(1.0)  # its rate is unknown
    assert known.floor("quantized_linear", torch.bfloat16, 7 * 10**11, 0) == pytest.approx(0.5)  # of e4m3 numbers
    assert known.floor("packed_linear", torch.bfloat16, 7 * 10**11, 0) == pytest.approx(1.0)
    assert known.flops["attention", "float8_e4m3fn"] == 2 * 989e12  # not measured


# --- forms and tiles --------------------------------------------------------------------------------------------------


def test_an_operand_is_made_as_it_lies() -> None:
    forms = script("forms")
    fused = torch.zeros(2, 5, 3, 4, dtype=torch.bfloat16)[:, :, 1]
    layout = forms.Layout.of(fused)
    made = layout.made(torch.device("cpu"))
    assert forms.Layout.of(made) == layout
    assert 0.5 < float(made.float().std()) < 2
    numbers = forms.Layout.of(torch.zeros(4, 256, dtype=torch.float8_e4m3fn)[:, 3:]).made(torch.device("cpu"))
    assert numbers.stride() == (256, 1)
    assert 300 < float(numbers.float().abs().max()) <= 448
    assert forms.Layout.of(torch.zeros(3, dtype=torch.int64)).made(torch.device("cpu")).tolist() == [0, 0, 0]


def tried(column: int, ms: float, status: str = "measured", key: str = "bf16", of: int = 3) -> dict[str, Any]:
    tile = {"sizes": {"TOKENS": 1 << column}, "warps": 4, "stages": 1}
    known = {"id": f"tune/norm/{key}/TOKENS={1 << column}", "kernel": "norm", "key": key, "tile": tile, "of": of}
    return {**known, "column": str(column), "status": status, "ms_median": ms, "row": f"norm {key}"}


def test_the_table_has_the_fastest_right_tile_of_each_key_that_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from helios_cuda import tables

    tuning = script("tuning")
    records = [
        *(tried(0, 1.0), tried(2, 0.5, "wrong"), tried(1, 0.8)),  # the fastest is wrong
        *(tried(i, ms, key="draw") for i, ms in enumerate((1.0, 0.99, 1.5))),  # noise does not decide
        *(tried(i, 1.0, key="half") for i in range(2)),  # one was not reached
        *(tried(i, 1.0, "not measured" if i == 2 else "measured", key="late") for i in range(3)),
    ]
    made = tuning.table(records, "an H100")
    assert {key: row["sizes"]["TOKENS"] for key, row in made["norm"].items()} == {"bf16": 2, "draw": 1}
    tuning.write(tmp_path / "sm_90.json", made)
    monkeypatch.setattr("helios_cuda.tables.resources.files", lambda _: tmp_path)
    tables.table.cache_clear()
    try:
        assert tables.table("sm_90")["norm"]["bf16"] == tables.Tile({"TOKENS": 2}, 4, 1)
    finally:
        tables.table.cache_clear()
    report = "\n".join(tuning.report(records))
    assert "norm bf16: TOKENS=2 0.8000 ms, 1.25×; 2 of 3 tried" in report


def test_what_was_chosen_before_is_taken_back_and_what_cannot_be_is_measured_anew() -> None:
    from helios.errors import BackendError

    speeds = script("speeds")
    entry = {"library": "cudnn"}
    records = {
        "a": {"id": "choice/attention/f", "row": "f", "column": "attention", "entry": entry},
        "b": {"id": "choice/convolution/g", "row": "g", "column": "convolution"},  # out of time: it has none
    }
    plans: list[Mapping[str, Any]] = []

    class Backend:
        def use_execution_plan(self, plan: Mapping[str, Any]) -> None:
            plans.append(plan)
            raise BackendError("another version")

    speeds.recall(Backend(), records)
    assert plans == [{"attention": {"f": entry}}]


# --- correctness ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("off", [0.0, 1.0])
def test_the_suite_finds_a_wrong_kernel_and_names_the_case(off: float) -> None:
    judged = script("judged")
    rig = script("rig").Rig.on("cpu", True)

    backend = ReferenceBackend()
    right = backend.kernels["gated_add"].run
    wrong = Kernel(lambda *operands, **attributes: right(*operands, **attributes) + off)
    backend.__dict__["kernels"] = {**backend.kernels, "gated_add": wrong}
    (item,) = [item for item in judged.first(rig, backend, "bf16") if item.row == "gated_add"]
    record = item.run()
    assert record["correct"] is (off == 0.0)
    assert bool(record["fail"]) is bool(off)
    assert ("gated_add[bf16" in record.get("why", "")) is bool(off)


def test_at_real_sizes_every_op_is_judged() -> None:
    from helios import op

    judged = script("judged")
    rig = script("rig").Rig(torch.device("cuda", 0), False, H100)
    backend = ReferenceBackend()
    precisions = ("bf16", "fp8-attention", "fp8-weights")
    quick = {precision: list(judged.first(rig, backend, precision)) for precision in precisions}
    full = [item for precision in precisions for item in judged.everything(rig, backend, precision)]
    rows = {precision: {item.row for item in items} for precision, items in quick.items()}
    assert set.union(*rows.values()) == set(op.names())
    assert not rows["bf16"] & (rows["fp8-attention"] | rows["fp8-weights"])  # what is not quantised is judged once
    assert "scaled_attention" in rows["fp8-attention"]
    assert {"dequantize_rows", "packed_linear"} <= rows["fp8-weights"]
    ids = [item.id for item in (*itertools.chain(*quick.values()), *full)]
    assert len(ids) == len(set(ids))
    assert "suite/bf16 full/attention[bf16,stage2]" in ids
    assert "suite/fp8-attention full/scaled_attention[fp8-attention,stage2]" in ids


# --- films ------------------------------------------------------------------------------------------------------------


def test_a_steady_chunk_is_any_but_the_first() -> None:
    film = script("film")
    part = {"text": 0.0, "history": 0.1, "denoise": 0.4, "decode": 0.5}
    timings = [{**part, "text": 9.0}, part, part, part]
    told = film.summary([0.0, 10.0, 11.0, 12.0, 14.0], timings, 33)
    assert (told["first_s"], told["p50_s"], told["p99_s"], told["chunks"]) == (10.0, 1.0, 2.0, 4)
    assert told["fps"] == pytest.approx(3 * 33 / 4)
    assert told["split_s"] == pytest.approx(part)


def test_weights_drawn_on_a_device_depend_on_seed_and_name_alone_and_spread_as_others() -> None:
    film = script("film")
    shapes = {"a.weight": (64, 256), "norm.weight": (512,), "a.bias": (64,)}
    like = RandomWeights(shapes, seed=3, dtype=torch.bfloat16)
    one, two = (film.DeviceWeights(like, torch.device("cpu")) for _ in range(2))
    a = one.read("a.weight")
    two.read("norm.weight")
    assert torch.equal(a, two.read("a.weight"))
    assert a.dtype == torch.bfloat16
    assert float(a.float().std()) == pytest.approx(1 / 16, rel=0.05)
    assert float(one.read("norm.weight").float().mean()) == pytest.approx(1, abs=0.02)
    assert one.seconds > 0
    other = film.DeviceWeights(RandomWeights(shapes, seed=4), torch.device("cpu"))
    assert not torch.equal(other.read("a.weight").bfloat16(), a)


def test_a_chunk_that_is_no_picture_is_wrong() -> None:
    film = script("film")

    class Chunk:
        index = 1
        latents = torch.randn(1, 16, 2, 8, 8)
        frames = torch.randint(0, 255, (1, 9, 64, 64, 3), dtype=torch.uint8)

    assert film._wrong(Chunk) == ""
    Chunk.frames = torch.full_like(Chunk.frames, 7)
    assert "deviate" in film._wrong(Chunk)
    Chunk.latents[0, 0, 0, 0, 0] = torch.nan
    assert "not finite" in film._wrong(Chunk)


# --- certificates and diffusers ---------------------------------------------------------------------------------------


def test_an_interrupted_certification_is_packed_and_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certified, results = script("certified"), script("results")
    commands: list[list[str]] = []

    def run(command: list[str], seconds: float) -> tuple[int, str]:
        commands.append(command)
        folder = Path(command[-1])
        if command[0] == "verify":
            return 0, ""
        if "--resume" in command:
            (folder / "run.json").unlink()
            verdict = {"word": "passed", "sentence": "well", "levels": {"ops": {"state": "pass"}}}
            (folder / "report.json").write_text(json.dumps({"verdict": verdict}))
            return 0, ""
        (folder / "cases").mkdir(parents=True)
        (folder / "run.json").write_text("{}")
        (folder / "cases" / "00000.json").write_text("{}")
        return 130, "interrupted"

    monkeypatch.setattr(certified, "_run", run)
    args, clock = script("running").parser("certify", "").parse_args(["--device", "cpu"]), results.Clock(100.0)
    with certified.working(tmp_path) as folder, pytest.raises(results.LaterError, match="after 1 cases"):
        certified.certify(args, clock, folder / "one", ["--level", "model"])
    with zipfile.ZipFile(tmp_path / certified.ARCHIVE) as file:
        assert sorted(file.namelist()) == ["one/cases/00000.json", "one/run.json"]
    with certified.working(tmp_path) as folder:
        record = certified.certify(args, clock, folder / "one", ["--level", "model"])
    assert record["correct"]
    assert record["verified"]
    assert [command[0] for command in commands] == ["certify", "certify", "verify"]
    assert "--level" not in commands[1]  # a run keeps its settings
    assert not list(tmp_path.glob("*.tmp"))


def test_a_command_that_takes_too_long_is_interrupted_as_by_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    certified = script("certified")
    text = "import signal, sys, time\nprint('on', flush=True)\ntry:\n    time.sleep(60)\n"
    text += "except KeyboardInterrupt:\n    sys.exit(130)\n"
    monkeypatch.setattr(certified.sys, "executable", sys.executable)
    real = certified.subprocess.Popen
    monkeypatch.setattr(certified.subprocess, "Popen", lambda words, **more: real([words[0], "-c", text], **more))
    before = signal.getsignal(signal.SIGINT)
    code, said = certified._run(["certify"], 5.0)
    assert (code, said.strip()) == (130, "on")
    assert signal.getsignal(signal.SIGINT) is before


def test_what_a_later_run_goes_on_with_is_no_failure(tmp_path: Path) -> None:
    results, totals = script("results"), script("totals")

    def run() -> dict[str, Any]:
        raise results.LaterError("out of time after 3 cases")

    log = results.Results(tmp_path / "x.jsonl", {"part": "x", "code": "a"})
    results.run_items([results.Item("one", "", "r", "c", run)], log, results.Clock(100.0))
    assert log.records["one"]["status"] == "not measured"
    assert "after 3 cases" in log.records["one"]["why"]
    assert not totals.problems(log.records.values())
    assert not log.finished("one")


def test_our_own_figures_count_for_their_commit_alone(tmp_path: Path) -> None:
    results = script("results")
    for code in ("a", "a", "b"):
        log = results.Results(tmp_path / "x.jsonl", {"part": "x", "code": code})
        assert bool(log.records) is (code == "a" and bool(list(tmp_path.glob("done"))))
        log.add({"id": "one", "status": "measured"})
        (tmp_path / "done").touch()


def test_without_diffusers_it_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = script("part_diffusers")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    options = ["--device", "cpu", "--tiny", "--out", str(tmp_path), "--budget", "60"]
    assert part.main(options) == 0
    text = (tmp_path / "diffusers.jsonl").read_text()
    records = [json.loads(line) for line in text.splitlines()]
    (eager,) = [r for r in records if r.get("id") == "film/tiny/eager"]
    assert eager["status"] == "not there"
    assert "diffusers cannot be imported" in eager["why"]


def test_ours_and_theirs_are_compared_on_the_same_device_and_size(tmp_path: Path) -> None:
    part = script("part_diffusers")
    film = {"status": "measured", "row": "14b", "fps": 20.0, "steps": [1, 1, 1], "vae": "bf16"}
    lines = [{"header": {"device": H100}}, film, {**film, "steps": [2, 2, 2], "fps": 9.0}]
    (tmp_path / "realtime.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    theirs = {"status": "measured", "row": "14b", "column": "eager", "steps": [1, 1, 1], "fps": 8.0, "device": H100}
    theirs |= {"ms_median": 4125.0, "first_s": 4.5}
    assert "VAE in bf16, theirs in fp32: 20.00 FPS, 2.50 times" in "\n".join(part.report(tmp_path, [theirs]))
    for other in ({"device": "NVIDIA H200"}, {"row": "mini"}):
        assert "times as fast" not in "\n".join(part.report(tmp_path, [{**theirs, **other}]))
