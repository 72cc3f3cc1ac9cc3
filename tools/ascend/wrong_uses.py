"""Wrong uses of torch_npu's operators, each of which the suite must catch over the emulation.

    python tools/ascend/wrong_uses.py [NAME ...] [--precision bf16 fp32] [--seed 0] [--out FILE.md]

A mutant changes what the backend passes to an operator, as if its kernel were written so. Cases of the ops that the
mistake concerns run until one fails that the right backend passes. Exit code 1 where a mutant survives.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from helios.backend import Kernel, select
from helios_conformance import execute, references, suite
from helios_conformance.case import Case
from helios_conformance.draws import Root
from helios_conformance.session import Session

__all__ = ["MUTANTS", "Mutant", "caught", "main"]

Call = dict[str, Any]
"""Arguments by the names of the schema."""
Change = Callable[[Call], Call]
FLOAT32 = ("fp32",)
"""A tenth of a thousandth of a row of ordinary size is lost in the rounding of 16 bits, and no sample of the operator
that adds has rows small enough."""
LONG = ("long", "long_keys")


@dataclasses.dataclass(frozen=True, slots=True)
class Mutant:
    """A mistake: in calls of ``operators``, seen in cases of ``ops``."""

    name: str
    wrong: str
    operators: tuple[str, ...]
    ops: tuple[str, ...]
    change: Change
    precisions: tuple[str, ...] = ("bf16", "fp32")
    operand: Callable[[torch.Tensor], torch.Tensor] | None = None
    """Instead: what is done to the first operand of the kernel of the one op, before the kernel runs."""


ATTENTION = ("npu_fused_infer_attention_score", "npu_fusion_attention", "npu_fusion_attention_v3")
LAYOUT = {"BNSD": "BSND", "BSND": "BNSD", "BSH": "SBH", "SBH": "BSH"}


def _without(key: str) -> Change:
    """Left to its default."""
    return lambda call: {k: v for k, v in call.items() if k != key}


def _with(**given: Any) -> Change:
    return lambda call: {**call, **given}


def _layout(call: Call) -> Call:
    return {**call, "input_layout": LAYOUT[call["input_layout"]]}


def _merged(call: Call) -> Call:
    """Heads and rows read the other way round, with sizes that fit: what a view instead of a transpose does."""
    heads = {key: call[key].transpose(1, 2).reshape(call[key].shape) for key in ("query", "key", "value")}
    return {**call, **heads}


def _mask(call: Call) -> Call:
    """A mask that says true where a key counts: for these operators true hides."""
    at = {"BNSD": 2, "SBH": 0}.get(call["input_layout"], 1)
    mask = torch.ones(1, 1, call["query"].shape[at], call["key"].shape[at], dtype=torch.bool)
    mask[..., -1] = False  # so that something is left to attend to
    return {**call, "atten_mask": mask}


def _swapped(call: Call) -> Call:
    return {**call, "r1": call["r2"], "r2": call["r1"]}


ROTATION, ADDED = ("npu_rotary_mul",), ("npu_add_layer_norm",)
ROPE = ("rope", "qk_norm_rope")
TIME = ("timestep_embedding",)
NORMS = ("adaln", "gated_add_adaln", "qk_norm_rope", "rms_norm", "layer_norm", "layer_norm_affine")
MUTANTS = (
    Mutant("rotation_of_halves", "half, not interleave", ROTATION, ROPE, _with(rotary_mode="half")),
    Mutant("cosine_for_sine", "r1 and r2 exchanged", ROTATION, ROPE, _swapped),
    Mutant("mask_flipped", "a mask whose ones mean: attend", ATTENTION, ("attention",), _mask),
    Mutant("scale_of_one", "the scale left to its default", ATTENTION, ("attention",), _without("scale")),
    Mutant("other_layout", "the layout named the other way", ATTENTION, ("attention",), _layout),
    Mutant("heads_viewed_as_rows", "a view where a transpose belongs", ATTENTION, ("attention",), _merged),
    Mutant("epsilon_of_add_layer_norm", "1e-5, its default", ADDED, NORMS, _with(epsilon=1e-5), FLOAT32),
    Mutant("epsilon_of_rms_norm", "1e-5 instead of 1e-6", ("npu_rms_norm",), NORMS, _with(epsilon=1e-5)),
    Mutant("sum_not_asked_for", "no additional_output", ADDED, NORMS, _without("additional_output")),
    Mutant("timestep_in_16_bits", "999 becomes 1000", (), TIME, dict, operand=lambda t: t.bfloat16().to(t.dtype)),
    Mutant("timestep_as_integer", "its fraction is lost", (), TIME, dict, operand=lambda t: t.int().to(t.dtype)),
)


@contextlib.contextmanager
def mistaken(mutant: Mutant, backend: Any) -> Iterator[list[str]]:
    """Within, the operators, or a kernel, are called wrongly; the list names those that were called at all."""
    from npu_emulator.rules import OPERATORS

    right, called, kernels = dict(OPERATORS), list[str](), backend.kernels
    if mutant.operand is not None:
        backend.__dict__["kernels"] = {**kernels, mutant.ops[0]: _wrapped(kernels[mutant.ops[0]], mutant, called)}

    def wrap(name: str) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            called.append(name)
            names = (one.name for one in getattr(torch.ops.npu, name).default._schema.arguments)
            return right[name](**mutant.change({**dict(zip(names, args, strict=False)), **kwargs}))

        return run

    OPERATORS.update({name: wrap(name) for name in mutant.operators})
    try:
        yield called
    finally:
        OPERATORS.update(right)
        backend.__dict__["kernels"] = kernels


def _wrapped(kernel: Kernel, mutant: Mutant, called: list[str]) -> Kernel:
    def run(first: torch.Tensor, *rest: Any, **attrs: Any) -> Any:
        called.append(mutant.ops[0])
        assert mutant.operand is not None
        return kernel.run(mutant.operand(first), *rest, **attrs)

    return Kernel(run)


def _state(case: Case, backend: Any, seed: int) -> tuple[str, str]:
    verdict = execute.run_here(case, Session(backend, Root(seed, "n")), references.committed())[1]
    return verdict.state, str(verdict.reason)


def caught(mutant: Mutant, backend: Any, precision: str, seed: int = 0) -> tuple[str, str]:
    """The case that failed and how; or nothing and why: it survived, or its operators were never called."""
    reached = False
    for case in suite.choose(precision, "quick", ["ops"]):
        fits = case.params.get("op") in mutant.ops and case.check in ("op_values", "op_specials")
        if not fits or str(case.params.get("sample")) in LONG:
            continue
        with mistaken(mutant, backend) as called:
            state, reason = _state(case, backend, seed)
        reached = reached or bool(called)
        if called and state != "pass" and _state(case, backend, seed)[0] == "pass":
            return case.id, reason
    return "", "survived" if reached else "its operators are not called"


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print each row as it comes, and the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="all unless given")
    parser.add_argument("--precision", nargs="*", default=["bf16", "fp32"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the table as Markdown")
    args = parser.parse_args(argv)
    backend = select("ascend:emulated")
    rows, wrong = [], 0
    for mutant in MUTANTS:
        if args.names and mutant.name not in args.names:
            continue
        for precision in (p for p in mutant.precisions if p in args.precision):
            case, reason = caught(mutant, backend, precision, args.seed)
            elsewhere = not case and reason != "survived"
            wrong += not case and not elsewhere
            rows.append((mutant.name, mutant.wrong, precision, case or "–", reason.split(";")[0][:110]))
            print("  ".join(rows[-1]), flush=True)
    never = {row[0] for row in rows} - {row[0] for row in rows if row[3] != "–"}
    print(f"{len(rows)} rows, {wrong} survived; caught in no precision: {sorted(never) or 'none'}")
    if args.out:
        args.out.write_text(_table(rows))
    return 1 if wrong or never or not rows else 0


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    head = ("mutant", "what is wrong", "precision", "caught by", "what failed")
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ("---",) * 5, *rows)) + "\n"


if __name__ == "__main__":
    sys.exit(main())
