"""What graphs may not hold: between the inputs and outputs of every graph of a program no host tensor and no look at
a number. Run on ``meta``, where each kernel allocates and launches as on a GPU, and nothing computes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from helios import op
from helios.backend import Kernel
from helios.graph import Builder, Graph, Rate
from helios.lower import lower
from helios.model import presets
from helios.model.vae_run import decode_graphs
from helios.model.vae_split import Split
from helios.ops.pointwise import silu
from helios.pipeline.denoise import Layout, denoise_graphs
from helios.pipeline.history import Window
from helios.precision import precision
from helios.program import Program
from helios_cuda import CudaBackend
from helios_cuda.launch import recording


class OnMeta(CudaBackend):
    """The CUDA backend with its own kernels, on a device that has shapes and no numbers."""

    def __init__(self) -> None:
        super().__init__(graphs="off")

    @property
    def device(self) -> torch.device:
        return torch.device("meta")

    def memory(self) -> None:
        return None

    def reusable(self) -> int:
        return 0

    def link(self) -> None:
        return None


class Watch(TorchDispatchMode):
    """Notes operations on tensors of the host. Those that look at a number fail on ``meta`` by themselves."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: set[str] = set()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.count += 1
        if any(isinstance(x, Tensor) and x.device.type == "cpu" for x in tree_leaves((args, kwargs, result))):
            self.seen.add(str(func))
        return result


class Shapes:
    def __init__(self, program: Program) -> None:
        self.values = program.weight_inputs()

    def read(self, name: str) -> Tensor:
        return torch.empty(self.values[name].shape, dtype=self.values[name].dtype, device="meta")


def on_the_host(graphs: Mapping[str, Graph], backend: CudaBackend | None = None) -> dict[str, set[str]]:
    """Operations on host tensors, by the graph in which they are."""
    program = lower(graphs, backend or OnMeta())
    found: dict[str, set[str]] = {}
    with recording() as launches:
        program.load(Shapes(program))
        for name, graph in program.plan.graphs.items():
            values = {v.name: v for v in graph.inputs}
            made = {n: torch.empty(v.shape, dtype=v.dtype, device="meta") for n, v in values.items()}
            inputs = {n: program.weights.get(n, made[n]) for n in program.wanted(name)}
            launches.clear()
            with Watch() as watch:
                program.evaluate(name, inputs)
            assert watch.count + len(launches) > 0 or not graph.nodes
            found[name] = watch.seen
    return found


@pytest.mark.parametrize("name", ["bf16", "fp32", "fp8", "fp8-attention", "fp8-weights"])
@pytest.mark.parametrize("variant", ["distilled", "base"])
def test_phases_and_steps_of_the_transformer(name: str, variant: str) -> None:
    size, sampling = presets.size("tiny"), presets.variant(variant)
    layout = Layout(1, 8, 8, 16, Window())
    graphs = denoise_graphs(size.transformer, sampling.scheduler, sampling.pipeline, layout, precision(name))
    found = on_the_host(graphs)
    assert {"prompt", "chunk", "denoise.0"} <= set(found)
    assert {graph: seen for graph, seen in found.items() if seen and graph != "weights"} == {}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("group", [9, 3])
def test_decoding(group: int, dtype: torch.dtype) -> None:
    config = presets.size("tiny").vae
    graphs = decode_graphs(config, batch=1, latents=9, height=64, width=64, dtype=dtype, split=Split(group))
    assert {graph: seen for graph, seen in on_the_host(graphs).items() if seen} == {}


def test_it_sees_what_must_not_be() -> None:
    backend = OnMeta()
    with Builder("main") as build:
        build.output("y", silu(build.input("x", (2,), torch.float32, Rate.STEP)))
    graphs = {"main": build.graph()}
    assert on_the_host(graphs, backend)["main"] == set()
    assert op.get("silu").kind != "fused"

    def from_the_host(x: Tensor) -> Tensor:
        return x * torch.tensor([1.0, 2.0]).to(x.device)

    def looks(x: Tensor) -> Tensor:
        return x if bool((x > 0).any()) else -x

    backend.__dict__["kernels"] = {"silu": Kernel(from_the_host)}
    assert on_the_host(graphs, backend)["main"]
    backend.__dict__["kernels"] = {"silu": Kernel(looks)}
    with pytest.raises(RuntimeError, match="meta"):
        on_the_host(graphs, backend)
