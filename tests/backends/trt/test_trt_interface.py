"""The recorder refuses what the real bindings of each version would: without that, what it accepts says little."""

from __future__ import annotations

import json
from typing import Any

import pytest
import trt_acts
from trt_rig import recorded
from trt_strict import API, Strict

REMOVED = ("FP16", "BF16", "INT8", "FP8", "OBEY_PRECISION_CONSTRAINTS", "PREFER_PRECISION_CONSTRAINTS")


@pytest.fixture(params=[10, 11])
def strict(request: pytest.FixtureRequest) -> Strict:
    return Strict(request.param, trt_acts.ACTS)


@pytest.fixture
def log(strict: Strict) -> Any:
    return strict.module.Logger()


def test_data_says_where_it_is_from() -> None:
    for major, version in ((10, "10.16.1.11"), (11, "11.4.0.106")):
        origin = json.loads((API / f"tensorrt_{major}.json").read_text())["origin"]
        assert origin["version"] == version
        assert version in origin["wheel"]
        assert version in origin["command"]
        assert len(origin["sha256"]) == 64


@pytest.mark.parametrize("flag", REMOVED)
def test_flags_of_weak_typing_ended_with_11(flag: str) -> None:
    assert hasattr(Strict(10, trt_acts.ACTS).module.BuilderFlag, flag)
    assert not hasattr(Strict(11, trt_acts.ACTS).module.BuilderFlag, flag)


def test_explicit_batch_ended_with_11() -> None:
    ten, eleven = (Strict(major, trt_acts.ACTS) for major in (10, 11))
    assert hasattr(ten.module.NetworkDefinitionCreationFlag, "EXPLICIT_BATCH")
    assert not hasattr(eleven.module.NetworkDefinitionCreationFlag, "EXPLICIT_BATCH")
    with pytest.raises(ValueError, match="bits that this version does not know"):
        eleven.module.Builder(eleven.module.Logger()).create_network(1 << 3)


def test_flag_of_strong_typing_has_another_bit_in_11() -> None:
    """A number written down for 10 asks 11 for something else."""
    ten, eleven = (Strict(major, trt_acts.ACTS).module.NetworkDefinitionCreationFlag for major in (10, 11))
    assert int(ten.STRONGLY_TYPED) == int(eleven.PREFER_JIT_PYTHON_PLUGINS) == 1
    assert int(eleven.STRONGLY_TYPED) == 0


def test_weakly_typed_network_is_refused() -> None:
    ten = Strict(10, trt_acts.ACTS)
    with pytest.raises(ValueError, match="weakly typed"):
        ten.module.Builder(ten.module.Logger()).create_network()


def test_unknown_names_are_refused(strict: Strict, log: Any) -> None:
    config = strict.module.Builder(log).create_builder_config()
    with pytest.raises(AttributeError):
        strict.module.BuildConfig  # noqa: B018
    with pytest.raises(AttributeError):
        config.max_workspace_size = 1
    with pytest.raises(AttributeError):
        config.set_flags(1)


def test_arguments_are_checked(strict: Strict, log: Any) -> None:
    module = strict.module
    config = module.Builder(log).create_builder_config()
    with pytest.raises(TypeError, match="pool_size is missing"):
        config.set_memory_pool_limit(module.MemoryPoolType.WORKSPACE)
    with pytest.raises(TypeError, match="no argument 'size'"):
        config.set_memory_pool_limit(module.MemoryPoolType.WORKSPACE, size=1)
    with pytest.raises(TypeError, match="flag is a int, not BuilderFlag"):
        config.set_flag(3)
    with pytest.raises(TypeError, match="takes 1, got 2"):
        config.clear_flag(module.BuilderFlag.TF32, module.BuilderFlag.TF32)
    with pytest.raises(TypeError, match="not int"):
        config.builder_optimization_level = "3"


def test_properties_that_can_only_be_read(strict: Strict, log: Any) -> None:
    config = strict.module.Builder(log).create_builder_config()
    with pytest.raises(AttributeError):
        config.num_optimization_profiles = 3


def test_base_class_has_to_be_initialised(strict: Strict) -> None:
    class Careless(strict.module.ILogger):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            pass

        def log(self, severity: Any, msg: str) -> None:
            pass

    with pytest.raises(TypeError, match="constructor of ILogger was not called"):
        strict.module.Builder(Careless())


def test_what_has_no_constructor_cannot_be_made(strict: Strict) -> None:
    with pytest.raises(TypeError, match="No constructor defined"):
        strict.module.ICudaEngine()


def test_only_host_memory_is_a_buffer(strict: Strict) -> None:
    buffers = [name for name, known in strict.api["classes"].items() if known["buffer"]]
    assert buffers == ["IHostMemory"]
    held = trt_acts.host_memory(strict, b"abc")
    assert bytes(memoryview(held)) == b"abc"
    with pytest.raises(TypeError, match="no sequence"):
        len(held)


def test_name_outside_of_the_data_is_no_name_that_is_missing(strict: Strict) -> None:
    with pytest.raises(NotImplementedError, match=r"tools/trt_api/dump\.py"):
        strict.module.IPluginRegistry  # noqa: B018


def test_recorder_is_what_is_imported_and_only_within() -> None:
    with recorded(11) as strict:
        import tensorrt

        assert tensorrt is strict.module
    with pytest.raises(ImportError):
        import tensorrt
