"""The engine of one product, and how a test of the store comes by it."""

from __future__ import annotations

from pathlib import Path

import torch
from trt_strict import Strict

from helios.graph import Builder, Rate
from helios.ops.linear import linear
from helios.passes import build_plan
from helios_trt.engine import Engine
from helios_trt.engines import Engines
from helios_trt.units import Unit, units_of


class Weights:
    """One weight of one number."""

    def __init__(self, number: float) -> None:
        self.number = number

    def read(self, name: str) -> torch.Tensor:
        return torch.full((64, 64), self.number)


def unit(rows: int = 2) -> Unit:
    with Builder("product") as build:
        x = build.input("x", (rows, 64), torch.float32, Rate.STEP)
        w = build.input("w", (64, 64), torch.float32, Rate.WEIGHTS)
        build.output("y", linear(x, w))
    (found,) = units_of(build_plan({"product": build.graph()}), ["w"], "profiles")
    return found


def opened(engines: Engines, wanted: Unit, weights: Weights) -> Engine:
    return engines.open(engines.ready(wanted, weights), weights)


def builds(strict: Strict) -> int:
    return sum(call == "Builder.build_serialized_network" for call, _ in strict.calls)


def only(folder: Path) -> Path:
    (found,) = folder.glob("*.engine")
    return found
