"""Lets pytest run the suite: ``pytest --pyargs helios_conformance --backend NAME``.

pytest loads this in every project of the environment, so it is small, imports nothing, and does nothing unless this
package is what pytest is asked to run: the options of other projects stay their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["pytest_load_initial_conftests"]

PACKAGE = "helios_conformance"


def asked_for(arguments: Sequence[str]) -> bool:
    """Whether one of pytest's arguments is this package or its file of tests, with or without an id behind it."""
    names = [text.partition("::")[0].rstrip("/") for text in map(str, arguments) if not str(text).startswith("-")]
    ends = (f"{PACKAGE}/test_conformance.py", f"/{PACKAGE}")
    return any(name in (PACKAGE, f"{PACKAGE}.test_conformance") or name.endswith(ends) for name in names)


def pytest_load_initial_conftests(early_config: Any, parser: Any, args: list[str]) -> None:
    """Join in, before the command line is parsed for good."""
    if asked_for(args):
        from helios_conformance import pytest_cases

        pytest_cases.add_options(parser)
        early_config.pluginmanager.register(pytest_cases.Plugin(), "helios-conformance-cases")
