"""Our kernels on this device: whether they are right, how fast they are against the floor, and their best tiles.

    tools/on_gpu.sh kernels [--tune] [--device cpu --tiny] [--budget SECONDS] [--out FOLDER]

In the order of value: the quick suite in bf16, captured steps, the quick suite of the quantised ops, the libraries that
are chosen, every op's time, tiles, the quick suite in fp32, the full suite. ``--tune`` takes the tiles first.
``sm_90.json`` in the folder is the table of what was tuned, for ``backends/cuda/helios_cuda/tables``; nothing of it is
used before it stands there.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import rates
import running
import torch
from results import Clock, Item, Record, Results
from rig import Rig

PART = "kernels"
TINY_OPS = ("gated_add_adaln", "linear")
"""Whose first form is timed where only the plumbing is tested; the first one is tuned, too."""


def main(argv: list[str] | None = None) -> int:
    """Measure; the exit codes of ``running.run``."""
    options = running.parser(PART, "Correctness, speed and tiles of the kernels.")
    options.add_argument("--tune", action="store_true", help="the best tiles before anything else")
    args = options.parse_args(argv)
    clock = Clock(args.budget)
    if args.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    rig = Rig.on(args.device, args.tiny)
    torch.manual_seed(0)

    def report(records: Sequence[Record]) -> Iterator[str]:
        import speeds
        import tuning

        yield from _suite(records)
        yield from speeds.report(records)
        yield from tuning.report(records)
        yield from _table(args, rig, records)

    return running.run(PART, args, clock, lambda results: _items(rig, args, results), report)


def _items(rig: Rig, args: argparse.Namespace, results: Results) -> Iterator[Item]:
    """Everything; what has to be loaded for a group is loaded when its turn comes."""
    import judged

    from helios.backend import select

    backend: Any = select("cuda" if rig.cuda else "cuda:interpret")
    plan = _Plan(rig, args, backend)
    if args.tune:
        yield from plan.tiles()
    yield from judged.first(rig, backend, "bf16")
    yield from judged.execution(rig)
    for precision in ("fp8-attention", "fp8-weights") if not rig.tiny else ():
        yield from judged.first(rig, backend, precision)
    yield from plan.choices(results)
    yield from plan.speeds(results)
    if not args.tune:
        yield from plan.tiles()
    for precision in ("fp32",) if not rig.tiny else ():
        yield from judged.first(rig, backend, precision)
    for precision in ("bf16", "fp8-attention", "fp8-weights", "fp32"):
        yield from judged.everything(rig, backend, precision)


class _Plan:
    """The forms of a chunk, found when first asked for: with the VAE in bf16, then its own in fp32, then of the
    precisions that quantise."""

    def __init__(self, rig: Rig, args: argparse.Namespace, backend: Any) -> None:
        self.rig, self.backend = rig, backend
        self.rates = rates.of_device(rig.name, args.out)
        self._forms: list[Any] = []

    @property
    def architecture(self) -> str:
        """``sm_90``; in the interpreter that of an H100, whose kernels and candidates are tried."""
        return "sm_{}{}".format(*torch.cuda.get_device_capability()) if self.rig.cuda else "sm_90"

    def forms(self) -> list[Any]:
        """Heaviest first."""
        if not self._forms:
            import forms
            import speeds

            graphs = dict(forms.plan_nodes(self.rig.tiny))
            if self.rig.tiny:
                graphs = {"denoise.0": graphs["denoise.0"]}
            else:
                graphs["decode fp32"] = forms.plan_nodes(False, torch.float32)["decode"]
                for name in speeds.QUANTISED:
                    graphs |= {f"{graph} {name}": nodes for graph, nodes in forms.plan_nodes(False, name=name).items()}
            found = forms.forms(graphs, self.architecture)
            self._forms = list(forms.heaviest(found, self._floor))
            if self.rig.tiny:
                by_op = {form.node.op: form for form in reversed(self._forms)}
                self._forms = [by_op[name] for name in TINY_OPS]
        return self._forms

    def _floor(self, form: Any) -> float:
        return self.rates.floor(form.node.op, form.dtype, form.flops, form.moved) or 0.0

    def choices(self, results: Results) -> Iterator[Item]:
        import speeds

        speeds.recall(self.backend, results.records)
        return speeds.choices(self.rig, self.backend, self.forms())

    def speeds(self, results: Results) -> Iterator[Item]:
        import speeds

        return speeds.speeds(self.rig, self.backend, self.forms(), self.rates)

    def tiles(self) -> Iterator[Item]:
        import tuning

        found = tuning.jobs(self.forms(), self.architecture)
        return itertools.islice(tuning.items(self.rig, found), 2 if self.rig.tiny else None)


def _suite(records: Sequence[Record]) -> Iterator[str]:
    """Cases by suite, and what is wrong with steps."""
    groups: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for record in records:
        if record["id"].startswith("suite/"):
            for state in ("pass", "fail", "unsupported", "not_run"):
                groups[record["column"]][state] += record.get(state, 0)
            groups[record["column"]]["late"] += record["status"] == "not measured"
    for name, counts in groups.items():
        passed, failed, late = counts["pass"], counts["fail"], counts["late"]
        others = f"{counts['unsupported']} unsupported, {counts['not_run']} not run"
        yield f"suite {name}: {passed} pass, {failed} fail, {others}; no time for {late} items"
    for record in records:
        if record["id"] == "execution/steps" and "checks" in record:
            state = "all hold" if record["correct"] else record["why"]
            yield f"steps captured, fetched, eager: {len(record['checks'])} checks, {state}"


def _table(args: argparse.Namespace, rig: Rig, records: Sequence[Record]) -> Iterator[str]:
    """Write the table of tiles and say where."""
    import tuning
    from environment import commit, header

    head = header(PART, args.device, args.tiny)
    origin = f"{head['device']}, triton {head['triton']}, torch {head['torch']}, commit {commit()[:12]}"
    made = tuning.table(records, f"tools/on_gpu.sh kernels --tune: {origin}")
    if made:
        name = "sm_{}{}".format(*torch.cuda.get_device_capability()) if rig.cuda else "interpreted"
        tuning.write(args.out / f"{name}.json", made)
        yield f"{sum(map(len, made.values()))} keys of {len(made)} kernels in {name}.json"


if __name__ == "__main__":
    sys.exit(main())
