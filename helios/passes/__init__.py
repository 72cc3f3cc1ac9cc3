"""Passes: each takes a graph and gives a graph; ``verify`` runs after every one."""

from helios.passes.expand import expand
from helios.passes.fuse import fuse
from helios.passes.phase import Plan, build_plan
from helios.passes.prune import prune
from helios.passes.quantize import quantize

__all__ = ["Plan", "build_plan", "expand", "fuse", "prune", "quantize"]
