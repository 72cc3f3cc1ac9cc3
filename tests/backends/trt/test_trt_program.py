"""Programs of engines on the recorder, for both versions and both ways of holding weights. Not run on a device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import pytest
import torch
import trt_acts
from torch import Tensor
from trt_networks import STAGES, Loaded, context, error, forwards, loaded, reference, step, tiny
from trt_rig import HostMachine, RecordedTrt, recorded

from helios.errors import BackendError, GraphError, UnsupportedNode
from helios.graph import Builder, Rate
from helios.lower import lower
from helios.ops.conv import conv3d
from helios.ops.layout import full
from helios.ops.linear import linear
from helios.ops.pointwise import add
from helios.passes import build_plan
from helios.pipeline.model import sized_model
from helios_cuda.graphs import Recorder
from helios_trt.units import units_of, without_constants

T = TypeVar("T")
BOUND = 1e-5


@pytest.fixture(scope="module", params=[(10, "profiles"), (11, "profiles"), (11, "inputs")], ids=str)
def there(request: pytest.FixtureRequest) -> Iterator[Loaded]:
    major, weights = request.param
    with loaded(major, weights=weights, graphs="off") as found:
        yield found


def test_velocities_are_those_of_the_reference(there: Loaded) -> None:
    here, wanted = context(there.program), context(reference())
    for entry in STAGES:
        found = there.program.run(entry, step(there.program, entry, 5), here)
        truth = reference().run(entry, step(reference(), entry, 5), wanted)
        assert error(found["velocity"], truth["velocity"]) < BOUND


def test_networks_are_strongly_typed_and_float32_is_float32(there: Loaded) -> None:
    flags = there.strict.module.NetworkDefinitionCreationFlag
    made = [given["flags"] for call, given in there.strict.calls if call == "Builder.create_network"]
    assert made
    assert set(made) == {1 << int(flags.STRONGLY_TYPED)}
    cleared = [given["flag"].name for call, given in there.strict.calls if call == "IBuilderConfig.clear_flag"]
    assert cleared == ["TF32"] * there.calls.count("Builder.create_builder_config")
    assert "IBuilderConfig.set_flag" not in there.calls


def test_each_stage_has_a_profile_of_its_exact_sizes(there: Loaded) -> None:
    shapes = [given for call, given in there.strict.calls if call == "IOptimizationProfile.set_shape"]
    if there.backend.chosen["weights"] == "inputs":
        assert not shapes  # every graph has sizes of its own, and an engine
        return
    assert all(given["min"] == given["opt"] == given["max"] for given in shapes)
    samples = [tuple(given["opt"]) for given in shapes if given["input"] == "sample"]
    plan = there.program.plan
    assert samples == [next(v.shape for v in plan.steps[s].inputs if v.name == "sample") for s in STAGES]


def test_weights_of_the_stages_are_held_once(there: Loaded) -> None:
    program = there.program
    read = {v.name: v.type.nbytes for v in program.weight_inputs().values()}
    built_in = {name for unit in program.units for name in unit.baked}
    outside = set(program.weights) & set(read)
    assert not outside & built_in
    steps = [unit for unit in program.units if unit.name in STAGES]
    if there.backend.chosen["weights"] == "profiles":
        assert [len(unit.graphs) for unit in steps] == [3]
        assert sum(unit.weight_bytes for unit in program.units) == sum(read[name] for name in built_in)
    else:
        assert [len(unit.graphs) for unit in steps] == [1, 1, 1]
        # What is built in of a stage is what its convolution needs, and nothing that is large.
        assert [unit.baked for unit in steps] == [("patch_embedding.weight", "patch_embedding.bias")] * 3
        assert outside | built_in == set(read)


def test_stages_read_weights_at_one_address() -> None:
    with loaded(11, weights="inputs", graphs="off") as found:
        before, here = len(found.strict.calls), context(found.program)
        for entry in STAGES:
            found.program.run(entry, step(found.program, entry, 1), here)
        addresses: dict[str, set[int]] = {}
        for call, given in found.strict.calls[before:]:
            if call == "IExecutionContext.set_tensor_address" and given["name"] in found.program.weights:
                addresses.setdefault(given["name"], set()).add(given["memory"])
        shared = [addresses[name] for name in found.program.weight_inputs() if name in addresses]
        assert len(shared) > 40
        assert all(len(places) == 1 for places in shared)


def test_contexts_share_one_piece_of_memory(there: Loaded) -> None:
    given = [given for call, given in there.strict.calls if call == "IExecutionContext.set_device_memory"]
    assert len({g["memory"] for g in given}) == 1
    profiles = max(len(unit.graphs) for unit in there.program.units)
    assert {g["size"] for g in given} == {profiles * trt_acts.WORKSPACE}


def test_later_run_writes_to_no_earlier_result(there: Loaded) -> None:
    here = context(there.program)
    first = there.program.run("denoise.1", step(there.program, "denoise.1", 1), here)["velocity"]
    kept = first.clone()
    second = there.program.run("denoise.1", step(there.program, "denoise.1", 2), here)["velocity"]
    assert torch.equal(first, kept)
    assert not torch.equal(first, second)


def test_inputs_of_any_strides_and_alignment(there: Loaded) -> None:
    here, given = context(there.program), step(there.program, "denoise.0", 3)
    wanted = there.program.run("denoise.0", given, here)["velocity"]
    strided = {n: x.transpose(0, -1).contiguous().transpose(0, -1) for n, x in given.items()}
    assert not strided["sample"].is_contiguous()
    odd = {n: torch.cat([torch.zeros(3), x.flatten()])[3:].view(x.shape) for n, x in given.items()}
    before = {n: x.clone() for n, x in odd.items()}
    for other in (strided, odd):
        assert torch.equal(there.program.run("denoise.0", other, here)["velocity"], wanted)
    assert all(torch.equal(odd[n], before[n]) for n in odd)


def test_every_context_has_its_own_profile(there: Loaded) -> None:
    chosen = [
        g["profile_index"] for c, g in there.strict.calls if c == "IExecutionContext.set_optimization_profile_async"
    ]
    wanted = [i for unit in there.program.units for i in range(len(unit.graphs))]
    assert chosen == wanted


def test_all_engines_are_built_before_one_is_loaded(there: Loaded) -> None:
    """A build times its kernels, and wants the whole device for it."""
    last_build = max(i for i, call in enumerate(there.calls) if call == "Builder.build_serialized_network")
    assert last_build < there.calls.index("Runtime.deserialize_cuda_engine")


def test_second_program_builds_nothing(there: Loaded) -> None:
    before = len(there.strict.calls)
    backend = RecordedTrt(**there.backend.chosen)
    again = lower(forwards(), backend)
    again.load(tiny().transformer_weights)
    new = [call for call, _ in there.strict.calls[before:]]
    assert "Runtime.deserialize_cuda_engine" in new
    assert "Builder" not in new
    assert backend.execution_plan()["engines"] == there.backend.execution_plan()["engines"]


def test_other_weights_are_another_engine() -> None:
    with loaded(11, weights="profiles", graphs="off") as first:
        other = RecordedTrt(weights="profiles", graphs="off")
        program = lower(forwards(), other)
        program.load(sized_model("tiny", "distilled", seed=1).transformer_weights)
        names, others = set(first.backend.engines.used), set(other.engines.used)
        assert {n.rpartition("-")[0] for n in names ^ others} == {"prompt", "chunk", "denoise.0"}
        given, here = step(program, "denoise.0", 1), context(program)
        mine = first.program.run("denoise.0", given, context(first.program))["velocity"]
        assert error(program.run("denoise.0", given, here)["velocity"], mine) > 0.1


class Replayed(Recorder):
    """Captures by remembering what to run, and writes each replay's results where the first one's lay."""

    def __init__(self) -> None:
        self.captured = 0

    def warm_up(self, run: Callable[[], object]) -> None:
        run()

    def capture(self, run: Callable[[], T]) -> tuple[Callable[[], None], T]:
        self.captured += 1
        first: Any = run()

        def replay() -> None:
            again: Any = run()
            for name, tensor in again.items():
                first[name].copy_(tensor)

        return replay, first


def test_captured_steps_give_the_bits_of_eager_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Replayed()
    monkeypatch.setattr(HostMachine, "recorder", lambda self: recorder)
    with loaded(11, weights="profiles", graphs="off") as eager, loaded(11, weights="profiles", graphs="on") as replayed:
        replayed.program.capture()
        assert recorder.captured == 3
        contexts = [(context(eager.program, seed), context(replayed.program, seed)) for seed in (0, 7)]
        kept: list[tuple[Tensor, Tensor]] = []
        for seed, entry in enumerate(STAGES * 2):
            for plain, other in contexts:
                given = step(eager.program, entry, seed)
                wanted = eager.program.run(entry, given, plain)["velocity"]
                kept.append((replayed.program.run(entry, given, other)["velocity"], wanted))
        assert all(torch.equal(found, wanted) for found, wanted in kept)
    assert recorder.captured == 3
    assert replayed.program.execution()["graphs"] == ["denoise.2", "denoise.1", "denoise.0"]
    assert eager.program.execution()["eager"] == "asked for"


def test_capture_that_fails_is_told_and_steps_run_eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(Replayed):
        def capture(self, run: Callable[[], T]) -> tuple[Callable[[], None], T]:
            raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(HostMachine, "recorder", lambda self: Broken())
    with loaded(11, graphs="on") as found:
        with pytest.warns(RuntimeWarning, match="not permitted when stream is capturing"):
            out = found.program.run("denoise.0", step(found.program, "denoise.0", 1), context(found.program))
        assert out["velocity"].isfinite().all()
        assert found.program.eager.startswith("not captured")


def test_memory_of_its_own_where_a_version_cannot_share(monkeypatch: pytest.MonkeyPatch) -> None:
    with loaded(10, graphs="off") as with_sharing:
        truth = with_sharing.program.run(
            "denoise.0", step(with_sharing.program, "denoise.0", 1), context(with_sharing.program)
        )
        monkeypatch.delattr(with_sharing.strict.module.ICudaEngine, "get_device_memory_size_for_profile_v2")
        program = lower(forwards(), RecordedTrt(graphs="off"))
        before = len(with_sharing.strict.calls)
        program.load(tiny().transformer_weights)
        new = with_sharing.strict.calls[before:]
        assert "IExecutionContext.set_device_memory" not in [call for call, _ in new]
        strategies = {g["strategy"].name for c, g in new if c == "ICudaEngine.create_execution_context"}
        assert strategies == {"STATIC"}
        found = program.run("denoise.0", step(program, "denoise.0", 1), context(program))
        assert torch.equal(found["velocity"], truth["velocity"])


@pytest.mark.parametrize("name", ["bf16", "fp16"])
@pytest.mark.parametrize("major", [10, 11])
def test_sixteen_bits_are_built_as_the_graphs_say(major: int, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Types and sizes alone: nothing computes in bfloat16 here."""
    monkeypatch.setenv(trt_acts.ZEROS, "1")
    with loaded(major, name, graphs="off") as found:
        wanted = torch.bfloat16 if name == "bf16" else torch.float16
        out = found.program.run("denoise.2", step(found.program, "denoise.2", 1), context(found.program))
        assert out["velocity"].dtype == wanted
        for unit in found.program.units:
            if unit.name == "denoise.0":
                widths = {v.dtype for v in unit.graphs[0].inputs if v.name in unit.baked}
                assert widths == {wanted, torch.float32}  # modulation stays float32, as published


