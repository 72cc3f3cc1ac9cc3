"""Scopes of precisions: which cases each has, and that what is wrong in a quantised one is seen there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helios import op
from helios.backend import Kernel, ReferenceBackend, select
from helios.cli import main, options
from helios.errors import InputError
from helios.ops.quantize import E4M3, quantize_rows, scaled_linear
from helios.precision import PRECISIONS as KNOWN
from helios_conformance import execute, graphs, references, scope, suite
from helios_conformance.case import LEVELS, PRECISIONS, Case
from helios_conformance.draws import Root
from helios_conformance.runner import check_filters, precision_of
from helios_conformance.session import Session

ROOT = Root(5, "scopes")
QUANTISED = ("fp8", "fp8-attention", "fp8-weights")
REFERENCES = references.committed()


def ids(of: str, **wanted: Any) -> set[str]:
    """Of the cases in a precision's scope that have these attributes."""
    return {c.id for c in suite.all_cases(of) if all(getattr(c, k) == v for k, v in wanted.items())}


# --- which cases ---


def test_every_precision_is_a_scope_but_the_oracle_s() -> None:
    assert set(PRECISIONS) == set(KNOWN) - {"fp64"}
    assert tuple(sorted(PRECISIONS)) == tuple(sorted(options.PRECISIONS))
    assert set(scope.QUANTISED) == {p.name for p in KNOWN.values() if p.quantised}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_ids_are_unique_and_every_level_has_cases(precision: str) -> None:
    cases = suite.all_cases(precision)
    assert len({case.id for case in cases}) == len(cases)
    assert {case.level for case in cases} == set(LEVELS)
    assert {case.precision for case in cases} <= {precision, scope.dtype_scope(precision)}


@pytest.mark.parametrize("precision", [p for p in PRECISIONS if p not in QUANTISED])
def test_a_working_dtype_has_no_quantised_case(precision: str) -> None:
    assert scope.dtype_scope(precision) == precision
    for case in suite.all_cases(precision):
        assert case.precision == precision
        assert "quantize" not in case.id
        assert "scaled_" not in case.id
        assert "packed" not in case.id


@pytest.mark.parametrize("precision", QUANTISED)
def test_single_ops_of_the_working_dtype_belong_to_a_quantised_scope(precision: str) -> None:
    assert scope.dtype_scope(precision) == "bf16"
    assert ids(precision, level="ops", precision="bf16") == ids("bf16", level="ops")
    own = {i.partition("[")[0] for i in ids(precision, check="op_values", precision=precision)}
    assert own == set(scope.QUANTISED[precision]) == set(scope.ops(precision))
    assert own <= set(op.names())


@pytest.mark.parametrize("precision", QUANTISED)
def test_what_holds_no_quantised_product_is_shared(precision: str) -> None:
    for check in ("sampler", "vae", "vae_half"):
        assert ids(precision, check=check) == ids("bf16", check=check) != set()


@pytest.mark.parametrize("precision", QUANTISED)
def test_blocks_models_and_videos_are_judged_anew(precision: str) -> None:
    shared = scope.SHARED | scope.BESIDE
    for case in suite.all_cases(precision):
        assert case.precision == precision or case.check in shared, case.id
    wanted = {case.id.replace("[bf16", f"[{precision}") for case in suite.all_cases("bf16") if case.check not in shared}
    assert ids(precision, precision=precision) >= wanted
    assert "block" in {case.check for case in suite.all_cases(precision) if case.id in wanted}


def test_every_quantised_op_is_judged_somewhere() -> None:
    judged = {name for precision in PRECISIONS for name in scope.ops(precision)}
    assert judged == set(op.names())


# --- choosing ---


def test_a_filter_takes_cases_of_the_scope_whatever_their_precision() -> None:
    found = [case.id for case in suite.choose("fp8", filters=["linear[bf16,small]", "scaled_linear"])]
    assert "linear[bf16,small]" in found
    assert "scaled_linear[fp8,small]" in found
    assert not [i for i in found if "fp8-" in i]
    with pytest.raises(InputError, match=r"did you mean 'linear\[bf16,small\]'"):
        check_filters(["scaled_linear[bf16,small]"], "bf16")
    with pytest.raises(InputError, match=r"did you mean 'scaled_linear\[fp8,small\]'"):
        check_filters(["scaled_linear[bf16,small]"], "fp8")


def test_ids_name_their_precision() -> None:
    assert precision_of(["linear[fp32,small]"]) == "fp32"
    assert precision_of(["quantize_rows[fp8,small]", "gelu_quantize[fp8,odd]"]) == "fp8"
    assert precision_of(["quantize_rows[fp8-weights,small]"]) == "fp8-weights"
    assert precision_of(["linear"]) == ""
    with pytest.raises(InputError, match="several precisions"):
        precision_of(["quantize_rows[fp8,small]", "quantize_rows[fp8-weights,small]"])


def test_a_case_is_found_by_its_id_in_whichever_scope() -> None:
    assert suite.find("packed_linear[fp8-weights,small]").precision == "fp8-weights"
    assert suite.find("linear[bf16,small]").precision == "bf16"


# --- the command ---


@pytest.fixture
def quick_bundle(monkeypatch: pytest.MonkeyPatch) -> None:
    # Lowering the published size once more for each bundle would be most of the time here.
    monkeypatch.setattr(graphs, "of_spec", lambda *given: "left out by a test")


