"""The level blocks: right backends pass, wrong ones fail, and what came back is checked before it counts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from helios import op
from helios.backend import ReferenceBackend, select
from helios_conformance import execute, selection, suite
from helios_conformance.case import Observation
from helios_conformance.draws import Root
from helios_conformance.references import committed

ROOT = Root(71)


def quick_blocks(precision: str) -> list[str]:
    return [case.id for case in suite.choose(precision, "quick", ("blocks",)) if "mini" not in case.id]


@pytest.mark.parametrize("case", [c for p in ("bf16", "fp32") for c in quick_blocks(p)])
def test_the_cpu_backend_passes(bench: Any, case: str) -> None:
    seen, verdict = bench.run(case, select("cpu"))
    assert verdict.state == "pass", verdict.reason
    assert verdict.judged
    assert sum(kept.values.nbytes for kept in seen.outputs.values()) <= selection.BUDGET_BYTES


def gate_forgotten(x: Tensor, y: Tensor, gate: Tensor | None = None, *, gate_split: int) -> Tensor:
    return op.get("gated_add").fn(x, y, None, gate_split=0)  # type: ignore[no-any-return]


def no_zero_row(x: Tensor, scale: Tensor, shift: Tensor, *, split: int, **rest: Any) -> Tensor:
    """History is modulated as the noisy tokens are."""
    return op.get("modulate").fn(x, scale[:, -1:], shift[:, -1:], split=0, **rest)  # type: ignore[no-any-return]


def one_video(q: Tensor, k: Tensor, v: Tensor, **rest: Any) -> Tensor:
    """All videos of a batch see the keys of the first."""
    same = (x[:1].expand_as(x) for x in (k, v))
    return op.get("attention").fn(q, *same, **rest)  # type: ignore[no-any-return]


def history_reversed(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    coarse = weight.shape[2] > 1
    return op.get("patch_embed").fn(x.flip(2) if coarse else x, weight, bias)  # type: ignore[no-any-return]


def sigmas_swapped(sample: Tensor, velocity: Tensor, start: Tensor, coeffs: Tensor) -> Tensor:
    return op.get("dmd_step").fn(sample, velocity, start, coeffs.flip(0))  # type: ignore[no-any-return]


def bias_dropped(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Of the second product of the feed-forward alone: the only one whose rows are as long."""
    return op.get("linear").fn(x, weight, bias if weight.shape[1] != 32 or weight.shape[0] != 24 else None)  # type: ignore[no-any-return]


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize(
    ("name", "kernel", "case"),
    [
        ("gated_add", gate_forgotten, "block[{},tiny,stages]"),
        ("gated_add", gate_forgotten, "block[{},tiny,first]"),
        ("modulate", no_zero_row, "block[{},tiny,stages]"),
        ("modulate", no_zero_row, "block[{},tiny,first]"),
        ("attention", one_video, "block[{},tiny,batch2]"),
        ("patch_embed", history_reversed, "block[{},tiny,no_anchor]"),
        ("dmd_step", sigmas_swapped, "sampler[{},dmd]"),
        ("linear", bias_dropped, "block[{},tiny,first]"),
    ],
)
def test_a_wrong_kernel_fails(bench: Any, name: str, kernel: Callable[..., Any], case: str, precision: str) -> None:
    _, verdict = bench.run(case.format(precision), bench.wrong(name, kernel))
    assert verdict.state == "fail"
    assert "beyond" in verdict.reason


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_batch_of_one_does_not_see_what_is_wrong_with_two(bench: Any, precision: str) -> None:
    assert bench.run(f"block[{precision},tiny,stages]", bench.wrong("attention", one_video))[1].state == "pass"


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize(
    ("name", "case"),
    [
        ("bias_of_one_layer", "block[{},tiny,first]"),
        ("gate_of_one_layer", "block[{},tiny,first]"),
        ("scale_of_text", "block[{},tiny,stages]"),
        ("vae_cache_lost", "vae[{},decode_groups]"),
        ("last_frame_dropped", "vae[{},decode]"),
    ],
)
def test_a_wrong_program_fails(bench: Any, name: str, case: str, precision: str) -> None:
    assert bench.run(case.format(precision), bench.mutant(name))[1].state == "fail"


class OneStepLate:
    """Each step computes with the coefficients of the one before."""

    def __init__(self) -> None:
        self.last: Tensor | None = None

    def __call__(self, *operands: Tensor) -> Tensor:
        given, self.last = self.last, operands[-1]
        return op.get("euler_step").fn(*operands[:-1], operands[-1] if given is None else given)  # type: ignore[no-any-return]


