"""Write docs/opset.md from the op records, or check that it is what they say.

Usage: ``python tools/make_opset_doc.py [--check]``. Everything in the document comes from signatures, docstrings and
samples; to change it, change those.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import re
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

import helios.ops
from helios import op
from helios.graph import format_attr
from helios.op import Op

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "opset.md"

HEAD = """\
# Opset {version}

The closed set of ops that a Helios graph is made of: {count}. This file is made by `tools/make_opset_doc.py` from the
op records; do not edit it. `helios ops` lists the same in a terminal, `helios ops NAME` explains one.

- An op's body is its reference: in float64 it is the oracle, on the `meta` device it infers shapes and dtypes.
- **Kinds**: `move` moves data and is exact · `round` rounds each element once · `reduce` accumulates, in at least
  float32 · `fused` is a composition of other ops, which a backend may ask for.
- **Dimensions**: names that must agree, numbers, `_` for any size, `...` for any shape, `?` after an optional input.
- Attributes stand in braces with their defaults. Samples are the cases that every backend is judged on; those marked
  ∗ have the shapes of the 14B network.

| family | ops |
| --- | --- |
{index}
"""


def main() -> int:
    """Write the document, or with ``--check`` compare it; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail unless the file is up to date")
    arguments = parser.parse_args()
    text = document()
    if not arguments.check:
        DOCUMENT.write_text(text, encoding="utf-8")
        return 0
    if not DOCUMENT.exists() or DOCUMENT.read_text(encoding="utf-8") != text:
        print("docs/opset.md is not what the op records say: python tools/make_opset_doc.py", file=sys.stderr)
        return 1
    return 0


def document() -> str:
    """The whole text."""
    records = sorted((op.get(name) for name in op.names()), key=lambda record: (_family(record), record.name))
    families = {family: list(group) for family, group in groupby(records, key=_family)}
    index = "\n".join(
        f"| [{name}](#family-{name}) | {', '.join(_link(r) for r in ops)} |" for name, ops in families.items()
    )
    head = HEAD.format(version=helios.ops.OPSET, count=f"{len(records)} ops", index=index)
    return "\n".join([head, *(_section(name, ops) for name, ops in families.items())])


def _family(record: Op[Any, Any]) -> str:
    return str(record.fn.__module__).rpartition(".")[2]


def _link(record: Op[Any, Any]) -> str:
    return f"[{record.name}](#{record.name})"


def _section(family: str, records: list[Op[Any, Any]]) -> str:
    about = inspect.getdoc(importlib.import_module(f"helios.ops.{family}")) or ""
    return "\n".join([f"## Family {family}\n", _prose(about), *(_entry(record) for record in records)])


def _entry(record: Op[Any, Any]) -> str:
    samples = [f"{s.name}∗" if s.big else s.name for s in record.samples()]
    refused = [case.name for case in record.error_cases()]
    lines = [f"### {record.name}\n", f"```text\n{_signature(record)}\n```\n", f"`{record.dims}` · {record.kind}\n"]
    lines.append(_prose(inspect.getdoc(record.fn) or ""))
    if samples:
        lines.append(f"Samples: {', '.join(samples)}." + (f" Refused: {', '.join(refused)}." if refused else "") + "\n")
    return "\n".join(lines)


def _signature(record: Op[Any, Any]) -> str:
    inputs = [f"{o.name}{'...' if o.many else ''}{'?' if o.optional else ''}" for o in record.operands]
    given: dict[str, Any] = dict(record.attrs)
    attributes = [key if v is inspect.Parameter.empty else f"{key}={format_attr(v)}" for key, v in given.items()]
    return f"{record.name}({', '.join(inputs)})" + (f" {{{', '.join(attributes)}}}" if attributes else "")


def _prose(text: str) -> str:
    """A docstring as Markdown: code marks, and Args and Returns as lists."""
    text = text.replace("``", "`")
    out: list[str] = []
    for line in text.splitlines():
        if re.fullmatch(r"(Args|Returns|Raises):", line):
            out += [f"**{line[:-1]}**", ""]
        elif line.startswith("        "):
            out.append(f"  {line.strip()}")
        elif line.startswith("    "):
            out.append(f"- {line.strip()}" if not out or not _continues(out[-1], line) else f"  {line.strip()}")
        else:
            out.append(line)
    return "\n".join(out) + "\n"


def _continues(before: str, line: str) -> bool:
    """Whether an indented line goes on with the item before it: no new ``name:`` starts there."""
    return before.startswith(("- ", "  ")) and not re.match(r"    [\w, ]+: ", line)


if __name__ == "__main__":
    sys.exit(main())