def test_tensor_of_another_type_in_the_engine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(trt_acts.DTYPES, 1, ("HALF", trt_acts.DTYPES[1][1]))
    with pytest.raises(BackendError, match="has a tensor"), loaded(11, graphs="off"):
        pass


def test_float64_is_no_type_of_an_engine() -> None:
    with Builder("wide") as build:
        x = build.input("x", (2, 3), torch.float64, Rate.STEP)
        build.output("y", add(x, x))
    with pytest.raises(UnsupportedNode, match="no tensors of float64"):
        lower({"wide": build.graph()}, RecordedTrt())


def test_kernel_of_a_convolution_that_is_no_weight_is_refused() -> None:
    with Builder("convolves") as build:
        x = build.input("x", (1, 2, 1, 4, 4), torch.float32, Rate.STEP)
        kernel = build.input("kernel", (3, 2, 1, 1, 1), torch.float32, Rate.STEP)
        build.output("y", conv3d(x, kernel))
    with pytest.raises(UnsupportedNode, match="wants its kernel and bias to be constant"):
        lower({"convolves": build.graph()}, RecordedTrt())


def test_graphs_that_cannot_be_unified_have_an_engine_each() -> None:
    graphs = {}
    for name, twice in (("once", False), ("twice", True)):
        with Builder(name) as build:
            x = build.input("x", (2, 3), torch.float32, Rate.STEP)
            w = build.input("w", (3, 3), torch.float32, Rate.WEIGHTS)
            y = linear(x, w)
            build.output("y", linear(y, w) if twice else y)
        graphs[name] = build.graph()
    units = units_of(build_plan(graphs), ["w"], "profiles")
    assert [(unit.name, len(unit.graphs), unit.baked) for unit in units] == [("once", 1, ("w",)), ("twice", 1, ("w",))]


