"""Judging a bundle without the device: structure, identity, consistency, and every numeric verdict anew.

Nothing from the bundle is ever run. Whatever is wrong becomes a finding with its place; one is enough to refuse.
*Accepted* means that the bundle is what the suite would have written for these outputs: what its verdict says, it may
say. Who made it and on what is another matter, see ``ATTESTED``.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jsonschema
from jinja2 import TemplateError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

import helios
from helios.errors import HeliosError, InputError
from helios_conformance import bundle, graphs, html, manifest, realtime, report, signing, suite, verdict
from helios_conformance.case import LEVELS
from helios_conformance.contradictions import contradictions
from helios_conformance.differences import differences
from helios_conformance.draws import Root
from helios_conformance.intake import REPORT_BYTES, Refused, read_bytes, read_json, shown
from helios_conformance.recheck import case_differences
from helios_conformance.references import References, committed

__all__ = ["ATTESTED", "Finding", "Outcome", "verify"]

ATTESTED: Mapping[str, str] = {
    "backend": "which backend and device it was: label, version, kind, memory, precisions, and whether it was emulated",
    "environment": "the machine and its software as the run began, as far as they do not contradict the rest",
    "cases.*.facts": "what the kept outputs cannot show: unchanged inputs, intact guards, equal repeats, speed",
    "cases.*.coverage": "whether a node ran natively, fused or by the fallback",
    "cases.*.seconds": "how long a case took, within the length of the run",
    "cases.*.outputs.*.finite": "whether the elements that were not kept are finite",
    "cases.*.unsupported": "the backend's reason for not running a case",
    "setup": "how the run was asked for, of which checkpoint, and how often it was interrupted and went on",
    "started": "when the run began",
    "finished": "when it ended",
    "peak_rss": "how much memory it took",
    "workers": "how many workers served it",
    "problem": "why a run ended early",
}
"""What a bundle without a signature could say otherwise and stay consistent, by place: attested, not proved."""

_MOST = 25
"""Findings of one kind that are listed."""
_GRAPH_BYTES = 16 << 20
_HEADER_BYTES = 16 << 20

_STRANGE = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, HeliosError, TemplateError)
"""What facts that no check writes can make raise: the schema does not say what a check's facts are."""

Progress = Callable[[int, int, str], None]


@dataclasses.dataclass(frozen=True, slots=True)
class Finding:
    """What is wrong with a bundle, and where: a file or a place in ``report.json``."""

    where: str
    what: str

    def __str__(self) -> str:
        return f"{shown(self.where, 200)}: {self.what}"


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """What verification came to.

    Attributes:
        findings: empty where the bundle is accepted.
        report: as read, or None where it could not be.
        tier: self-tested, or witnessed where the challenge is the nonce that the run drew from.
        signer: who signed; "" without a signature.
        vouched: whether that is one of the signers that were asked for.
        recomputed: cases that were judged anew.
        left: levels that were not, as asked.
    """

    findings: tuple[Finding, ...]
    report: dict[str, Any] | None
    tier: str = "self-tested"
    signer: str = ""
    vouched: bool = False
    recomputed: int = 0
    left: tuple[str, ...] = ()

    @property
    def accepted(self) -> bool:
        return not self.findings


def verify(
    folder: Path,
    *,
    challenge: str | None = None,
    signer: Path | None = None,
    levels: Iterable[str] = LEVELS,
    references: References | None = None,
    progress: Progress = lambda done, total, case: None,
) -> Outcome:
    """Verify a bundle.

    Args:
        folder: of the bundle.
        challenge: nonce that the certifier issued; the run must have drawn from it.
        signer: public key or allowed signers; the bundle must be signed by one of them.
        levels: whose cases are judged anew; the others are checked for consistency alone.
        references: other reference errors than the suite's, for tests.
        progress: told before each case: how many are done, of how many, its id.

    Raises:
        InputError: there is no such folder, or what was asked for makes no sense.
    """
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}", "name the folder that `helios certify` wrote")
    found = _Findings()
    told: dict[str, Any] | None = None
    who, done, wanted = "", 0, set(levels)
    with found.stopping():
        found.add(manifest.differences(folder))
        who = signing.check(folder, signer) if signer is not None else signing.fingerprint(folder) or ""
        told = _read(folder)
        found.add(_identity(told))
        found.stop_if_any()
        found.add(_claims(told, challenge))
        tensors = _tensors(folder, told, found)
        found.stop_if_any()
        found.add(_files(folder, told))
        done = _recompute(told, tensors, wanted, references or committed(), found, progress)
    told_levels = told["suite"]["levels"] if told and not found.items else []
    tier = verdict.TIERS[challenge is not None]
    return Outcome(
        tuple(found.items), told, tier, who, signer is not None, done, tuple(n for n in told_levels if n not in wanted)
    )


