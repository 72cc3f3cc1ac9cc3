"""Which cases a run takes, and the identity of the suite."""

from __future__ import annotations

import fnmatch
import functools
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from importlib import resources
from importlib.resources.abc import Traversable

from helios.errors import InputError, unknown_name
from helios_conformance import scope
from helios_conformance.case import LEVELS, PRECISIONS, Case, Check, Level, Suite
from helios_conformance.checks import CHECKS

__all__ = ["all_cases", "choose", "find", "levels_up_to", "suite_hash"]


@functools.cache
def all_cases(precision: str) -> tuple[Case, ...]:
    """Every case of the full suite, in run order: by level, then as the checks list them."""
    if precision not in PRECISIONS:
        raise InputError(unknown_name("precision to certify", precision, PRECISIONS))
    found = [case for check in CHECKS for case in _of_check(check, precision)]
    ids = [case.id for case in found]
    if len(set(ids)) != len(ids):
        twice = sorted({i for i in ids if ids.count(i) > 1})
        raise ValueError(f"case ids are not unique: {', '.join(twice)}")
    return tuple(sorted(found, key=lambda case: LEVELS.index(case.level)))


def _of_check(check: Check, precision: str) -> Iterator[Case]:
    working = scope.dtype_scope(precision)
    if precision == working or check.name not in scope.SHARED:
        yield from check.cases(precision)
    if precision != working and check.name in scope.SHARED | scope.BESIDE:
        yield from check.cases(working)


def choose(
    precision: str, suite: Suite = "quick", levels: Iterable[Level] = LEVELS, filters: Sequence[str] = ()
) -> list[Case]:
    """The cases of a run.

    Args:
        precision: one of ``PRECISIONS``.
        suite: ``quick``, or ``full``, which contains it.
        levels: to run.
        filters: ids, with ``*`` for any characters; a name without brackets takes all its cases. A case is taken if any
            filter matches, whatever the suite.
    """
    wanted = set(levels)
    found = [case for case in all_cases(precision) if case.level in wanted]
    if filters:
        return [case for case in found if any(matches(case.id, pattern) for pattern in filters)]
    return [case for case in found if suite == "full" or case.suite == "quick"]


def matches(case: str, pattern: str) -> bool:
    """Whether a filter takes an id; brackets stand for themselves."""
    if "[" not in pattern:
        pattern += "[*"
    return fnmatch.fnmatchcase(case, pattern.replace("[", "[[]"))


def find(case: str) -> Case:
    """The case of that id. Raises InputError with the nearest."""
    everywhere = {c.id: c for precision in PRECISIONS for c in all_cases(precision)}
    if case not in everywhere:
        raise InputError(unknown_name("case", case, everywhere)[:400], fix="`helios cases list` prints all ids")
    return everywhere[case]


def levels_up_to(level: str) -> tuple[Level, ...]:
    """A level and all that it needs; ``all`` for every one."""
    if level == "all":
        return LEVELS
    if level not in LEVELS:
        raise InputError(unknown_name("level", level, [*LEVELS, "all"]))
    return LEVELS[: LEVELS.index(level) + 1]


@functools.cache
def suite_hash() -> str:
    """SHA-256 over the names and contents of every file of this package: cases, budgets and reference errors."""
    sha = hashlib.sha256()
    for name, file in sorted(_files(resources.files("helios_conformance"), "")):
        content = file.read_bytes()
        sha.update(f"{name}\0{len(content)}\0".encode())
        sha.update(content)
    return sha.hexdigest()


def _files(folder: Traversable, prefix: str) -> Iterable[tuple[str, Traversable]]:
    for item in folder.iterdir():
        if item.is_dir():
            if item.name != "__pycache__":
                yield from _files(item, f"{prefix}{item.name}/")
        elif not item.name.endswith(".pyc"):
            yield prefix + item.name, item
