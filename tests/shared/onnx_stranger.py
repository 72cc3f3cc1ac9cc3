"""Runs an export as a stranger would: by its manifest, with numpy and ONNX Runtime, and nothing of Helios or torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

Arrays = dict[str, Any]


class Stranger:
    """Phases are held by model name; programs say what each call of a step takes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.told = json.loads((folder / "manifest.json").read_text())
        self.models = {model["name"]: model for model in self.told["models"]}
        self.sessions: Arrays = {}

    def run(self, name: str, held: dict[str, Arrays], given: Arrays) -> Arrays:
        """One model, fed from what slower phases hold and what the caller gives."""
        model = self.models[name]
        feeds = {}
        for told in model["inputs"]:
            source = told["source"]
            value = held[source["model"]][source["output"]] if "model" in source else given[told["name"]]
            feeds[told["name"]] = np.asarray(value, told["dtype"])
        if name not in self.sessions:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = 1
            path = str(self.folder / model["file"])
            self.sessions[name] = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        outputs = [told["name"] for told in model["outputs"]]
        return dict(zip(outputs, self.sessions[name].run(outputs, feeds), strict=True))

    def phase(self, often: str, held: dict[str, Arrays], given: Arrays) -> dict[str, Arrays]:
        """What is held after ``load``, ``prompt`` or ``chunk``, with what was held before."""
        for name in self.told["phases"].get(often, ()):
            held = {**held, name: self.run(name, held, given)}
        return held

    def program(self, name: str, given: Arrays, held: dict[str, dict[str, Arrays]], slower: Arrays) -> Any:
        """The calls of one program; ``held`` by prompt, ``""`` where a call names none."""
        program, done = self.told["programs"][name], []
        for call in program["calls"]:
            shapes = {told["name"]: told["shape"] for told in self.models[call["model"]]["inputs"]}
            inputs = {key: value(told, given, done, shapes[key]) for key, told in call["inputs"].items()}
            done.append(self.run(call["model"], held[call.get("prompt", "")], {**slower, **inputs}))
        return value(program["result"], given, done, [])


def value(told: Any, given: Arrays, done: list[Arrays], shape: list[int]) -> Any:
    """What one source of a program stands for."""
    if "concat" in told:
        return np.concatenate([value(part, given, done, shape) for part in told["concat"]], told["axis"])
    if "call" in told:
        return done[told["call"]][told["output"]]
    if "given" in told:
        whole = given[told["given"]]
        return whole if "axis" not in told else np.take(whole, range(told["start"], told["stop"]), told["axis"])
    return np.zeros(shape) if "zeros" in told else np.array(told["value"])