class _Findings:
    """Collects; ``stopping`` ends its block at the first that makes going on senseless."""

    def __init__(self) -> None:
        self.items: list[Finding] = []

    def add(self, wrong: Iterable[tuple[str, str]]) -> None:
        found = [Finding(where, what) for where, what in wrong]
        self.items += found[:_MOST]
        if len(found) > _MOST:
            self.items.append(Finding(found[_MOST].where, f"and {len(found) - _MOST} more findings like these"))

    def stop_if_any(self) -> None:
        if self.items:
            raise _Stop

    def stopping(self) -> _Stopping:
        return _Stopping(self)


class _Stop(Exception):
    """Enough was found."""


class _Stopping:
    """Turns what refuses a bundle outright into a finding."""

    def __init__(self, found: _Findings) -> None:
        self.found = found

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if isinstance(error, Refused):
            self.found.add([(error.where, error.what)])
        return isinstance(error, Refused | _Stop)


def _read(folder: Path) -> dict[str, Any]:
    """The report, of the schema's form and of this suite."""
    told = read_json(folder / "report.json", "report.json", REPORT_BYTES)
    made_by = told.get("suite") if isinstance(told, dict) else None
    came = made_by.get("hash") if isinstance(made_by, dict) else None
    if isinstance(came, str) and came != suite.suite_hash():
        version = shown(str(made_by.get("version")), 40) if isinstance(made_by, dict) else ""
        raise Refused(
            "suite.hash",
            f"another suite made it: {shown(came, 64)}, of helios-hal {version}; this is {suite.suite_hash()}, of "
            f"helios-hal {helios.__version__}, and knows neither its cases nor its budgets",
        )
    validator = jsonschema.Draft202012Validator(report.schema())
    for error in validator.iter_errors(told):
        raise Refused(f"report.json {error.json_path[:200]}", f"not as the schema says: {shown(error.message)}")
    assert isinstance(told, dict)  # by the schema
    return told


