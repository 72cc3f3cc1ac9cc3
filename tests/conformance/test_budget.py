"""The error budget: right ways of computing pass, wrong ones fail, each statistic for what it is there."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from helios import op
from helios_conformance import budget, terms
from helios_conformance.budget import Errors, bounds, directions, exact, exceeded, measure, rounds_once, unit
from helios_conformance.one_node import types_of

BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64


def script(name: str) -> ModuleType:
    """``tools`` is no package."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[2] / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look for annotations
    spec.loader.exec_module(module)
    return module


budget_margins = script("budget_margins")
WAYS = list(budget_margins.ways())


def label(way: Any) -> str:
    return f"{way.name}-{way.case}".replace(" ", "_").replace(",", "")


@pytest.mark.parametrize("way", [w for w in WAYS if w.right], ids=label)
def test_a_right_way_is_within_its_budget(way: Any) -> None:
    assert all(ratio <= 1.0 for ratio in budget_margins.margins(way, seeds=3).values())


@pytest.mark.parametrize("way", [w for w in WAYS if not w.right], ids=label)
def test_a_wrong_way_is_seen_in_every_draw(way: Any) -> None:
    assert max(budget_margins.margins(way, seeds=3).values()) > 1.0


def test_both_sides_are_there() -> None:
    assert sum(w.right for w in WAYS) >= 10
    assert sum(not w.right for w in WAYS) >= 20


def test_measure_of_known_errors() -> None:
    oracle = torch.tensor([3.0, -4.0], dtype=F64)
    errors = measure(torch.tensor([3.3, -4.4], dtype=F32), oracle)
    assert errors.norm == pytest.approx(0.1, rel=1e-6)
    assert errors.worst == pytest.approx(0.4 / math.sqrt(12.5), rel=1e-6)
    assert errors.gain == pytest.approx(0.1, rel=1e-6)
    assert (errors.misrounded, errors.count) == (1.0, 2)
    assert measure(torch.tensor([2.7, -3.6], dtype=F32), oracle).gain == pytest.approx(-0.1, rel=1e-6)


def test_rounding_to_nearest_is_no_misrounding() -> None:
    x = torch.randn(4000, dtype=F64, generator=torch.Generator().manual_seed(0))
    errors = measure(x.to(BF16), x)
    assert errors.misrounded == 0.0
    assert 0.37 < errors.norm / unit(BF16) < 0.58
    dropped = measure(budget_margins.truncated(x.float()), x)
    assert dropped.norm > 1.8 * errors.norm
    assert dropped.gain / unit(BF16) == pytest.approx(-0.72, abs=0.04)


@pytest.mark.parametrize("wrong", [math.inf, math.nan])
def test_a_result_that_is_not_finite_is_beyond_every_bound(wrong: float) -> None:
    oracle = torch.ones(4, dtype=F64)
    errors = measure(torch.tensor([1.0, wrong, 1.0, 1.0]), oracle)
    assert len(exceeded(errors, Errors(9e9, 9e9, 9e9, 0.9, 4))) == 4


def test_what_the_oracle_has_not_finite_is_left_out() -> None:
    errors = measure(torch.tensor([1.0, 7.0]), torch.tensor([1.0, math.inf], dtype=F64))
    assert (errors.norm, errors.count) == (0.0, 1)
    assert measure(torch.tensor([7.0]), torch.tensor([math.nan], dtype=F64)) == budget.NONE


def test_an_oracle_of_zeros_allows_no_other_number() -> None:
    zeros = torch.zeros(3, dtype=F64)
    assert measure(torch.zeros(3), zeros).norm == 0.0
    assert measure(torch.tensor([0.0, 1e-30, 0.0]), zeros).norm == math.inf


def test_bounds_have_their_floors() -> None:
    perfect = Errors(0.0, 0.0, 0.0, 0.0, 100)
    low = bounds("round", BF16, 1, 10**8, perfect)
    assert (low.norm, low.worst) == (0.6 * 2**-8, 5 * 2**-8)
    assert low.gain == pytest.approx(2**-8 / 8, rel=0.01)
    wide = bounds("reduce", F32, 100, 10**8, perfect)
    assert (wide.norm, wide.worst) == (10 * 2**-24, 50 * 2**-24)


def test_the_worst_element_may_err_by_its_own_size() -> None:
    peaks = torch.ones(10000, dtype=F64)
    peaks[0] = 100.0
    once = Errors(0.0, 0.0, 0.0, 0.0, 10000)
    assert budget.allowed("round", F32, 1, peaks, once).worst == pytest.approx(
        1.25 * 100 / math.sqrt(2) * 2**-23, rel=1e-3
    )
    assert bounds("round", F32, 1, 10000, once).worst == 5 * 2**-23


def test_in_float32_a_chain_of_roundings_counts_as_four_and_a_lucky_draw_does_not_forbid_it() -> None:
    # sample - sigma * v rounds once where sigma has few bits, and twice with the next draw.
    for part in (0.3, 0.0):
        chained = bounds("fused", F32, 1, 10**8, Errors(0.0, 0.0, 0.0, part, 100))
        assert (chained.norm, chained.misrounded) == (2**-23, 1.0)
    assert bounds("round", BF16, 1, 10**8, Errors(0.0, 0.0, 0.0, 0.3, 100)).norm == 0.6 * 2**-8


