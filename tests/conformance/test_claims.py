"""``docs/claims.md`` against the code: every verdict, every tier, and exactly the fields that are attested."""

from __future__ import annotations

import re
from pathlib import Path

from helios_conformance import report, verdict, verify

TEXT = (Path(__file__).parents[2] / "docs" / "claims.md").read_text(encoding="utf-8")


def first_cells(heading: str) -> list[str]:
    section = TEXT.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    return [row.split("|")[1].strip() for row in rows[2:]]


def test_every_verdict_has_its_sentences() -> None:
    assert first_cells("The words") == report.schema()["properties"]["verdict"]["properties"]["word"]["enum"]


def test_every_tier_has_its_condition() -> None:
    assert tuple(first_cells("The tiers")) == verdict.TIERS


def test_exactly_the_attested_fields_are_listed_with_the_codes_words() -> None:
    cells = [name for cell in first_cells("What no bundle shows") for name in re.findall(r"`([^`]+)`", cell)]
    assert cells == list(verify.ATTESTED)
    for name, words in verify.ATTESTED.items():
        if name not in ("started", "finished"):
            assert f"| `{name}` | {words} |" in TEXT


def test_the_figures_rule_names_all_that_a_speed_needs() -> None:
    rows = " ".join(first_cells("Frames a second"))
    for words in ("size", "variant", "precision", "steps", "amplified", "resolution", "length", "weights", "class"):
        assert words in rows
