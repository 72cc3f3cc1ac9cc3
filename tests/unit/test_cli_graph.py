"""``helios graph``: the published counts, the text form, coverage, and that it stays small and quick."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from helios.backend import Kernel, ReferenceBackend
from helios.cli import main
from helios.graph import parse

TINY = ["graph", "--size", "tiny", "--height", "64", "--width", "64"]
# TFLOP of a forward at 384×640: as published, and our step phase with the history's embedding.
PUBLISHED = {0: 69.73898, 1: 119.10406, 2: 359.56257}
OURS = {0: 66.46716, 1: 115.75262, 2: 355.89262}

# Of that process image alone: ru_maxrss would carry the parent's over the exec, and the largest child's of all.
MEASURED = """
import sys
from helios.cli import main
code = main(["graph", "--size", "14b", "--flops", "--json"])
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(peak.split()[1], file=sys.stderr)
sys.exit(code)
"""


def data(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def counted() -> tuple[Any, float, int]:
    """One run of the whole 14B plan in a process of its own: its report, its seconds, and its peak bytes."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", MEASURED], capture_output=True, text=True, check=True, cwd="/")
    seconds = time.perf_counter() - start
    return json.loads(done.stdout), seconds, int(done.stderr.split()[-1]) * 1024


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_flops_are_those_of_the_model(counted: tuple[Any, float, int], stage: int) -> None:
    report, _, _ = counted
    phases = {phase["name"]: phase for phase in report["phases"]}
    assert report["published_flops"][f"stage{stage}"] / 1e12 == pytest.approx(PUBLISHED[stage], abs=5e-5)
    ours = phases[f"stage{stage}"]["flops"] + phases["chunk"]["flops"]
    assert ours / 1e12 == pytest.approx(OURS[stage], abs=5e-5)
    assert sum(row["flops"] for row in report["ops"][f"stage{stage}"]) == phases[f"stage{stage}"]["flops"]


def test_weights_and_what_is_held(counted: tuple[Any, float, int]) -> None:
    report, _, _ = counted
    phases = {phase["name"]: phase for phase in report["phases"]}
    assert report["weights"]["parameters"] == 14_312_427_584
    assert phases["prompt"]["held"] == 2 * 40 * 512 * 5120 * 2  # keys and values, 40 layers, 512 tokens, bf16
    assert phases["chunk"]["held"] == 2400 * 5120 * 2  # the history's tokens


def test_counting_14b_is_quick_and_small(counted: tuple[Any, float, int]) -> None:
    """Shapes alone: one tensor of weights made by mistake would be seen."""
    _, seconds, peak = counted
    assert seconds < 10
    assert peak < 2e9


def test_the_table_of_flops(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["graph", "--pyramid-stage", "0", "--flops"]) == 0
    out = capsys.readouterr().out
    assert "14,312,427,584 parameters" in out
    for figure in ("66.455", "66.467", "69.739", "2.196", "0.0126"):
        assert figure in out
    assert "graph weights {" not in out


def test_the_text_round_trips(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY, "--pyramid-stage", "1"]) == 0
    texts = capsys.readouterr().out.strip().split("\n\n")
    graphs = [parse(text) for text in texts]
    assert [graph.name for graph in graphs] == ["weights", "prompt", "chunk", "stage1"]
    assert [str(graph) for graph in graphs] == texts


def test_all_stages_share_the_slower_phases(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(data(capsys, *TINY)["graphs"]) == ["weights", "prompt", "chunk", "stage0", "stage1", "stage2"]
    assert list(data(capsys, *TINY, "--variant", "base")["graphs"]) == ["weights", "prompt", "chunk", "stage0"]


def test_published_is_one_graph_a_stage(capsys: pytest.CaptureFixture[str]) -> None:
    whole = data(capsys, *TINY, "--published", "--flops", "--pyramid-stage", "2")
    assert list(whole["ops"]) == ["stage2"]
    assert sum(row["flops"] for row in whole["ops"]["stage2"]) == whole["published_flops"]["stage2"]
    assert main([*TINY, "--published", "--flops"]) == 0
    assert "as the published code runs it" in capsys.readouterr().out


def test_out_writes_the_text_and_nothing_to_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "tiny.txt"
    assert main([*TINY, "--pyramid-stage", "0", "--out", str(path)]) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert str(path) in captured.err
    assert parse(path.read_text().split("\n\n")[-1]).name == "stage0"


def test_a_path_that_cannot_be_written_is_a_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main([*TINY, "--out", str(tmp_path / "file" / "x.txt")]) == 2
    assert "cannot write" in capsys.readouterr().err


def test_coverage_by_a_backend_that_runs_everything(capsys: pytest.CaptureFixture[str]) -> None:
    rows = data(capsys, *TINY, "--backend", "reference")["coverage"]
    assert {row["op"] for row in rows} >= {"attention", "linear"}
    assert sum(row["unsupported"] for row in rows) == 0
    assert main([*TINY, "--backend", "reference"]) == 0
    assert "all of them run" in capsys.readouterr().out


class Partial(ReferenceBackend):
    """Fuses one op, and has no attention over more than 300 keys."""

    name = "partial"
    fusions = ("adaln",)

    def devices(self) -> Any:
        raise AssertionError("coverage asks no device")

    def supports(self, node: Any) -> str | None:
        if node.op == "attention" and node.inputs[1].shape[1] > 300:
            return f"more than 300 keys: {node.inputs[1].shape[1]}"
        return super().supports(node)

    @property
    def kernels(self) -> dict[str, Kernel]:  # type: ignore[override]
        return {name: kernel for name, kernel in super().kernels.items() if name != "silu"}


def test_coverage_says_what_is_fused_and_why_not(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("helios.backend.load", lambda name: Partial)
    rows = {row["op"]: row for row in data(capsys, *TINY, "--pyramid-stage", "0", "--backend", "x")["coverage"]}
    assert rows["adaln"]["fused"] > 0
    assert rows["adaln"]["native"] == 0
    assert rows["silu"]["reasons"] == ["no kernel"]
    assert rows["attention"]["unsupported"] > 0
    assert rows["attention"]["native"] > 0
    assert rows["attention"]["reasons"] == ["more than 300 keys: 512"]
    assert main([*TINY, "--pyramid-stage", "0", "--backend", "x"]) == 0
    assert "--fallback reference would run those" in capsys.readouterr().out.replace("\n", " ")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--pyramid-stage", "3"], "no pyramid stage 3: it has stages 0 to 2"),
        (["--pyramid-stage", "-1"], "no pyramid stage -1"),
        (["--variant", "base", "--pyramid-stage", "2"], "it has one stage, 0"),
        (["--height", "100"], "--height 128 --width 64"),
        (["--batch", "0"], "batch is 0"),
        (["--published", "--backend", "cpu"], "leave one of the two out"),
        (["--precision", "fp7"], "unknown precision 'fp7': did you mean 'fp8'"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY, *arguments]) == 2
    assert said in capsys.readouterr().err