def test_bounds_follow_the_reference() -> None:
    often, seldom = (Errors(0.01, 0.5, 1e-4, part, 100) for part in (0.3, 0.0))
    assert bounds("round", BF16, 1, 100, seldom).norm == pytest.approx(0.0115)
    assert bounds("round", BF16, 1, 100, often).norm == pytest.approx(0.015)
    assert bounds("reduce", BF16, 1, 100, seldom).norm == pytest.approx(0.015)
    assert bounds("reduce", BF16, 1, 100, seldom).worst == pytest.approx(1.0)
    assert bounds("reduce", BF16, 1, 100, often).misrounded == 1.0
    assert bounds("reduce", BF16, 1, 10**8, seldom).misrounded == pytest.approx(0.05, abs=1e-4)
    assert rounds_once(seldom)
    assert not rounds_once(often)


def test_a_chain_of_forwards_has_more_room_in_norm_and_worst_element_only() -> None:
    assert budget.of_chain(Errors(0.3, 0.2, -1e-3, 0.5, 7)) == Errors(
        pytest.approx(0.4), pytest.approx(0.6), -1e-3, 0.5, 7
    )


def test_the_largest_of_two_keeps_the_sign_of_the_gain() -> None:
    one, other = Errors(0.1, 2.0, -3e-7, 0.25, 40), Errors(0.2, 1.0, 2e-7, 0.5, 30)
    assert budget.largest(one, other) == Errors(0.2, 2.0, -3e-7, 0.5, 40)


def test_what_rounding_costs_on_this_draw_is_allowed() -> None:
    """Numbers of bfloat16 times 1 + u/2 round back to themselves: the right result has a gain of −u/2."""
    oracle = torch.randn(9000, generator=torch.Generator().manual_seed(1)).to(BF16).double() * (1 + 2**-9)
    right = oracle.to(BF16)
    small = Errors(0.45 * 2**-8, 0.01, 1e-5, 0.0, 9000)
    errors = measure(right, oracle)
    assert errors.gain == pytest.approx(-(2**-9), rel=0.01)
    assert exceeded(errors, bounds("round", BF16, 1, 9000, small)) != []
    assert exceeded(errors, budget.allowed("round", BF16, 1, oracle, small)) == []
    plain = torch.randn(9000, dtype=F64, generator=torch.Generator().manual_seed(1))
    dropped = measure(budget_margins.truncated(plain.float()), plain)
    assert "gain" in " ".join(exceeded(dropped, budget.allowed("round", BF16, 1, plain, small)))


def test_a_few_large_elements_decide_the_gain() -> None:
    assert directions(torch.ones(500, dtype=F64)) == pytest.approx(500)
    peaks = torch.ones(1000, dtype=F64)
    peaks[:10] = 1e6
    assert directions(peaks) == pytest.approx(10, rel=1e-3)
    assert directions(torch.zeros(5, dtype=F64)) == 1.0
    few, many = (bounds("reduce", F32, 4, 1000, budget.NONE, along).gain for along in (10.0, 1000.0))
    assert few == pytest.approx(2**-24 / 8 + 4 * 2 * 2**-24 / math.sqrt(10))
    assert many < few


def test_a_statistic_beyond_its_bound_is_named() -> None:
    allowed = Errors(1.0, 1.0, 1.0, 0.5, 10)
    assert exceeded(Errors(1.0, 1.0, -1.0, 0.5, 10), allowed) == []
    assert "norm" in exceeded(Errors(1.1, 0.0, 0.0, 0.0, 10), allowed)[0]
    assert "gain" in exceeded(Errors(0.0, 0.0, -1.1, 0.0, 10), allowed)[0]
    assert exceeded(Errors(math.nan, 0.0, 0.0, 0.0, 10), allowed)


def test_exact_is_exact() -> None:
    x = torch.tensor([1.0, math.nan, -0.0])
    assert exact(x, x.clone())
    assert not exact(x, x.double())
    assert not exact(x, x[:2])
    assert not exact(x, torch.tensor([1.0, 2.0, 0.0]))
    assert not exact(x, torch.nextafter(x, torch.tensor(9.0)))
    assert exact(torch.tensor([1, 2]), torch.tensor([1, 2]))


@pytest.mark.parametrize("name", [n for n in op.names() if op.get(n).kind in ("reduce", "fused")])
def test_every_sum_has_its_length(name: str) -> None:
    """A reduction has an entry; a fused op gets the longest of its composition."""
    record = op.get(name)
    if record.kind == "reduce":
        assert name in terms.LONGEST
    for sample in record.samples():
        if not sample.big:
            made = sample.make(F32)
            k = terms.of_tensors(record, made, sample.attrs)
            assert k > 1 or name in ("unipc_step", "gelu_quantize")  # compositions of elementwise steps, and a maximum
            assert k >= terms.terms(record, types_of(made), sample.attrs)


