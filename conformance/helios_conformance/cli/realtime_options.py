"""The options of ``helios certify`` that only the level realtime reads: their names, and that somebody reads them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helios.errors import InputError, unknown_name

if TYPE_CHECKING:
    from helios_conformance.run import Setup

__all__ = ["nothing_given", "with_options"]

_PAIR = re.compile(r"([a-z_]+)=(.+)")
_TOLD = ("imported", "checkpoint", "resumed")
"""What the suite says of a run itself, beside its options."""


def with_options(setup: Setup, given: Mapping[str, Any], pairs: Sequence[str]) -> Setup:
    """The setup with its settings of realtime, and with the identity of its checkpoint.

    Args:
        setup: of the run; ``model`` counts among the options.
        given: by the option's name without its dashes; None for what was not given.
        pairs: of ``--set``, each ``NAME=VALUE``.

    Raises:
        InputError: no ``NAME=VALUE``, a name that nobody knows, a value that makes no sense, or no case of the level is
            taken, so that nobody would read any of it.
    """
    options = {**_pairs(pairs), **{name: value for name, value in given.items() if value is not None}}
    named = _named({**given, "model": setup.model}, pairs)
    if named and not _timed(setup):
        why = f"{named[0]} is of level realtime, and no case of that level is taken: it would change nothing"
        raise InputError(why, f"leave {named[0]} away, or add --suite full --level realtime")
    if options:
        from helios_conformance.realtime.options import Options

        Options.of(options)
    identity: dict[str, Any] = {}
    if setup.model is not None:
        from helios_conformance.subject import checkpoint

        identity = {"checkpoint": checkpoint(Path(setup.model))}
    return dataclasses.replace(setup, options={**options, **identity})


def nothing_given(what: str, given: Mapping[str, Any], pairs: Sequence[str]) -> None:
    """Raises InputError where an option of realtime stands beside one (``what``) that leaves it no say."""
    if named := _named(given, pairs):
        raise InputError(f"{named[0]} has no say with {what}: the settings are those of the run", "leave it away")


def _named(given: Mapping[str, Any], pairs: Sequence[str]) -> list[str]:
    """What was given, as it is typed."""
    return [f"--{name}" for name, value in given.items() if value is not None] + [f"--set {pair}" for pair in pairs]


def _timed(setup: Setup) -> bool:
    from helios_conformance.case import PRECISIONS
    from helios_conformance.suite import choose

    precisions = [setup.precision] if setup.precision else PRECISIONS
    taken = (case for p in precisions for case in choose(p, setup.suite, setup.levels, setup.filters))
    return any(case.level == "realtime" for case in taken)


def _pairs(given: Sequence[str]) -> dict[str, Any]:
    """``NAME=VALUE`` as options; numbers become numbers."""
    options: dict[str, Any] = {}
    for text in given:
        found = _PAIR.fullmatch(text)
        if found is None:
            raise InputError(f"--set {text!r}: wanted NAME=VALUE", "--set chunks=45")
        name, value = found[1], found[2]
        _known(name)
        number = re.fullmatch(r"\d+(\.\d+)?", value)
        options[name] = value if number is None else float(value) if number[1] else int(value)
    return options


def _known(name: str) -> None:
    from helios_conformance.realtime.options import Options

    if name in _TOLD:
        raise InputError(f"--set {name}: the suite says that itself")
    names = [field.name for field in dataclasses.fields(Options)]
    if name not in names:
        raise InputError(f"--set: {unknown_name('setting', name, names)}", "docs/realtime.md says what each does")
