"""A module in the place of ``tensorrt``, made from what its real bindings report of themselves; see tools/trt_api.

It has the names, the signatures and the members of one version, and refuses everything else as the bindings would:
unknown names, arguments by wrong names, of wrong kinds or in wrong numbers, flags that this version has no more, a
property that can only be read, a base class whose constructor was not called. Every call is written down.

What the calls *do* is made up, in ``trt_acts``. So whatever is shown with it is **not run on a device**.
"""

from __future__ import annotations

import enum
import importlib.machinery
import json
import types
from pathlib import Path
from typing import Any

API = Path(__file__).parents[1] / "backends" / "trt" / "api"


class Strict:
    """One version's module, and what was called of it."""

    def __init__(self, major: int, acts: dict[str, type]) -> None:
        self.api = json.loads((API / f"tensorrt_{major}.json").read_text())
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.module = types.ModuleType("tensorrt")
        self.module.__version__ = self.api["origin"]["version"]
        self.module.__spec__ = importlib.machinery.ModuleSpec("tensorrt", None)
        for name, members in self.api["enums"].items():
            setattr(self.module, name, _enum(name, members))
        for name in self.api["classes"]:
            self._define(name, acts)
        self.module.__getattr__ = self._unknown

    def _unknown(self, name: str) -> Any:
        if name in self.api["names"]:
            raise NotImplementedError(f"tensorrt.{name} is there, but not in the data: add it to tools/trt_api/dump.py")
        raise AttributeError(f"module 'tensorrt' {self.module.__version__} has no attribute {name!r}")

    def _define(self, name: str, acts: dict[str, type]) -> Any:
        if name in vars(self.module):
            return getattr(self.module, name)
        known = self.api["classes"][name]
        base = next((self._define(b, acts) for b in known["bases"] if b in self.api["classes"]), _Object)
        body: dict[str, Any] = {"_strict": self, "_name": name, "_known": known}
        body |= {n: _enum(f"{name}.{n}", members) for n, members in known["nested"].items()}
        body |= {n: _method(self, name, n, overloads) for n, overloads in known["methods"].items()}
        body |= {n: _property(self, name, n, *what) for n, what in known["properties"].items()}
        assert known["buffer"] == (name in acts and issubclass(acts[name], bytearray)), f"{name}: who is a buffer?"
        parents = (acts[name], base) if name in acts and not issubclass(base, acts[name]) else (base,)
        made = type(name, parents, body)
        for nested in known["nested"].values():  # as pybind11 exports the members of a nested enumeration
            for member in nested:
                setattr(made, member, next(getattr(getattr(made, n), member) for n in known["nested"]))
        setattr(self.module, name, made)
        return made

    def make(self, name: str, **state: Any) -> Any:
        """An object as TensorRT itself makes it."""
        kind = getattr(self.module, name)
        made = bytearray.__new__(kind) if issubclass(kind, bytearray) else object.__new__(kind)
        made.__dict__.update({"_made": True, **state})
        return made

    def bind(self, where: str, overloads: list[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments by name, as the first overload that takes them calls them."""
        refusals = []
        for overload in overloads:
            try:
                return self._bound(overload["args"], args, kwargs)
            except _Refused as refused:
                refusals.append(str(refused))
        raise TypeError(f"{where}(): incompatible function arguments: {'; '.join(refusals) or 'it cannot be called'}")

    def _bound(self, wanted: list[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        if len(args) > len(wanted):
            raise _Refused(f"takes {len(wanted)}, got {len(args)}")
        bound = dict(zip((name for name, _, _ in wanted), args, strict=False))
        for name, value in kwargs.items():
            if name in bound or name not in (n for n, _, _ in wanted if not n.startswith("arg")):
                raise _Refused(f"no argument {name!r}")
            bound[name] = value
        for name, kind, default in wanted:
            if name not in bound and default is None:
                raise _Refused(f"{name} is missing")
            if name in bound:
                self.require(kind, bound[name], name)
        return bound

    def require(self, kind: str, value: Any, name: str) -> None:
        """Raise unless the value is one that this kind of argument takes."""
        if not self._is(kind, value):
            raise _Refused(f"{name} is a {type(value).__name__}, not {kind}")
        if isinstance(value, _Object) and "_made" not in value.__dict__:
            raise _Refused(f"{name}: the constructor of {value._name} was not called")

    def _is(self, kind: str, value: Any) -> bool:
        if kind == "int":
            return type(value) is int
        if kind == "float":
            return type(value) in (int, float)
        if kind in ("str", "bool", "tuple", "list"):
            return type(value).__name__ == kind
        if kind == "Buffer":
            return not isinstance(value, str) and _is_buffer(value)
        if kind == "Sequence[int]":
            return isinstance(value, (tuple, list)) and all(type(x) is int for x in value)
        if kind == "Dims":  # the bindings convert sequences
            return isinstance(value, self.module.Dims) or self._is("Sequence[int]", value)
        if kind == "object":
            return True
        owner: Any = self.module
        for part in kind.split("."):
            owner = getattr(owner, part)
        return isinstance(value, owner)


class _Refused(TypeError):
    pass


class _Object:
    """Base of all classes: what is not in the data cannot be set or called."""

    _strict: Strict
    _name: str
    _known: dict[str, Any]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if not self._known["init"]:
            raise TypeError(f"tensorrt.{self._name}: No constructor defined!")
        bound = self._strict.bind(f"tensorrt.{self._name}", self._known["init"], args, kwargs)
        self._strict.calls.append((self._name, bound))
        self.__dict__["_made"] = True
        self._start(**bound)

    def _start(self, **given: Any) -> None:
        self.__dict__.update({f"_{name}": value for name, value in given.items()})

    def __setattr__(self, name: str, value: Any) -> None:
        ours = type(self).__dict__.get("_name") is None  # a class that somebody derived may have what it likes
        if not (ours or name.startswith("_") or isinstance(getattr(type(self), name, None), property)):
            raise AttributeError(f"'tensorrt.{self._name}' object has no attribute {name!r}")
        object.__setattr__(self, name, value)


def _enum(name: str, members: dict[str, int]) -> Any:
    made = enum.Enum(name, members)  # type: ignore[misc]
    made.__int__ = made.__index__ = lambda self: self.value  # type: ignore[attr-defined]
    return made


def _method(strict: Strict, owner: str, name: str, overloads: list[Any]) -> Any:
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        if "_made" not in self.__dict__:
            raise TypeError(f"{owner}.__init__() must be called when overriding __init__")
        bound = strict.bind(f"{owner}.{name}", overloads, args, kwargs)
        strict.calls.append((f"{owner}.{name}", bound))
        if name in strict.api["classes"][owner]["deprecated"]:
            raise DeprecationWarning(f"{owner}.{name}")
        act = getattr(self, f"_do_{name}", None)
        if act is None:
            raise NotImplementedError(f"trt_acts does not say what {owner}.{name} does")
        return act(**bound)

    return method


def _property(strict: Strict, owner: str, name: str, kind: str, how: str) -> Any:
    def get(self: Any) -> Any:
        act = getattr(self, f"_get_{name}", None)
        if act is None and f"_set_{name}" not in self.__dict__:
            raise NotImplementedError(f"trt_acts does not say what {owner}.{name} is")
        return self.__dict__[f"_set_{name}"] if act is None else act()

    def put(self: Any, value: Any) -> None:
        if kind:
            strict.require(kind, value, name)
        strict.calls.append((f"{owner}.{name}=", {"value": value}))
        self.__dict__[f"_set_{name}"] = value

    return property(get, put if how == "rw" else None)


def _is_buffer(value: Any) -> bool:
    try:
        memoryview(value).release()
    except TypeError:
        return False
    return True
