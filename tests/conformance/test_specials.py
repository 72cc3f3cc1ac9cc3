"""NaN, infinities, planted outliers, rows that show an epsilon, and indices beyond 32 bits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import helios.ops  # noqa: F401
from helios import op
from helios.backend import Backend, Kernel, ReferenceBackend
from helios.op import Arg
from helios_conformance import execute, references, scope, selection, suite
from helios_conformance.case import Case, Observation, Verdict
from helios_conformance.checks import op_large
from helios_conformance.draws import Root
from helios_conformance.session import Session

REFERENCES = references.committed()
ROOT = Root(4)
SPECIALS = [case.id for case in suite.all_cases("bf16") if case.check == "op_specials"]


def wrong(name: str, run: Callable[..., Any]) -> Backend:
    backend = ReferenceBackend()
    backend.__dict__["kernels"] = {**backend.kernels, name: Kernel(run)}
    return backend


def judged(case: str | Case, backend: Backend) -> tuple[Observation, Verdict]:
    found = suite.find(case) if isinstance(case, str) else case
    return execute.run_here(found, Session(backend, ROOT), REFERENCES)


def silu(x: Tensor) -> Tensor:
    return F.silu(x.float()).to(x.dtype)


def test_every_op_with_operands_has_both() -> None:
    names = {name for name in scope.ops("bf16") if op.get(name).operands}
    assert {case.partition("[")[0] for case in SPECIALS} == names
    assert len(SPECIALS) == 2 * len(names)


@pytest.mark.parametrize("precision", ["fp8", "fp8-attention", "fp8-weights"])
def test_quantised_scopes_have_those_of_their_dtype(precision: str) -> None:
    """e4m3 has no infinity, and one NaN may spoil the row that is quantised with it."""
    assert [case.id for case in suite.all_cases(precision) if case.check == "op_specials"] == SPECIALS


@pytest.mark.parametrize("case", [*SPECIALS, "linear[fp32,small,nan]", "attention[fp32,odd,inf]"])
def test_the_reference_propagates(case: str) -> None:
    seen, verdict = judged(case, ReferenceBackend())
    assert verdict.state == "pass", verdict.reason
    assert seen.facts["engine"] is False


def swallows(x: Tensor) -> Tensor:
    return silu(x).nan_to_num()


def spreads(x: Tensor) -> Tensor:
    out = silu(x)
    return out + 0 * out.sum()


def wrong_beside(x: Tensor) -> Tensor:
    """Right, unless something is not finite: then the others are off."""
    return silu(x if x.isfinite().all() else x * 1.05)


def saturates(x: Tensor) -> Tensor:
    return silu(x).clamp(max=3e38)


@pytest.mark.parametrize(
    ("value", "run", "words"),
    [
        ("nan", swallows, "where the oracle is NaN, the result is a number"),
        ("nan", spreads, "where the oracle is finite, the result is not finite"),
        ("nan", wrong_beside, "norm of the error"),
        ("inf", saturates, "where the oracle is infinite, the result is finite"),
        ("inf", wrong_beside, "norm of the error"),
    ],
)
def test_a_kernel_that_treats_it_otherwise_fails(value: str, run: Callable[..., Any], words: str) -> None:
    _, verdict = judged(f"silu[bf16,small,{value}]", wrong("silu", run))
    assert verdict.state == "fail"
    assert words in verdict.reason


def test_data_movement_that_loses_a_nan_fails() -> None:
    _, verdict = judged("concat[bf16,tokens,nan]", wrong("concat", lambda xs, dim: torch.cat(xs, dim).nan_to_num()))
    assert "the result is a number" in verdict.reason


def test_an_attention_that_clears_its_scores_fails() -> None:
    def cleared(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None) -> Tensor:
        body: Callable[..., Tensor] = op.get("attention").fn
        return body(q.nan_to_num(), k, v, scale=scale)

    _, verdict = judged("attention[bf16,odd,nan]", wrong("attention", cleared))
    assert "nan in i0" in verdict.reason
    assert "nan in i1" not in verdict.reason


def test_an_output_that_is_missing_fails() -> None:
    case = suite.find("add[bf16,small,nan]")
    seen, _ = judged(case, ReferenceBackend())
    assert set(seen.outputs) == {"o0@i0", "o0@i1"}
    some = dataclasses.replace(seen, outputs={"o0@i0": seen.outputs["o0@i0"]})
    assert execute.judge(case, some, ROOT, REFERENCES).state == "fail"


def fills(name: str) -> set[str]:
    args = [a for s in op.get(name).samples() if not s.big for a in s.inputs]
    flat = [a for arg in args for a in (arg if isinstance(arg, tuple) else (arg,))]
    return {a.fill for a in flat if isinstance(a, Arg)}


@pytest.mark.parametrize("name", ["rms_norm", "layer_norm", "adaln", "gated_add_adaln", "qk_norm_rope"])
def test_norms_meet_rows_that_show_their_epsilon(name: str) -> None:
    assert "tiny" in fills(name)


@pytest.mark.parametrize(
    "name",
    [
        *("rms_norm", "layer_norm", "adaln", "gated_add_adaln", "qk_norm_rope", "channel_norm", "channel_norm_silu"),
        *("linear", "linear_gelu", "qkv_linear", "conv3d", "patch_embed", "attention"),
    ],
)
def test_outliers_are_planted(name: str) -> None:
    assert "outliers" in fills(name)


SMALL = 1 << 17
EDGE = 1 << 16


def large(name: str) -> Case:
    """The case at a size where "32 bits" end at ``EDGE``."""
    case = suite.find(f"{name}[bf16,int32]")
    assert case.suite == "full"
    assert not case.required
    return dataclasses.replace(case, params={**case.params, "elements": SMALL, "edges": [EDGE // 2, EDGE]})


@pytest.mark.parametrize("name", op_large.LARGE)
def test_the_reference_counts_far(name: str) -> None:
    seen, verdict = judged(large(name), ReferenceBackend())
    assert verdict.state == "pass", (verdict.reason, seen.facts)
    assert seen.outputs["o0"].values.nbytes <= 64 << 10


def test_a_large_case_without_its_output_fails() -> None:
    empty = Observation()
    verdict = execute.judge(suite.find("add[bf16,int32]"), empty, ROOT, REFERENCES)
    assert (verdict.state, verdict.reason) == ("fail", "outputs are none, wanted o0")


def wrapped(flat: Tensor) -> Tensor:
    """What an index that wraps at the edge gives."""
    return flat[torch.arange(flat.numel()) % EDGE]


def writes_wrapped(name: str) -> Callable[..., Tensor]:
    def run(*operands: Any, **attrs: Any) -> Tensor:
        right: Tensor = op.get(name).fn(*operands, **attrs)
        return wrapped(right.reshape(-1)).reshape(right.shape)

    return run


def reads_wrapped(x: Tensor, *, count: int) -> Tensor:
    body: Callable[..., Tensor] = op.get("last_frames").fn
    return body(wrapped(x.reshape(-1)).reshape(x.shape), count=count)


@pytest.mark.parametrize("name", ["add", "concat", "upsample_nearest"])
def test_an_index_that_wraps_is_seen_in_what_is_written(name: str) -> None:
    _, verdict = judged(large(name), wrong(name, writes_wrapped(name)))
    assert verdict.state == "fail"


def test_an_index_that_wraps_is_seen_in_what_is_read() -> None:
    _, verdict = judged(large("last_frames"), wrong("last_frames", reads_wrapped))
    assert "data movement must be exact" in verdict.reason


def test_only_the_last_elements_wrong_is_seen() -> None:
    def run(x: Tensor, y: Tensor) -> Tensor:
        out = x + y
        out.view(-1)[-3:] = 0
        return out

    assert judged(large("add"), wrong("add", run))[1].state == "fail"


class Full(ReferenceBackend):
    def memory(self) -> tuple[int, int]:
        return 1000, 2000


def test_too_little_memory_is_told_and_nothing_runs() -> None:
    seen, verdict = judged("add[bf16,int32]", Full())
    assert verdict.state == "not_run"
    assert verdict.reason == "it needs 9.0 GB of free memory, and what is free is 0.0 GB"
    assert (seen.facts["free"], seen.outputs) == (1000, {})


def test_the_block_is_of_prime_length() -> None:
    assert all(op_large.BLOCK % n for n in range(2, 2049))
    assert all(edge % op_large.BLOCK for edge in (*op_large.EDGES, 2**32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_element_that_is_not_finite_is_seen_wherever_it_is(dtype: torch.dtype, bad: float) -> None:
    for count in (1, 7, 1000, 4099):
        for at in {0, count // 2, count - 1}:
            x = torch.linspace(-3, 3, count, dtype=dtype)
            assert selection.all_finite(x)
            x[at] = bad
            assert not selection.all_finite(x)
    assert selection.all_finite(torch.empty(0, 3, dtype=dtype))
    assert selection.all_finite(torch.arange(5))
