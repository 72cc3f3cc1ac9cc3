"""One op as the folder of an ONNX backend test: a model of one node or few, and a test data set a run.

An op that the standard has a form for is written in it; any other is one node of the domain ``ai.helios``, named as the
op, with its attributes. ``onnx`` is needed for this alone, and only here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from helios.errors import InputError
from helios.graph import DTYPES
from helios.media.storage import atomic

if TYPE_CHECKING:
    from onnx import NodeProto, TensorProto

__all__ = ["DOMAIN", "OPSET", "STANDARD", "need", "write"]

DOMAIN = "ai.helios"
OPSET = 20
IR = 10


def need() -> None:
    """Raises InputError where ``onnx`` is not installed."""
    try:
        import onnx  # noqa: F401
    except ImportError as error:
        raise InputError(
            "the format onnx needs the package onnx, which is not installed", "pip install onnx"
        ) from error


def write(folder: Path, told: Mapping[str, Any], inputs: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """``model.onnx`` and ``test_data_set_<run>/`` beside a case's other files. A graph of many nodes has none: its text
    is in case.json.

    Args:
        told: the case, as its case.json says it.
        inputs, expected: by name, as its other files hold them.
    """
    if "op" not in told:
        return
    _save(folder / "model.onnx", _model(told))
    for number, run in enumerate(told["runs"]):
        place = folder / f"test_data_set_{number}"
        place.mkdir()
        for kind, named in (("input", inputs), ("output", expected)):
            names = [name for name in told[f"{kind}s"] if name.partition("@")[2] == run]
            for i, name in enumerate(names):
                tensor = named[name] if kind == "input" else named[name].to(DTYPES[told["outputs"][name][0]])
                _save(place / f"{kind}_{i}.pb", _tensor(name.partition("@")[0], tensor))


def _save(path: Path, proto: Any) -> None:
    with atomic(path) as part:
        part.write_bytes(proto.SerializeToString(deterministic=True))


def _element(dtype: torch.dtype | str) -> int:
    from onnx import TensorProto

    name = str(dtype).removeprefix("torch.")
    words = {"float32": "FLOAT", "float64": "DOUBLE", "float8_e4m3fn": "FLOAT8E4M3FN"}
    return int(getattr(TensorProto, words.get(name, name.upper())))


def _tensor(name: str, tensor: Tensor) -> TensorProto:
    from onnx import helper

    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
    return helper.make_tensor(name, _element(tensor.dtype), list(tensor.shape), raw, raw=True)


def _model(told: Mapping[str, Any]) -> Any:
    from onnx import checker, helper

    def values(kind: str) -> list[Any]:
        first = {name: type_ for name, type_ in told[kind].items() if "@" not in name}
        return [helper.make_tensor_value_info(name, _element(type_[0]), type_[1]) for name, type_ in first.items()]

    nodes = STANDARD[told["op"]](told) if told["op"] in STANDARD else None
    domains = [helper.make_opsetid("", OPSET), *([] if nodes else [helper.make_opsetid(DOMAIN, 1)])]
    graph = helper.make_graph(nodes or [_own(told)], told["op"], values("inputs"), values("outputs"))
    model = helper.make_model(graph, opset_imports=domains, ir_version=IR, producer_name="helios_conformance")
    if nodes:
        checker.check_model(model, full_check=True)
    return model


def _own(told: Mapping[str, Any]) -> NodeProto:
    """The op as a node of our own domain. Attributes that are None or empty are absent."""
    from onnx import helper

    inputs = [name for name in told["inputs"] if "@" not in name]
    outputs = [name for name in told["outputs"] if "@" not in name]
    attrs = {name: _attribute(value) for name, value in told["attributes"].items() if value not in (None, [])}
    return helper.make_node(told["op"], inputs, outputs, domain=DOMAIN, **attrs)


def _attribute(value: Any) -> Any:
    """Lists of mixed or nested content have no form in ONNX: as text, as case.json has them."""
    flat = value if isinstance(value, list) else [value]
    kinds = {type(v) for v in flat}
    return (
        int(value)
        if isinstance(value, bool)
        else value
        if len(kinds) == 1 and kinds < {int, float, str}
        else str(value)
    )


Form = Callable[[Mapping[str, Any]], "list[NodeProto] | None"]
"""The nodes of an op on a case's inputs ``i0`` …, with outputs ``o0`` …; None where the standard has no form for it."""


def _node(kind: str, inputs: Sequence[str], output: str, **attrs: Any) -> NodeProto:
    from onnx import helper

    return helper.make_node(kind, list(inputs), [output], **attrs)