def test_sigma_off_by_one_step_fails(bench: Any) -> None:
    _, verdict = bench.run("sampler[fp32,euler]", bench.wrong("euler_step", OneStepLate()))
    assert verdict.state == "fail"
    assert "s0.k1.step.sample" in verdict.reason
    assert "s0.k0.step.sample" not in verdict.reason  # the first has nothing before it


def test_other_bits_in_the_same_call_fail(bench: Any) -> None:
    calls = []

    def drifts(x: Tensor, y: Tensor, *rest: Any, **attrs: Any) -> Tensor:
        calls.append(1)
        made: Tensor = op.get("gated_add").fn(x, y, *rest, **attrs)
        return made * (1 + 2.0**-23 * (len(calls) % 2))

    _, verdict = bench.run("block[fp32,tiny,no_history]", bench.wrong("gated_add", drifts))
    assert verdict.state == "fail"
    assert "other bits" in verdict.reason


def tampered(seen: Observation, **change: Any) -> Observation:
    name = next(iter(seen.outputs))
    kept = dataclasses.replace(seen.outputs[name], **change)
    return dataclasses.replace(seen, outputs={**seen.outputs, name: kept})


def test_what_is_judged_is_what_the_digest_chooses(bench: Any) -> None:
    case = suite.find("block[fp32,tiny,first_batch2]")
    seen, verdict = bench.run(case.id, ReferenceBackend())
    assert verdict.state == "pass"
    name = next(iter(seen.outputs))
    kept = seen.outputs[name]
    for change, words in (
        ({"digest": "0" * 64}, "stage0.velocity"),  # other elements would have been kept
        ({"values": kept.values[:-1]}, "elements are kept"),
        ({"values": kept.values.bfloat16()}, "wanted float32"),
        ({"shape": (1, *kept.shape[1:])}, "wanted float32"),
        ({"finite": False}, "NaN"),
        ({"values": kept.values * 1.001}, "beyond"),
    ):
        worse = execute.judge(case, tampered(seen, **change), ROOT, committed())
        assert worse.state == "fail", change
        assert words in worse.reason
    fewer = dataclasses.replace(seen, outputs={})
    assert "missing" in execute.judge(case, fewer, ROOT, committed()).reason


def test_the_selection_follows_the_nonce() -> None:
    """What is kept of the same output depends on what the certifier chose."""
    case, tensor = "block[fp32,tiny,first_batch2]", torch.arange(60000.0).reshape(600, 100)
    one, other = (selection.keep(Root(1, nonce), case, "x", tensor, share=4).values for nonce in ("a", "b"))
    assert one.shape != other.shape or not torch.equal(one, other)


ILL = Root(0, "cccccccc03")
"""A draw on which a right backend's worst element is beyond the bound that the committed reference gives: one token of
`block[bf16,tiny,odd]` answers rounding twice as strongly as any in the draws of that reference."""


@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_what_the_draw_makes_of_rounding_is_no_fault_of_the_backend(bench: Any, name: str) -> None:
    bench = dataclasses.replace(bench, root=ILL)
    verdict = bench.run("block[bf16,tiny,odd]", select(name))[1]
    (judged,) = verdict.judged.values()
    assert verdict.state == "pass", verdict.reason
    assert 2 * judged.reference.worst < judged.errors.worst < judged.bounds.worst


def test_what_is_wrong_is_wrong_on_such_a_draw_too(bench: Any) -> None:
    bench = dataclasses.replace(bench, root=ILL)
    for name, kernel in (("gated_add", gate_forgotten), ("linear", bias_dropped)):
        assert bench.run("block[bf16,tiny,odd]", bench.wrong(name, kernel))[1].state == "fail", name


def test_nothing_is_computed_again_where_no_bound_is_passed(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*arguments: Any) -> Any:
        raise AssertionError("the scene was computed once more")

    monkeypatch.setattr("helios_conformance.condition.rounded", never)
    assert bench.run("block[bf16,tiny,odd]", select("cpu"))[1].state == "pass"


def test_so_it_is_in_float32_where_the_sum_errs_and_not_its_rounding(bench: Any) -> None:
    bench = dataclasses.replace(bench, root=Root(8, "false alarms"))
    verdict = bench.run("vae[bf16,decode_groups]", ReferenceBackend())[1]
    worst = verdict.judged["group1.cache.12"]
    assert verdict.state == "pass", verdict.reason
    assert worst.errors.worst > 2 * worst.reference.worst
