"""Tables and totals from records alone: nothing here needs a device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from results import Record

__all__ = ["cell", "fastest", "group_of", "problems", "table", "totals"]

MARKS = {"wrong": "WRONG", "not there": "-", "not measured": "late", "failed": "FAIL", "died": "DIED"}
ABSENT = "."


def group_of(record: Record) -> str:
    """The first part of its id."""
    return str(record["id"]).split("/", 1)[0]


def cell(record: Record | None) -> str:
    """The figure of a record: TFLOP/s, GB/s, microseconds or milliseconds, whichever it has first; or why not."""
    if record is None:
        return ABSENT
    if record["status"] != "measured":
        return MARKS[record["status"]]
    for name, format_ in (
        ("tflops", "{:.1f}"),
        ("gbps", "{:.0f}"),
        ("microseconds", "{:.2f}"),
        ("ms_median", "{:.3f}"),
    ):
        if record.get(name) is not None:
            return format_.format(record[name])
    return "yes"


def table(title: str, records: Iterable[Record]) -> Iterator[str]:
    """Rows by columns in the order in which they came; columns that hold nothing but absences are named below."""
    cells = {(r["row"], r["column"]): r for r in records}
    rows, columns = list(dict.fromkeys(row for row, _ in cells)), list(dict.fromkeys(column for _, column in cells))
    empty = [c for c in columns if all(cells[k]["status"] == "not there" for k in cells if k[1] == c)]
    shown = [column for column in columns if column not in empty]
    yield f"-- {title}"
    if shown:
        width = max(len(row) for row in rows)
        yield " ".join(["".ljust(width), *(column.rjust(max(7, len(column))) for column in shown)])
        for row in rows:
            line = (cell(cells.get((row, column))).rjust(max(7, len(column))) for column in shown)
            yield " ".join([row.ljust(width), *line])
    for column in empty:
        why = next(r["why"] for (_, c), r in cells.items() if c == column)
        yield f"{column}: {why[:140]}"


def fastest(records: Iterable[Record], columns: Iterable[str] | None = None) -> dict[str, Record]:
    """The least time of each row among what is right, from ``columns`` or from all."""
    allowed = None if columns is None else set(columns)
    best: dict[str, Record] = {}
    for record in records:
        if record["status"] != "measured" or (allowed is not None and record["column"] not in allowed):
            continue
        if record["row"] not in best or record["ms_median"] < best[record["row"]]["ms_median"]:
            best[record["row"]] = record
    return best


def totals(records: Iterable[Record], unit: str, columns: Iterable[str] | None = None) -> dict[str, Any]:
    """Milliseconds of all that occurs in one ``unit``: each row's time by how often it occurs there.

    Args:
        records: of one group; a row that occurs in several columns counts once, by the fastest of ``columns``.
        unit: the key in ``counts``: ``vae``, ``stage2`` …
        columns: to choose from; all by default.

    Returns:
        ``ms``, None unless every row was measured; ``measured_ms`` without the missing; ``missing`` rows; ``tflops``
        over what was measured; ``choice`` of a column by row.
    """
    found = list(records)
    counts: Mapping[str, int] = {r["row"]: r["counts"][unit] for r in found if r["counts"].get(unit)}
    best = {row: record for row, record in fastest(found, columns).items() if row in counts}
    missing = [row for row in counts if row not in best]
    measured = sum(counts[row] * record["ms_median"] for row, record in best.items())
    flops = sum(counts[row] * record["flops"] for row, record in best.items())
    return {
        "unit": unit,
        "ms": None if missing or not counts else measured,
        "measured_ms": measured,
        "missing": missing,
        "tflops": flops / measured / 1e9 if measured else None,
        "choice": {row: record["column"] for row, record in best.items()},
    }


def problems(records: Iterable[Record]) -> list[str]:
    """One line for each record that is wrong, failed or took its process with it."""
    lines = []
    for record in records:
        if record["status"] in ("wrong", "failed", "died"):
            why = str(record.get("why") or f"error {record.get('error')}")
            lines.append(f"{MARKS[record['status']]} {record['id']}: {why[:160]}")
    return lines