def test_running_before_loading_is_told() -> None:
    program = lower(forwards(), RecordedTrt())
    with pytest.raises(GraphError, match="no weights yet"):
        program.run("denoise.0", step(program, "denoise.0", 0))


def test_constants_and_what_is_handed_on_need_no_engine() -> None:
    """An output of each kind: computed, constant, made of constants, and an input itself."""
    with Builder("mixed") as build:
        x = build.input("x", (2, 3), torch.float32, Rate.STEP)
        two = full(shape=(2, 3), value=2.0, dtype=torch.float32)
        build.output("sum", add(x, two))
        build.output("two", two)
        build.output("four", add(two, two))
        build.output("same", x)
    graph = build.graph()
    rest, alone = without_constants(graph)
    assert [name for name, _ in rest.outputs] == ["sum", "same"]
    assert [name for name, _ in alone.outputs] == ["two", "four"]
    with recorded(11):
        program = lower({"mixed": graph}, RecordedTrt())
        program.load(tiny().transformer_weights)
        given = torch.arange(6.0).view(2, 3)
        made = program.run("mixed", {"x": given})
    wanted = {"sum": given + 2, "two": torch.full((2, 3), 2.0), "four": torch.full((2, 3), 4.0), "same": given}
    assert {name: tensor.tolist() for name, tensor in made.items()} == {n: t.tolist() for n, t in wanted.items()}


def test_tables_of_the_weights_phase_are_in_no_engine(there: Loaded) -> None:
    """RoPE tables are constants: 7 MB of an engine at the published size, whose only work would be to copy them."""
    (unit,) = (unit for unit in there.program.units if unit.name == "weights")
    assert not [node for node in unit.graphs[0].nodes if node.op == "rope_table"]
    assert [node for node in there.program.plan.phases[Rate.WEIGHTS].nodes if node.op == "rope_table"]
