"""The level model: trajectories, prompts held side by side, and the energy of the residual stream."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from helios import op
from helios.backend import ReferenceBackend, select
from helios_conformance import selection, suite
from helios_conformance.draws import Root

ROOT = Root(72)


QUICK = [case.id for p in ("bf16", "fp32") for case in suite.choose(p, "quick", ("model",))]


@pytest.mark.parametrize("case", QUICK)
def test_the_cpu_backend_passes(bench: Any, case: str) -> None:
    seen, verdict = bench.run(case, select("cpu"))
    assert verdict.state == "pass", verdict.reason
    assert sum(kept.values.nbytes for kept in seen.outputs.values()) <= selection.BUDGET_BYTES * 1.1


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize(
    ("name", "case"),
    [
        ("text_stale", "forward[{},tiny,stages]"),
        ("text_overwritten", "forward[{},tiny,stages]"),
        ("text_of_neighbour", "forward[{},tiny,batch2]"),
        ("history_stale", "steps[{},tiny,distilled]"),
        ("history_late", "steps[{},tiny,distilled]"),
        ("results_replayed", "steps[{},tiny,base]"),
        ("steps_skipped", "steps[{},tiny,base]"),
        ("second_load_ignored", "forward[{},tiny,one_stage]"),
        ("frames_one_late", "forward[{},tiny,stages]"),
        ("history_timestep_one", "forward[{},tiny,stages]"),
    ],
)
def test_a_wrong_program_fails(bench: Any, name: str, case: str, precision: str) -> None:
    _, verdict = bench.run(case.format(precision), bench.mutant(name))
    assert verdict.state == "fail"
    assert "raised" not in verdict.reason


def test_other_frequencies_of_the_past_show_in_float32(bench: Any) -> None:
    """With heads of twelve channels they are too near to show through the rounding of bfloat16."""
    assert bench.run("forward[fp32,tiny,stages]", bench.mutant("history_frequencies"))[1].state == "fail"


def truncated(x: Tensor, y: Tensor, gate: Tensor | None = None, *, gate_split: int) -> Tensor:
    """The residual addition cut off instead of rounded: in bfloat16 the low half of the word is dropped."""
    right: Tensor = op.get("gated_add").fn(
        x.double(), y.double(), None if gate is None else gate.double(), gate_split=gate_split
    )
    if x.dtype == torch.bfloat16:
        return (right.float().view(torch.int32) & -0x10000).view(torch.float32).bfloat16()
    near = right.float()
    beyond = near.double().abs() > right.abs()
    return torch.where(beyond, torch.nextafter(near, torch.zeros_like(near)), near)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_truncation_shows_in_the_energy_after_40_layers(bench: Any, precision: str) -> None:
    case = f"energy[{precision},tiny,40]"
    _, right = bench.run(case, ReferenceBackend())
    assert right.state == "pass", right.reason
    _, verdict = bench.run(case, bench.wrong("gated_add", truncated))
    assert verdict.state == "fail"
    assert "energy is 0." in verdict.reason
    assert verdict.judged["stage0.hidden.39"].errors.gain < 2 * -abs(right.judged["stage0.hidden.39"].errors.gain)
