"""Reading the JSON of a config file into a frozen dataclass: names, types, and where a mistake stands.

A dataclass checks its own sense in ``__post_init__`` by :func:`require`; :func:`read` adds the file's name once, at the
border, so that every message says which file, which field, what came and what was wanted.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from helios.errors import CheckpointError, unknown_name

__all__ = ["load_json", "plain", "read", "require"]

T = TypeVar("T")


def require(condition: bool, why: str, fix: str = "correct the value, or download the file again") -> None:
    """Raise :class:`CheckpointError` unless the condition holds."""
    if not condition:
        raise CheckpointError(why, fix)


def load_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        CheckpointError: the file is missing, unreadable, not JSON, or not an object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing", "download the folder again, or give another one") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}", "check the file's permissions") from error
    except ValueError as error:  # json.JSONDecodeError and UnicodeDecodeError are both ValueErrors
        raise CheckpointError(f"{path} is not JSON: {error}", "download the file again") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds a {type(data).__name__}, wanted a JSON object", "download the file again")
    return data


def read(
    cls: type[T], data: Mapping[str, Any], where: str | Path, *, ignore: Callable[[str], bool] = lambda name: False
) -> T:
    """Build the dataclass ``cls`` from JSON.

    Names that start with "_" belong to whoever wrote the file and are skipped; so are those that ``ignore`` accepts.

    Args:
        cls: a dataclass whose field types are int, float, bool, str, tuples of them, or one of these or None.
        data: the JSON object.
        where: the file, for messages.
        ignore: tells which further names are known to have no meaning here.

    Raises:
        CheckpointError: an unknown name, a wrong type, or values that make no sense together; names file and field.
    """
    hints = typing.get_type_hints(cls)
    fields = {f.name: hints[f.name] for f in dataclasses.fields(cls)}  # type: ignore[arg-type]  # T is a dataclass
    values = {}
    for name, value in data.items():
        if name.startswith("_") or ignore(name):
            continue
        if name not in fields:
            raise CheckpointError(f"{where}: {unknown_name('field', name, fields)}", "remove the field or correct it")
        values[name] = _convert(value, fields[name], f"{where}: field {name!r}")
    try:
        return cls(**values)
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error.why}", error.fix) from error


def plain(config: Any) -> dict[str, Any]:
    """The fields of a dataclass as JSON holds them: tuples become lists."""
    values = ((f.name, getattr(config, f.name)) for f in dataclasses.fields(config))
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values}


def _convert(value: Any, hint: Any, what: str) -> Any:
    """The value as its field holds it (lists become tuples, whole numbers become floats), or an error."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for option in options:
        fits, converted = _as(value, option)
        if fits:
            return converted
    wanted = " or ".join(_spell(option) for option in options)
    raise CheckpointError(f"{what} is {value!r}, wanted {wanted}", "correct the value, or download the file again")


def _as(value: Any, hint: Any) -> tuple[bool, Any]:
    """Whether the value is of that type, and the value as that type."""
    if typing.get_origin(hint) is tuple:
        return _as_tuple(value, typing.get_args(hint))
    if hint is type(None):
        return value is None, None
    if hint is float:  # JSON writes 1.0 as 1 where it likes
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number, float(value) if number else None
    # bool is a subclass of int, and `true` layers is a mistake
    return isinstance(value, hint) and (hint is bool or not isinstance(value, bool)), value


def _as_tuple(value: Any, hints: tuple[Any, ...]) -> tuple[bool, Any]:
    if not isinstance(value, list | tuple):
        return False, None
    open_ended = len(hints) == 2 and hints[1] is Ellipsis
    if not open_ended and len(value) != len(hints):
        return False, None
    items = [_as(item, hints[0] if open_ended else hint) for item, hint in _pair(value, hints, open_ended)]
    return all(fits for fits, _ in items), tuple(item for _, item in items)


def _pair(value: Iterable[Any], hints: tuple[Any, ...], open_ended: bool) -> Iterable[tuple[Any, Any]]:
    return ((item, hints[0]) for item in value) if open_ended else zip(value, hints, strict=True)


def _spell(hint: Any) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", type(None): "null"}
    if typing.get_origin(hint) is not tuple:
        return names[hint]
    args = typing.get_args(hint)
    return f"a list, each {names[args[0]]}" if args[-1] is Ellipsis else f"a list of {len(args)}, each {names[args[0]]}"
