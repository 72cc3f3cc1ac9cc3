"""The errors of the reference in the working dtype: computed once, committed with the suite, hashed into its identity.

``python -m helios_conformance.references [ID…]`` computes them on this host, for all cases or for those that a filter
takes, and merges them into the file; ``--check`` computes and compares. They are never computed on a judged device's
host: a host with a bad math library would allow its device the same errors.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import itertools
import json
import math
import os
import platform
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from helios_conformance import budget
from helios_conformance.budget import Errors
from helios_conformance.case import PRECISIONS, Case
from helios_conformance.draws import Root

__all__ = ["References", "committed", "decode", "encode", "of_case"]

FILE = "references.json"

SEEDS = 16
"""Draws of a case with a small output."""
_ELEMENTS = {"quick": 1 << 16, "full": 1 << 14}
"""Elements compared after which a case has drawn enough: the statistics of many vary little from seed to seed, and such
cases are dear. Not so the quick cases of ops: there one rounded factor may be that of a whole head."""
_PORTION = 16
"""Cases after which the file is written."""
_SAME = 0.25
"""Part by which ``--check`` lets a number of one host differ from that of another: they sum in other orders."""

Rows = Mapping[str, Errors]


class References:
    """Errors by case id and output."""

    def __init__(self, entries: Mapping[str, Rows]) -> None:
        self.entries = entries

    def get(self, case: str, output: str) -> Errors:
        """Raises KeyError with the command that makes it, where the suite lacks it."""
        try:
            return self.entries[case][output]
        except KeyError:
            raise KeyError(
                f"no reference error of {case} {output!r}: python -m helios_conformance.references '{case}'"
            ) from None


def decode(text: str) -> References:
    """References of the JSON form: id -> output -> [norm, worst, gain, misrounded, count]."""
    loaded: dict[str, dict[str, list[Any]]] = json.loads(text)["errors"]
    return References({case: {name: Errors(*values) for name, values in rows.items()} for case, rows in loaded.items()})


def encode(entries: Mapping[str, Rows], made: Iterable[Mapping[str, str]]) -> str:
    """The JSON form: sorted, a case a line, six digits; the same text for the same numbers. ``made`` are the hosts."""
    lines = []
    for case in sorted(entries):
        rows = {name: _numbers(entries[case][name]) for name in sorted(entries[case])}
        lines.append(f" {json.dumps(case)}: {json.dumps(rows, separators=(',', ':'))}")
    hosts = sorted({json.dumps(dict(host), sort_keys=True) for host in made})
    return f'{{"made": [{", ".join(hosts)}],\n"errors": {{\n' + ",\n".join(lines) + "\n}}\n"


def _numbers(errors: Errors) -> list[float]:
    rounded = [float(f"{x:.6g}") for x in (errors.norm, errors.worst, errors.gain, errors.misrounded)]
    if not all(map(math.isfinite, rounded)):
        raise ValueError(f"a reference error must be finite, came {errors}")
    return [*rounded, errors.count]


def committed() -> References:
    """Those that belong to this suite."""
    return decode(resources.files("helios_conformance").joinpath(FILE).read_text())


def of_case(case: Case) -> dict[str, Errors]:
    """The largest errors of the reference over several draws of a case; {} where it has nothing numeric."""
    from helios_conformance import checks  # checks import this module for its types

    check = checks.get(case.check)
    found: dict[str, Errors] = {}
    compared = 0
    for seed in itertools.count():
        rows = check.reference(case, Root(seed))
        if not rows:
            return {}
        found = {name: budget.largest(found.get(name, errors), errors) for name, errors in rows.items()}
        compared += sum(errors.count for errors in rows.values())
        cheap = case.suite == "quick" and case.level == "ops"
        if seed + 1 >= SEEDS or (compared >= _ELEMENTS[case.suite] and not cheap):
            return found
    raise AssertionError("unreachable")


def differing(old: Rows | None, new: Rows) -> list[str]:
    """What a recomputation found otherwise than it is committed: one phrase an output; [] where they agree."""
    if old is None or old.keys() != new.keys():
        return [f"outputs {sorted(new)}, committed {sorted(old or {})}"]
    lines = []
    for name, errors in new.items():
        for field in ("norm", "worst"):
            was, now = getattr(old[name], field), getattr(errors, field)
            if abs(now - was) > _SAME * max(was, now):
                lines.append(f"{name} {field} {now:.6g}, committed {was:.6g}")
    return lines


def _host() -> dict[str, str]:
    features = torch.backends.cpu.get_cpu_capability()
    return {"machine": f"{platform.machine()} {_model()}", "vectors": features, "torch": torch.__version__}


def _model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.system()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def _file() -> Path:
    """Beside this module: what the package reads as its resource is what the command writes."""
    return Path(__file__).with_name(FILE)


def merge(new: Mapping[str, Rows], known: set[str] | None, host: Mapping[str, str]) -> int:
    """Merge into the file as it is now; with ``known``, drop other ids. Returns the number of cases in it."""
    with _alone():
        return _merge(new, known, host)


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """While this lasts no other process merges: what one reads between another's reading and writing would be lost."""
    folder = os.open(_file().parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def _merge(new: Mapping[str, Rows], known: set[str] | None, host: Mapping[str, str]) -> int:
    text = _file().read_text(encoding="utf-8") if _file().exists() else '{"made": [], "errors": {}}'
    entries = {**decode(text).entries, **new}
    kept = {case: rows for case, rows in entries.items() if rows and (known is None or case in known)}
    whole = kept.keys() <= new.keys()
    fresh = _file().with_suffix(f".{os.getpid()}.tmp")
    before = json.loads(text)["made"]
    hosts = [] if whole else before if isinstance(before, list) else [before]
    fresh.write_text(encode(kept, [host, *hosts]), encoding="utf-8")
    fresh.replace(_file())
    return len(kept)


def _wanted(arguments: argparse.Namespace) -> Iterator[Case]:
    from helios_conformance import suite  # the suite imports the checks

    for precision in arguments.precision or PRECISIONS:
        yield from suite.choose(precision, "full", filters=arguments.patterns)


def _arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m helios_conformance.references", description=__doc__)
    parser.add_argument("patterns", nargs="*", metavar="ID", help="cases, with * for any characters; without: all")
    parser.add_argument("--precision", action="append", choices=PRECISIONS, help="only this one")
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a number differs by a quarter")
    parser.add_argument("--missing", action="store_true", help="only cases that the file lacks")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    """Compute and merge, or compare; the exit code."""
    from helios_conformance import suite  # the suite imports the checks

    arguments = _arguments(words)
    torch.set_num_threads(1)  # the same sums on every machine of a kind
    old = committed().entries if _file().exists() else {}
    cases = [case for case in _wanted(arguments) if not arguments.missing or case.id not in old]
    if arguments.check:
        new = {case.id: of_case(case) for case in _shown(cases)}
        lines = [f"{case}: {line}" for case, rows in new.items() if rows for line in differing(old.get(case), rows)]
        _say(*lines, f"{len(new)} cases computed, {len(lines)} numbers differ")
        return 1 if lines or not new else 0
    known: set[str] | None = {case.id for precision in PRECISIONS for case in suite.all_cases(precision)}
    if arguments.patterns or arguments.precision or arguments.missing:
        known = None  # only a run over everything may say what is gone: others may be at work with newer cases
    total = 0
    for some in _portions(cases):  # what is computed is in the file, also when the next is interrupted
        total = merge({case.id: of_case(case) for case in _shown(some)}, known, _host())
    _say(f"{len(cases)} cases computed, {total} in {FILE}")
    return 0


def _portions(cases: Sequence[Case]) -> Iterator[Sequence[Case]]:
    yield from (cases[at : at + _PORTION] for at in range(0, max(len(cases), 1), _PORTION))


def _shown(cases: Sequence[Case]) -> Iterable[Case]:
    for at, case in enumerate(cases):
        if sys.stderr.isatty():
            sys.stderr.write(f"\r{at + 1}/{len(cases)} {case.id}\033[K")
        yield case


def _say(*lines: str) -> None:
    sys.stdout.write("".join(f"{line}\n" for line in lines))


if __name__ == "__main__":
    sys.exit(main())