@pytest.mark.usefixtures("quick_bundle")
def test_the_reference_passes_a_few_cases_of_fp8(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = ["quantize_rows[fp8,odd]", "scaled_linear[fp8,odd]", "linear[bf16,small]"]
    filters = [word for case in wanted for word in ("--filter", case)]
    command = ["certify", "--backend", "reference", "--precision", "fp8", "--level", "ops", *filters]
    assert main([*command, "--out", str(tmp_path / "out")]) == 0
    assert "passed, which is not a certification" in " ".join(capsys.readouterr().out.split())
    made = json.loads((tmp_path / "out" / "report.json").read_text())
    assert made["scope"]["precision"] == "fp8"
    assert {case["id"]: case["state"] for case in made["cases"]} == dict.fromkeys(wanted, "pass")
    assert main(["verify", str(tmp_path / "out")]) == 0


@pytest.mark.usefixtures("quick_bundle")
def test_a_backend_that_does_not_offer_it_is_told_what_it_offers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["certify", "--backend", "cpu", "--precision", "fp8", "--filter", "quantize_rows[fp8,odd]"]
    assert main([*command, "--out", str(tmp_path / "out")]) == 1
    told = " ".join(capsys.readouterr().out.split())
    assert "the backend does not offer fp8, but " in told
    for name in select("cpu").precisions:
        assert name in told.partition("does not offer fp8, but ")[2]


def test_a_precision_that_nobody_knows_is_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["certify", "--backend", "reference", "--precision", "fp9"]) == 2
    assert "did you mean 'fp8'" in capsys.readouterr().err
    assert main(["cases", "list", "--precision", "fp8-attentoin"]) == 2
    assert "did you mean 'fp8-attention'" in capsys.readouterr().err


# --- what a scope catches ---


class With(ReferenceBackend):
    """The reference with other kernels."""

    def __init__(self, **kernels: Any) -> None:
        super().__init__()
        self.__dict__["kernels"] = {**super().kernels, **{name: Kernel(run) for name, run in kernels.items()}}


def verdict(case: str | Case, backend: ReferenceBackend) -> tuple[str, str]:
    found = suite.find(case) if isinstance(case, str) else case
    came = execute.run_here(found, Session(backend, ROOT), REFERENCES)[1]
    return came.state, came.reason


BLOCKS = ("block[fp8,tiny,stages]", "block[fp8,tiny,first]")


@pytest.mark.parametrize("case", BLOCKS)
def test_the_reference_passes_blocks(case: str) -> None:
    assert verdict(case, ReferenceBackend()) == ("pass", "")


def plain_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As in blocks that are to stay in the working dtype."""
    made: Tensor = scaled_linear.fn(*quantize_rows.fn(x), *quantize_rows.fn(weight), bias, dtype=x.dtype)
    return made


def test_a_product_that_has_to_stay_in_the_working_dtype_is_seen_where_it_does_not() -> None:
    """Of a block the whole error grows little by it: what sees it are the cases of single ops, which the scope has."""
    state, reason = verdict("linear[bf16,small]", With(linear=plain_linear))
    assert state == "fail"
    assert "norm of the error" in reason


def wide_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Nothing is quantised: numbers of the working dtype and scales of one."""
    return x, torch.ones(*x.shape[:-1], 1)


def test_quantising_nothing_is_better_in_blocks_and_another_type_at_ops() -> None:
    """An error budget bounds errors from above: who computes fp8 in bfloat16 errs less, and passes. What it promised of
    single ops, numbers of eight bits, it does not keep."""
    backend = With(quantize_rows=wide_rows)
    for case in BLOCKS:
        assert verdict(case, backend) == ("pass", "")
    state, reason = verdict("quantize_rows[fp8,odd]", backend)
    assert state == "fail"
    assert "wanted float8_e4m3fn" in reason


def test_a_scale_of_the_wrong_row_is_seen_in_a_block() -> None:
    def shifted(x: Tensor) -> tuple[Tensor, Tensor]:
        q, scale = quantize_rows.fn(x)
        assert q.dtype == E4M3
        return q, scale.roll(1, -2)

    state, reason = verdict(BLOCKS[0], With(quantize_rows=shifted))
    assert state == "fail"
    assert "norm of the error" in reason


def by_tensor(x: Tensor) -> tuple[Tensor, Tensor]:
    """One scale for all rows."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = wide.abs().amax() / 448
    return (wide.float() / scale.float()).to(E4M3), scale.expand(*x.shape[:-1], 1).clone()


def narrow_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Tensor:
    """As in fp8-attention."""
    made: Tensor = op.get("quantized_attention").fn(q, k, v, scale=scale)
    return made


UNSEEN = {
    "rows": (With(quantize_rows=by_tensor), "quantize_rows[fp8,odd]"),
    "attention": (With(attention=narrow_attention), "attention[bf16,head128]"),
}


@pytest.mark.parametrize("name", UNSEEN)
def test_what_whole_graphs_do_not_show_single_ops_do(name: str) -> None:
    """The limit that docs/precision.md states, and what holds in spite of it."""
    backend, single = UNSEEN[name]
    for case in BLOCKS:
        assert verdict(case, backend) == ("pass", "")
    assert verdict(single, backend)[0] == "fail"


def test_rounding_downwards_is_seen_in_a_block() -> None:
    def cut(x: Tensor) -> tuple[Tensor, Tensor]:
        q, scale = quantize_rows.fn(x)
        exact = x.to(scale.dtype) / scale
        lower = (q.view(torch.uint8) - 1).view(E4M3)
        over = (q.to(scale.dtype).abs() > exact.abs()) & (q.view(torch.uint8) & 0x7F > 0)
        return torch.where(over, lower.float(), q.float()).to(E4M3), scale

    assert verdict(BLOCKS[0], With(quantize_rows=cut))[0] == "fail"