def test_lengths_of_known_sums() -> None:
    def longest(name: str, case: str) -> int:
        record = op.get(name)
        sample = next(s for s in record.samples() if s.name == case)
        return terms.terms(record, types_of(sample.make(BF16)), sample.attrs)

    assert longest("linear", "wide") == 512
    assert longest("attention", "head128") == 257
    assert longest("attention", "odd") == 33
    assert longest("conv3d", "causal") == 4 * 27
    assert longest("patch_embed", "long") == 16 * 256
    assert longest("qk_norm_rope", "outliers") == 1536
    assert longest("linear_gelu", "odd") == 33
    assert longest("renoise_upsample", "small") == 4
    assert longest("cfg_zero_star", "odd") == 3 * 2 * 5 * 7
    assert longest("rope", "small") == 1


def test_large_scores_count_as_a_long_sum() -> None:
    """A score of 400, each of its sixteen roundings one of 400: the probability errs by up to 400 u · √16 / 2."""
    record = op.get("attention")
    q = torch.zeros(1, 3, 1, 16)
    q[..., 0] = 40.0
    assert terms.of_tensors(record, [q, q, q], {"scale": None}) == 800**2
    assert terms.of_tensors(record, [q, q, q], {"scale": 0.001}) == 16
    q[..., 1] = 40.0
    assert (
        terms.of_tensors(record, [q, q * torch.tensor([1.0, -1.0] * 8), q], {"scale": None}) == 1600**2
    )  # they cancel


def test_shared_factors_are_what_the_gain_is_an_average_over() -> None:
    record = op.get("scale_history_keys")
    keys = [torch.zeros(1, 9, 4, 8), torch.zeros(4)]
    assert terms.factors(record, keys) == 4
    assert terms.of_tensors(record, keys, {"split": 5}) == 9
    assert terms.factors(op.get("rope"), [torch.zeros(1)]) is None
    oracle = torch.randn(9000, dtype=F64, generator=torch.Generator().manual_seed(1))
    alone, shared = (budget.allowed("round", F32, 1, oracle, budget.NONE, n).gain for n in (None, 4))
    assert shared > 10 * alone
    assert budget.allowed("round", BF16, 1, oracle, budget.NONE, 4) == budget.allowed(
        "round", BF16, 1, oracle, budget.NONE
    )


def test_the_statistics_are_those_of_errors() -> None:
    assert set(budget_margins.STATISTICS) < set(Errors.__dataclass_fields__)


def test_an_ill_conditioned_draw_scales_the_norm_and_nothing_else() -> None:
    known = Errors(1.0, 2.0, 0.5, 0.25, 10)
    assert budget.conditioned(known, 3.0, 2.0) == Errors(1.5, 2.0, 0.5, 0.25, 10)
    assert budget.conditioned(known, 1.0, 2.0) == known  # never less
    assert budget.conditioned(known, 1.0, 0.0) == known  # where ordinary draws have no error at all


def test_an_element_may_be_off_by_the_bound_of_all_or_by_its_own_and_each_is_asked() -> None:
    oracle = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=F64)  # rms 1
    bound = Errors(0.5, 0.1, 0.01, 1.0, 4)
    allowance = torch.tensor([0.4, 0.01, 0.01, 0.01], dtype=F64)

    def worst(*off: float) -> tuple[float, float]:
        result = oracle + torch.tensor(off, dtype=F64)
        judged = budget.uneven(bound, result, oracle, allowance)
        assert dataclasses.replace(judged, worst=0.1) == bound  # nothing else changes
        return measure(result, oracle).worst, judged.worst

    assert worst(0.3, 0.05, 0.0, 0.0) == pytest.approx((0.3, 0.4))
    assert worst(0.0, -0.3, 0.0, 0.0) == pytest.approx((0.3, 0.1))  # the same error elsewhere
    assert worst(0.3, 0.0, 0.2, 0.0) == pytest.approx((0.3, 0.15))  # twice beyond, though not the largest
    assert worst(0.5, 0.0, 0.0, 0.0) == pytest.approx((0.5, 0.4))
    assert worst(0.0, 0.0, 0.0, 0.0) == (0.0, 0.1)
    assert worst(math.nan, 0.0, 0.0, 0.0) == (math.inf, 0.1)


def test_the_largest_element_of_a_composition_may_be_rounded_up_twice() -> None:
    u, known = unit(torch.bfloat16), Errors(2e-3, 1e-3, 0.0, 0.3, 100)
    twice = bounds("fused", torch.bfloat16, 1, 100, known, top=30.0).worst
    assert twice == 2.25 * 30.0 * u
    once = dataclasses.replace(known, misrounded=0.0)
    assert bounds("fused", torch.bfloat16, 1, 100, once, top=30.0).worst == 1.25 * 30.0 * u
    assert bounds("reduce", torch.bfloat16, 1, 100, known, top=30.0).worst == 1.25 * 30.0 * u
