"""``helios ops``: the opset, or one op of it."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Annotated, Any

import typer

from helios.cli import output
from helios.cli.options import JsonOption
from helios.errors import InputError, unknown_name

if TYPE_CHECKING:
    from helios.op import Op

__all__ = ["EXAMPLES", "ops"]

EXAMPLES = "Example: helios ops attention"

KINDS = {
    "move": "moves data; exact",
    "round": "rounds each element once",
    "reduce": "accumulates",
    "fused": "a composition of other ops",
}


def ops(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="One op, in full.", show_default=False)] = None,
    json: JsonOption = False,
) -> None:
    """List the ops that a backend may be asked for, or explain one."""
    from helios import op
    from helios.ops import OPSET

    if name is not None:
        if name not in op.names():
            raise InputError(unknown_name("op", name, op.names()), fix="`helios ops` lists them with their meaning")
        record = op.get(name)
        output.print_json(describe(record) | {"opset": OPSET}) if json else _explain(record)
        return
    records = [op.get(known) for known in op.names()]
    if json:
        output.print_json({"opset": OPSET, "ops": [describe(record) for record in records]})
        return
    output.line(f"Opset {OPSET}: {output.count(len(records), 'op')}")
    rows = [(r.name, r.kind, f"{_schema(r)}\n{summary(r)}") for r in records]
    output.table(["op", "kind", "dimensions {attributes}, meaning"], rows)
    output.note("kinds: " + "; ".join(f"{kind}: {text}" for kind, text in KINDS.items()) + ". More: helios ops NAME")


def describe(record: Op[Any, Any]) -> dict[str, Any]:
    """An op as plain data."""
    return {
        "name": record.name,
        "kind": record.kind,
        "dims": record.dims,
        "inputs": [{"name": o.name, "optional": o.optional, "list": o.many} for o in record.operands],
        "attributes": {key: _default(value) for key, value in record.attrs.items()},
        "summary": summary(record),
        "doc": inspect.cleandoc(record.fn.__doc__ or ""),
        "samples": [{"name": s.name, "big": s.big} for s in record.samples()],
        "errors": [case.name for case in record.error_cases()],
    }


def summary(record: Op[Any, Any]) -> str:
    """The first sentence of the docstring, on one line, without its marks."""
    paragraph = inspect.cleandoc(record.fn.__doc__ or "").split("\n\n")[0]
    return " ".join(paragraph.split()).replace("``", "")


def _schema(record: Op[Any, Any]) -> str:
    return record.dims + (f" {{{', '.join(record.attrs)}}}" if record.attrs else "")


def _default(value: Any) -> str | None:
    """An attribute's default in the notation of the graph's text form; ``None`` where it must be given."""
    from helios.graph import format_attr

    return None if value is inspect.Parameter.empty else format_attr(value)


def _explain(record: Op[Any, Any]) -> None:
    data = describe(record)
    output.line(f"{record.name}{_signature(data)}", "bold")
    output.line(f"dimensions: {record.dims}")
    output.line(f"kind: {record.kind} ({KINDS[record.kind]})")
    output.line()
    output.line(data["doc"].replace("``", ""))
    output.line()
    small = [s["name"] for s in data["samples"] if not s["big"]]
    big = [s["name"] for s in data["samples"] if s["big"]]
    output.line(f"samples: {', '.join(small) or 'none'}" + (f"; at the 14B shapes: {', '.join(big)}" if big else ""))
    output.line(f"must refuse: {', '.join(data['errors']) or 'nothing beyond dimensions and attributes'}")


def _signature(data: dict[str, Any]) -> str:
    inputs = [("*" if i["list"] else "") + i["name"] + ("?" if i["optional"] else "") for i in data["inputs"]]
    attributes = [key if value is None else f"{key}={value}" for key, value in data["attributes"].items()]
    return f"({', '.join(inputs)})" + (f" {{{', '.join(attributes)}}}" if attributes else "")
