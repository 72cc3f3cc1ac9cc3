"""``helios bench``: every phase and op is there, labelled, and nonsense is not timed."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from helios.backend import Kernel, ReferenceBackend
from helios.cli import bench, main
from helios.kernel_program import KernelProgram
from helios.precision import PRECISIONS
from helios.program import Program

TINY = ["bench", "--size", "tiny", "--height", "64", "--width", "64", "--repeat", "2", "--backend", "reference"]


def loaded(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    assert main([*TINY, *arguments, "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return json.loads(captured.out)


def test_every_phase_is_timed_and_labelled(capsys: pytest.CaptureFixture[str]) -> None:
    data = loaded(capsys, "--pyramid-stage", "0", "--precision", "bf16")
    assert set(data["phases"]) == {"prompt", "chunk", "stage0"}
    for phase in data["phases"].values():
        assert 0 < phase["p50"] <= phase["p99"]
        assert phase["runs"] == 2
        assert phase["flop_per_second"] == pytest.approx(phase["flops"] / phase["p50"])
    assert data["machine"]["backend"] == "reference"
    assert data["machine"]["precision"] == "bf16"
    assert data["machine"]["torch"] == torch.__version__
    assert data["weights"].startswith("random weights, seed 0")
    assert data["fallback_nodes"] == 0


def test_ops_are_those_of_the_graph(capsys: pytest.CaptureFixture[str]) -> None:
    from helios.fit.costs import Setting, stage_graphs
    from helios.lower import plan_for
    from helios.model.presets import SIZES, VARIANTS

    data = loaded(capsys, "--pyramid-stage", "1", "--precision", "fp32")
    asked = Setting(SIZES["tiny"], VARIANTS["distilled"], 64, 64, precision=PRECISIONS["fp32"])
    graph = plan_for(stage_graphs(asked, [1]), ReferenceBackend()).steps["stage1"]
    assert sum(row["nodes"] for row in data["ops"]["stage1"]) == len(graph.nodes)
    assert {row["op"] for row in data["ops"]["stage1"]} == {node.op for node in graph.nodes}
    seconds = [row["seconds"] for row in data["ops"]["stage1"]]
    assert seconds == sorted(seconds, reverse=True)


def test_the_tables(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(TINY) == 0
    captured = capsys.readouterr()
    for part in (
        "By phase",
        "stage0, by op",
        "stage2, by op",
        "p99",
        "random weights",
        "Backend reference on torch cpu",
    ):
        assert part in captured.out
    assert "stage1: 2 runs" in captured.err


def test_a_result_that_no_network_gives_is_not_timed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(ReferenceBackend):
        @property
        def kernels(self) -> dict[str, Kernel]:  # type: ignore[override]
            known = dict(super().kernels)
            silu = known["silu"].run
            return known | {"silu": Kernel(lambda x: silu(x) * float("nan"))}

    monkeypatch.setattr("helios.backend.select", lambda spec=None, options=None: Broken())
    assert main([*TINY, "--pyramid-stage", "0"]) == 2
    assert "not finite, or all the same" in capsys.readouterr().err


def test_a_backend_without_a_kernel_needs_leave_to_fall_back(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Partial(ReferenceBackend):
        @property
        def kernels(self) -> dict[str, Kernel]:  # type: ignore[override]
            return {name: kernel for name, kernel in super().kernels.items() if name != "gelu"}

    monkeypatch.setattr("helios.backend.select", lambda spec=None, options=None: Partial())
    assert main([*TINY, "--pyramid-stage", "0"]) == 2
    assert "--fallback reference" in capsys.readouterr().err
    assert main([*TINY, "--pyramid-stage", "0", "--fallback", "reference"]) == 0
    assert "ran by the fallback: this is no figure of the backend" in " ".join(capsys.readouterr().out.split())
    monkeypatch.setenv("HELIOS_FALLBACK", "reference")
    assert loaded(capsys, "--pyramid-stage", "0")["fallback_nodes"] > 0


def test_a_program_that_runs_as_a_whole_tells_no_op(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(KernelProgram, "profile", Program.profile)
    assert main([*TINY, "--pyramid-stage", "0"]) == 0
    assert "tells no single op" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--repeat", "0"], "wanted at least 1"),
        (["--precision", "fp7"], "unknown precision 'fp7'"),
        (["--pyramid-stage", "9"], "no pyramid stage 9"),
        (["--fallback", "cpu"], "unknown fallback 'cpu'"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY, *arguments]) == 2
    assert said in capsys.readouterr().err


def test_a_precision_that_the_backend_lacks_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ReferenceBackend, "precisions", ("fp32",))
    assert main([*TINY, "--precision", "bf16"]) == 2
    assert "backend 'reference' does not compute in bf16, but in fp32" in capsys.readouterr().err


def test_percentiles_are_nearest_rank() -> None:
    laps = [float(n) for n in range(200, 0, -1)]
    found = bench._statistics(laps, 10)
    assert (found["p50"], found["p99"]) == (100.5, 198.0)
    assert bench._statistics([3.0, 1.0], 1)["p99"] == 3.0


def test_decoding_is_timed_where_its_arithmetic_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    data = loaded(capsys, "--pyramid-stage", "0", "--vae-precision", "bf16")
    decode = data["phases"]["decode bf16"]
    assert (decode["runs"], decode["group"]) == (2, 9)
    assert decode["flop_per_second"] == pytest.approx(decode["flops"] / decode["p50"])
    assert main([*TINY, "--vae-precision", "bf8"]) == 2
    assert "unknown VAE precision of backend 'reference' 'bf8'" in capsys.readouterr().err