def _identity(told: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The cases are those of this suite that such a run takes: each once, in order, and as the suite knows them."""
    known = {case.id: case for case in verdict.chosen(told)}
    came = [case["id"] for case in told["cases"]]
    times = collections.Counter(came)
    wrong = [(f"cases.{i}", "a case that such a run takes is missing") for i in known if not times[i]]
    wrong += [(f"cases.{i}", "such a run does not take this case") for i in times if i not in known]
    wrong += [(f"cases.{i}", f"it is there {n} times") for i, n in times.items() if n > 1]
    if not wrong and came != list(known):
        wrong.append(("cases", "they are not in the suite's order"))
    for case in told["cases"] if not wrong else []:
        fixed = {name: getattr(known[case["id"]], name) for name in ("level", "check", "precision", "required")}
        wrong += differences({name: case[name] for name in fixed}, fixed, f"cases.{case['id']}")
    return wrong


def _claims(told: Mapping[str, Any], challenge: str | None) -> list[tuple[str, str]]:
    """What the report says of itself follows from its cases, and is allowed to be said."""
    try:
        wanted = report.derived(told)
    except _STRANGE as error:
        what = f"facts that the suite does not write: {type(error).__name__}: {shown(str(error))}"
        raise Refused("cases", what) from error
    wrong = differences({name: told[name] for name in wanted}, wanted)
    wrong += contradictions(told)
    wrong += [("realtime", what) for what in realtime.check(told["realtime"], told)]
    if told["backend"]["emulated"]:
        wrong.append(("backend.emulated", f"nothing emulated is evidence: {shown(told['backend']['emulated'])}"))
    fallbacks = verdict.recorded_fallbacks(wanted)
    if fallbacks and told["verdict"]["word"] == "certified":
        wrong.append(("coverage", f"{fallbacks} nodes ran by the reference in a certified run"))
    if challenge is not None and challenge != told["suite"]["nonce"]:
        wrong.append(("suite.nonce", f"it drew from {shown(told['suite']['nonce'])!r}, not from the challenge"))
    if challenge == "":
        wrong.append(("suite.nonce", "an empty challenge shows nothing"))
    return wrong


def _tensors(folder: Path, told: Mapping[str, Any], found: _Findings) -> dict[str, Tensor]:
    """The kept elements of all cases, exactly those that the records name, and nothing beside them."""
    tensors: dict[str, Tensor] = {}
    for level in LEVELS:
        cases = [case for case in told["cases"] if case["level"] == level]
        names = {f"{case['id']}/{output}": o["kept"] for case in cases for output, o in case["outputs"].items()}
        file = f"outputs/{level}.safetensors"
        if not names:
            if (folder / file).exists():
                found.add([(file, "no case of this level has outputs")])
            continue
        data = read_bytes(folder / file, file, 8 * sum(names.values()) + _HEADER_BYTES)
        loaded = _loaded(file, data)
        found.add((file, f"it lacks {name}") for name in sorted(set(names) - set(loaded)))
        found.add((file, f"no case has the output {shown(name)}") for name in sorted(set(loaded) - set(names)))
        tensors |= loaded
    return tensors


def _loaded(file: str, data: bytes) -> dict[str, Tensor]:
    try:
        loaded = load(data)
        # Written again it must be the same bytes: nothing hides between tensors or in a header.
        same = save(loaded) == data
    except (SafetensorError, RuntimeError, ValueError, KeyError, TypeError) as error:
        raise Refused(file, f"it holds no tensors: {shown(str(error))}") from error
    if not same:
        raise Refused(file, "it is not written as the suite writes tensors")
    return loaded


def _files(folder: Path, told: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The files that follow from the report, and the graphs."""
    present = set(manifest.files(folder))
    texts = sorted(name for name in present if name.startswith("graphs/"))
    outputs = {f"outputs/{level}.safetensors" for level in LEVELS}
    for name in sorted(present - outputs - set(texts) - {"report.json", "report.html", "junit.xml"}):
        yield name, "a bundle has no such file"
    if read_bytes(folder / "report.json", "report.json", REPORT_BYTES) != report.dumps(told):
        yield "report.json", "it is not written as the suite writes it"
    for name, make in (("report.html", lambda told: html.render(told).encode()), ("junit.xml", bundle.junit)):
        try:
            same = read_bytes(folder / name, name, 8 * REPORT_BYTES) == make(told)
        except _STRANGE as error:
            yield name, f"the suite cannot write it for this report: {shown(str(error))}"
            continue
        if not same:
            yield name, "it is not what the suite writes for this report"
    yield from _graphs(folder, told, texts)


def _graphs(folder: Path, told: Mapping[str, Any], names: Sequence[str]) -> Iterator[tuple[str, str]]:
    none = f"graphs/{bundle.NO_GRAPHS}.txt"
    if none in names or not names:
        if told["verdict"]["word"] == "certified" or len(names) != 1:
            yield "graphs", "the plan of the published size is missing"
        return
    texts = {}
    for name in names:
        try:
            texts[name] = read_bytes(folder / name, name, _GRAPH_BYTES).decode()
        except UnicodeDecodeError:
            yield name, "no valid UTF-8"
            return
    for name, what in graphs.contradictions(texts, told["scope"]["precision"]):
        yield name or "graphs", what


def _recompute(
    told: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    levels: set[str],
    references: References,
    found: _Findings,
    progress: Progress,
) -> int:
    """Judge the cases anew; how many."""
    root = Root(told["suite"]["seed"], told["suite"]["nonce"])
    known = {case.id: case for case in verdict.chosen(told)}
    cases = [case for case in told["cases"] if case["level"] in levels]
    for done, case in enumerate(cases):
        progress(done, len(cases), case["id"])
        wrong = case_differences(case, known[case["id"]], tensors, root, references)
        found.add((f"cases.{case['id']}.{where}", what) for where, what in wrong)
    progress(len(cases), len(cases), "")
    return len(cases)
