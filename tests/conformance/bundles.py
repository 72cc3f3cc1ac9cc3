"""A small bundle for tests: a suite of some ten quick cases, run whole by a right backend, so that it can be certified.

Loaded by the fixture ``bundles``. What a forger without a key can do is here too: ``forge`` writes every file that
follows from a report anew.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from helios.backend import Backend, select
from helios_conformance import bundle, checks, environment, execute, graphs, manifest, report, subject, suite, verify
from helios_conformance.case import Case, Level
from helios_conformance.draws import Root
from helios_conformance.record import record, tensors_of
from helios_conformance.references import References
from helios_conformance.run import RunResult, Setup, now
from helios_conformance.session import Session

TAKEN = (
    "add[bf16,small]",
    "rms_norm[bf16,outliers]",  # kept in part
    "linear[bf16,small]",
    "concat[bf16,one]",
    "silu[bf16,odd]",
    "add[bf16,small,nan]",
)
REFUSALS = "op_refuses"
ROOT = Root(7, "5f3a")


def _taken() -> tuple[Case, ...]:
    everything = suite.all_cases("bf16")
    refusal = next(case for case in everything if case.check == REFUSALS)
    return tuple(case for case in everything if case.id in TAKEN or case is refusal)


@dataclasses.dataclass
class Bundles:
    """One run of the small suite, and bundles of it."""

    cases: tuple[Case, ...]
    references: References
    result: RunResult
    tensors: dict[str, Tensor]
    texts: dict[str, str]

    @staticmethod
    def make(spec: str = "reference") -> Bundles:
        cases = _taken()
        assert len(cases) == len(TAKEN) + 1
        references = References({case.id: checks.get(case.check).reference(case, ROOT) for case in cases})
        return Bundles.run(cases, spec, ROOT, references)

    def with_nonce(self, nonce: str) -> Bundles:
        """Another run, that drew other numbers."""
        return Bundles.run(self.cases, self.result.setup.spec, Root(ROOT.seed, nonce), self.references)

    @staticmethod
    def run(
        cases: tuple[Case, ...],
        spec: str,
        root: Root,
        references: References,
        backend: Backend | None = None,
        levels: tuple[Level, ...] = ("ops",),
    ) -> Bundles:
        backend = backend or select(spec)
        session = Session(backend, root)
        told = subject.describe(backend, spec, session)
        started, records, tensors = now(), [], {}
        for case in cases:
            begin = time.perf_counter()
            seen, verdict = execute.run_here(case, session, references)
            records.append(json.loads(json.dumps(record(case, seen, verdict, time.perf_counter() - begin))))
            tensors |= tensors_of(case.id, seen)
        setup = Setup(spec, "bf16", "full", levels, (), root)
        peak, workers = {"parent": 1 << 28, "worker": 1 << 28}, {"started": 1, "lost": 0}
        result = RunResult(setup, records, told, environment.read(told), started, now(), peak, workers)
        return Bundles(cases, references, result, tensors, graphs.of_backend("bf16", backend))

    @contextmanager
    def closed(self) -> Iterator[Bundles]:
        """As long as it lasts, these cases are the suite."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(suite, "all_cases", lambda precision: self.cases if precision == "bf16" else ())
            yield self

    def report(self) -> dict[str, Any]:
        return copy.deepcopy(report.assemble(self.result))

    def write(self, folder: Path, **changes: Any) -> Path:
        """A bundle of the run, or of one that differs in these fields of its result."""
        result = dataclasses.replace(self.result, **changes)
        return bundle.write(result, folder, tensors=self.tensors, texts=self.texts)

    def forge(
        self, told: Mapping[str, Any], folder: Path, *, derive: bool = True, tensors: Mapping[str, Tensor] | None = None
    ) -> Path:
        """A bundle of a report that somebody edited, with every digest right and, if asked, every conclusion drawn."""
        whole = dict(told)
        if derive:
            whole |= report.derived(whole)
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "graphs").mkdir(parents=True)
        kept = bundle.tensors_by_level(self.result_cases(), self.tensors if tensors is None else tensors)
        bundle.write_report(whole, kept, folder)
        for name, text in self.texts.items():
            (folder / "graphs" / f"{name}.txt").write_text(text)
        self.seal(folder)
        return folder

    def result_cases(self) -> list[dict[str, Any]]:
        return list(self.result.records)

    @staticmethod
    def seal(folder: Path) -> None:
        """A manifest of what the folder holds now."""
        text = json.dumps(manifest.build(folder), indent=1, sort_keys=True)
        (folder / manifest.MANIFEST).write_text(text + "\n")

    def verify(self, folder: Path, **options: Any) -> verify.Outcome:
        return verify.verify(folder, references=self.references, **options)

    def refusals(self, folder: Path, **options: Any) -> str:
        """The findings as text; fails where there are none."""
        outcome = self.verify(folder, **options)
        assert not outcome.accepted, "an inconsistent bundle was accepted"
        return "\n".join(map(str, outcome.findings))