def _numbers(name: str, values: Sequence[int]) -> NodeProto:
    """A constant of int64."""
    return _node("Constant", [], name, value=_tensor(name, torch.tensor(values, dtype=torch.int64)))


def _scalar(name: str, value: float, dtype: str) -> NodeProto:
    return _node("Constant", [], name, value=_tensor(name, torch.tensor(value, dtype=DTYPES[dtype])))


def _dtype(told: Mapping[str, Any], name: str = "i0") -> str:
    return str(told["inputs"][name][0])


def _add(told: Mapping[str, Any]) -> list[NodeProto] | None:
    return [_node("Add", ["i0", "i1"], "o0")] if _dtype(told) == _dtype(told, "i1") else None


def _silu(told: Mapping[str, Any]) -> list[NodeProto]:
    return [_node("Sigmoid", ["i0"], "s"), _node("Mul", ["i0", "s"], "o0")]


def _gelu(told: Mapping[str, Any]) -> list[NodeProto]:
    return [_node("Gelu", ["i0"], "o0", approximate="tanh")]


def _linear(told: Mapping[str, Any]) -> list[NodeProto] | None:
    if len({_dtype(told, name) for name in told["inputs"] if "@" not in name}) > 1:
        return None
    bias = "i2" in told["inputs"]
    nodes = [_node("Transpose", ["i1"], "w", perm=[1, 0]), _node("MatMul", ["i0", "w"], "m" if bias else "o0")]
    return [*nodes, _node("Add", ["m", "i2"], "o0")] if bias else nodes


def _attention(told: Mapping[str, Any]) -> list[NodeProto]:
    scale = told["attributes"]["scale"] or told["inputs"]["i0"][1][3] ** -0.5
    return [
        _node("Transpose", ["i0"], "q", perm=[0, 2, 1, 3]),
        _node("Transpose", ["i1"], "k", perm=[0, 2, 3, 1]),
        _node("Transpose", ["i2"], "v", perm=[0, 2, 1, 3]),
        _node("MatMul", ["q", "k"], "qk"),
        _scalar("scale", scale, _dtype(told)),
        _node("Mul", ["qk", "scale"], "scores"),
        _node("Softmax", ["scores"], "p", axis=-1),
        _node("MatMul", ["p", "v"], "pv"),
        _node("Transpose", ["pv"], "o0", perm=[0, 2, 1, 3]),
    ]


def _cast(told: Mapping[str, Any]) -> list[NodeProto]:
    return [_node("Cast", ["i0"], "o0", to=_element(told["attributes"]["dtype"]))]


def _concat(told: Mapping[str, Any]) -> list[NodeProto]:
    parts = [name for name in told["inputs"] if "@" not in name]
    return [_node("Concat", parts, "o0", axis=told["attributes"]["dim"])]


def _reshape(told: Mapping[str, Any]) -> list[NodeProto]:
    return [_numbers("shape", told["outputs"]["o0"][1]), _node("Reshape", ["i0", "shape"], "o0")]


def _expand(told: Mapping[str, Any]) -> list[NodeProto]:
    return [_numbers("shape", told["outputs"]["o0"][1]), _node("Expand", ["i0", "shape"], "o0")]


def _permute(told: Mapping[str, Any]) -> list[NodeProto]:
    return [_node("Transpose", ["i0"], "o0", perm=told["attributes"]["dims"])]


def _narrow(told: Mapping[str, Any]) -> list[NodeProto]:
    dim, start, length = (told["attributes"][name] for name in ("dim", "start", "length"))
    bounds = [_numbers("a", [start]), _numbers("b", [start + length]), _numbers("d", [dim])]
    return [*bounds, _node("Slice", ["i0", "a", "b", "d"], "o0")]


def _clamp(told: Mapping[str, Any]) -> list[NodeProto]:
    low, high = (told["attributes"][name] for name in ("low", "high"))
    ends = [_scalar("low", low, _dtype(told)), _scalar("high", high, _dtype(told))]
    return [*ends, _node("Clip", ["i0", "low", "high"], "o0")]


STANDARD: Mapping[str, Form] = {
    "add": _add,
    "attention": _attention,
    "cast": _cast,
    "clamp": _clamp,
    "concat": _concat,
    "expand": _expand,
    "gelu": _gelu,
    "linear": _linear,
    "narrow": _narrow,
    "permute": _permute,
    "reshape": _reshape,
    "silu": _silu,
    "split_heads": _reshape,
}
"""Ops that the standard has a form for."""
