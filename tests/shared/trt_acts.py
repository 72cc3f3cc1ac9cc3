"""What the calls of ``trt_strict`` do: just enough of TensorRT to see whether it is used right.

An engine is the ONNX model itself, with the version and the device that it is for, and computes with ONNX Runtime on
the CPU, out of and into the memory that it was given the addresses of. It is strict in what the documentation demands
of a caller: profiles for what is dynamic, a profile for each context, addresses and memory that are aligned, shapes
within their profile. Nothing here is TensorRT, and no arithmetic or time of it is shown.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import time
from typing import Any

import onnx
import onnxruntime
from onnx import TensorProto

MAGIC = b"STANDIN1"
DTYPES = {  # what TensorRT calls them, and their bytes
    TensorProto.FLOAT: ("FLOAT", 4),
    TensorProto.FLOAT16: ("HALF", 2),
    TensorProto.BFLOAT16: ("BF16", 2),
    TensorProto.INT64: ("INT64", 8),
    TensorProto.INT32: ("INT32", 4),
    TensorProto.BOOL: ("BOOL", 1),
    TensorProto.UINT8: ("UINT8", 1),
}
WORKSPACE = 4096
ALIGNMENT = 256
DEVICE = "STANDIN_DEVICE"
"""Environment: the device that an engine is built for, and runs on alone."""
STEP = "STANDIN_STEP_SECONDS"
"""Environment: how long each of the steps of a build takes."""

LACKS = "STANDIN_LACKS"
"""Environment: ops of ONNX that the parser has no importer for."""

ZEROS = "STANDIN_ZEROS"
"""Environment: nothing is computed, for types that ONNX Runtime has no arithmetic for."""


def pause() -> None:
    time.sleep(float(os.environ.get(STEP, "0")))


def device() -> str:
    return os.environ.get(DEVICE, "device 0")


class ILogger:
    def _tell(self, level: str, message: str) -> None:
        self.log(getattr(self.Severity, level), message)  # type: ignore[attr-defined]


class Builder:
    def _do_create_network(self: Any, flags: int = 0) -> Any:
        known = {1 << int(flag) for flag in self._strict.module.NetworkDefinitionCreationFlag}
        if flags & ~sum(known):
            raise ValueError(f"flags {flags:#x} has bits that this version does not know")
        strong = 1 << int(self._strict.module.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        if not flags & strong and self._strict.module.__version__.startswith("10."):
            raise ValueError("weakly typed: on TensorRT 10 this has to be asked for")
        return self._strict.make("INetworkDefinition", _model=None)

    def _do_create_builder_config(self: Any) -> Any:
        flags = {"TF32"}  # on by default
        return self._strict.make("IBuilderConfig", _flags=flags, _profiles=[], _pools={}, _cache=None)

    def _do_create_optimization_profile(self: Any) -> Any:
        return self._strict.make("IOptimizationProfile", _shapes={})

    def _do_build_serialized_network(self: Any, network: Any, config: Any) -> Any:
        if network._model is None:
            self._logger._tell("ERROR", "the network is empty")
            return None
        problem = _profiles_problem(network._model, config)
        if problem or not _watched(config):
            self._logger._tell("ERROR", problem or "the build was cancelled by the progress monitor")
            return None
        head = {
            "version": self._strict.module.__version__,
            "device": device(),
            "profiles": [profile._shapes for profile in config._profiles] or [{}],
            "flags": sorted(config._flags),
            "detailed": config.__dict__.get("_set_profiling_verbosity") is not None,
        }
        text = json.dumps(head).encode()
        if config._cache is not None:
            config._cache._data += b"+"
        body = network._model.SerializeToString()
        return host_memory(self._strict, MAGIC + len(text).to_bytes(8, "little") + text + body)


def _profiles_problem(model: Any, config: Any) -> str:
    dynamic = {v.name: _shape(v) for v in model.graph.input if -1 in _shape(v)}
    if dynamic and not config._profiles:
        return f"{next(iter(dynamic))} is dynamic, and no optimization profile was given"
    for profile in config._profiles:
        missing = set(dynamic) - set(profile._shapes)
        if missing:
            return f"a profile lacks {sorted(missing)[0]}"
    return ""


def _watched(config: Any) -> bool:
    """Nested phases, as a build reports them; False where the monitor wants no more."""
    monitor = config.__dict__.get("_set_progress_monitor")
    if monitor is None:
        return True
    monitor.phase_start("Building Engine", None, 3)
    going = True
    for outer in range(3):
        monitor.phase_start("Timing", "Building Engine", 2)
        for inner in range(2):
            pause()
            going = going and monitor.step_complete("Timing", inner)
        monitor.phase_finish("Timing")
        going = going and monitor.step_complete("Building Engine", outer)
    monitor.phase_finish("Building Engine")
    return going


class IHostMemory(bytearray):
    """What has the buffer protocol and nothing else: before Python 3.12 only a built-in type gives it."""

    def _get_nbytes(self: Any) -> int:
        return memoryview(self).nbytes

    def _refuse(self: Any, *given: Any) -> Any:
        raise TypeError("IHostMemory is a buffer and no sequence: memoryview(it)")

    __len__ = __getitem__ = __iter__ = __add__ = __contains__ = _refuse


def host_memory(strict: Any, data: bytes) -> Any:
    made = strict.make("IHostMemory")
    bytearray.extend(made, data)
    return made


class IBuilderConfig:
    def _do_set_flag(self: Any, flag: Any) -> None:
        self._flags.add(flag.name)

    def _do_clear_flag(self: Any, flag: Any) -> None:
        self._flags.discard(flag.name)

    def _do_add_optimization_profile(self: Any, profile: Any) -> int:
        self._profiles.append(profile)
        return len(self._profiles) - 1

    def _do_set_memory_pool_limit(self: Any, pool: Any, pool_size: int) -> None:
        self._pools[pool.name] = pool_size

    def _do_create_timing_cache(self: Any, serialized_timing_cache: Any) -> Any:
        data = bytes(serialized_timing_cache)
        if data and not data.startswith(MAGIC):
            return None
        return self._strict.make("ITimingCache", _data=data or MAGIC)

    def _do_set_timing_cache(self: Any, cache: Any, ignore_mismatch: bool) -> bool:
        self._cache = cache
        return True

    def _do_get_timing_cache(self: Any) -> Any:
        return self._cache


class ITimingCache:
    def _do_combine(self: Any, input_cache: Any, ignore_mismatch: bool) -> bool:
        self._data = max(self._data, input_cache._data, key=len)  # what both know is known once
        return True

    def _do_serialize(self: Any) -> Any:
        return host_memory(self._strict, self._data)


class IOptimizationProfile:
    def _do_set_shape(self: Any, input: str, min: Any, opt: Any, max: Any) -> None:
        if not all(a <= b <= c for a, b, c in zip(min, opt, max, strict=True)):
            raise ValueError(f"{input}: min <= opt <= max does not hold")
        self._shapes[input] = [list(min), list(max)]


class OnnxParser:
    def _start(self: Any, network: Any, logger: Any) -> None:
        self._network, self._problems = network, []

    def _do_supports_operator(self: Any, op_name: str) -> bool:
        return op_name not in os.environ.get(LACKS, "").split()

    def _do_parse_from_file(self: Any, model: str) -> bool:
        try:
            loaded = onnx.load(model)
            unsupported = {node.op_type for node in loaded.graph.node if not self._do_supports_operator(node.op_type)}
            if unsupported:
                raise ValueError(f"No importer registered for op: {min(unsupported)}")
            _attention_kernels(loaded)
            _constant_kernels(loaded)
            _own_attributes_dropped(loaded)
            onnx.checker.check_model(loaded, full_check=True)
            for value in (*loaded.graph.input, *loaded.graph.output):
                if value.type.tensor_type.elem_type not in DTYPES:
                    raise ValueError(f"{value.name} is of no type that an engine has")
        except Exception as error:
            self._problems.append(str(error))
            return False
        self._network._model = loaded
        return True

    def _get_num_errors(self: Any) -> int:
        return len(self._problems)

    def _do_get_error(self: Any, index: int) -> Any:
        return self._strict.make("ParserError", _text=self._problems[index])


def _attention_kernels(model: Any) -> None:
    """Attention has a fused kernel in 16 bits, for some heads; or it was said that it may be taken apart."""
    types = {v.name: v.type.tensor_type for v in (*model.graph.value_info, *model.graph.input)}
    for node in model.graph.node:
        if node.op_type != "Attention":
            continue
        found = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        kind = types[node.input[0]]
        half = kind.elem_type in (TensorProto.FLOAT16, TensorProto.BFLOAT16)
        head = kind.shape.dim[-1].dim_value // found["q_num_heads"]
        if found.get("TRT_decomposable"):
            if half:
                raise ValueError("attention in 16 bits, taken apart: scores are rounded to 16 bits")
        elif not (half and 16 <= head <= 256 and head % 8 == 0):
            raise ValueError(f"no fused kernel for attention with heads of {head}, and it may not be taken apart")
        elif found["scale"] != 1:
            raise ValueError("attention in 16 bits with a scale, whose root rounds queries and keys")


def _constant_kernels(model: Any) -> None:
    known = {tensor.name for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Conv" and not set(node.input[1:]) <= known:
            raise ValueError(f"a convolution multiplies with what is no initializer: {list(node.input)}")


def _own_attributes_dropped(model: Any) -> None:
    """What TensorRT reads beyond ONNX, and ONNX does not know."""
    for node in model.graph.node:
        kept = [a for a in node.attribute if not a.name.startswith("TRT_")]
        del node.attribute[:]
        node.attribute.extend(kept)


class ParserError:
    def _do_desc(self: Any) -> str:
        return self._text

    def _do_node_name(self: Any) -> str:
        return "node"

    def _do_node_operator(self: Any) -> str:
        return "Operator"


class INetworkDefinition:
    def _get_num_layers(self: Any) -> int:
        return len(self._model.graph.node)

    def _get_num_inputs(self: Any) -> int:
        return len(self._model.graph.input)

    def _get_num_outputs(self: Any) -> int:
        return len(self._model.graph.output)


class Runtime:
    def _do_deserialize_cuda_engine(self: Any, serialized_engine: Any) -> Any:
        data = bytes(serialized_engine)
        if not data.startswith(MAGIC):
            self._logger._tell("ERROR", "Serialization assertion stdVersionRead == kSERIALIZATION_VERSION failed.")
            return None
        size = int.from_bytes(data[8:16], "little")
        head = json.loads(data[16 : 16 + size])
        for what, here in (("version", self._strict.module.__version__), ("device", device())):
            if head[what] != here:
                self._logger._tell("ERROR", f"the engine is for {what} {head[what]}, this is {here}")
                return None
        return self._strict.make("ICudaEngine", **_engine_state(head, onnx.load_from_string(data[16 + size :])))


def _engine_state(head: dict[str, Any], model: Any) -> dict[str, Any]:
    tensors = [(v, "INPUT") for v in model.graph.input] + [(v, "OUTPUT") for v in model.graph.output]
    return {"_head": head, "_model": model, "_tensors": {v.name: (v, mode) for v, mode in tensors}, "_session": None}


def _shape(value: Any) -> list[int]:
    return [d.dim_value if d.HasField("dim_value") else -1 for d in value.type.tensor_type.shape.dim]


class ICudaEngine:
    def _get_num_io_tensors(self: Any) -> int:
        return len(self._tensors)

    def _get_num_layers(self: Any) -> int:
        return len(self._model.graph.node)

    def _get_num_optimization_profiles(self: Any) -> int:
        return len(self._head["profiles"])

    def _do_get_tensor_name(self: Any, index: int) -> str:
        return list(self._tensors)[index]

    def _do_get_tensor_mode(self: Any, name: str) -> Any:
        return getattr(self._strict.module.TensorIOMode, self._tensors[name][1])

    def _do_get_tensor_dtype(self: Any, name: str) -> Any:
        return getattr(self._strict.module.DataType, DTYPES[self._tensors[name][0].type.tensor_type.elem_type][0])

    def _do_get_tensor_shape(self: Any, name: str) -> Any:
        return _shape(self._tensors[name][0])

    def _do_get_device_memory_size_for_profile_v2(self: Any, profile_index: int) -> int:
        return WORKSPACE * (1 + profile_index)

    def _do_create_execution_context(self: Any, strategy: Any = None) -> Any:
        state = {"_engine": self, "_profile": 0, "_shapes": {}, "_addresses": {}, "_memory": None}
        return self._strict.make("IExecutionContext", _strategy=strategy, **state)

    def _do_create_engine_inspector(self: Any) -> Any:
        return self._strict.make("EngineInspector", _engine=self)

    def _run(self: Any, addresses: dict[str, int], shapes: dict[str, list[int]]) -> None:
        """Read and write at addresses of the host, which is the device here."""
        if self._session is None:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = 1
            options.log_severity_level = 3
            self._session = onnxruntime.InferenceSession(self._model.SerializeToString(), options)
        binding = self._session.io_binding()
        for name, (value, mode) in self._tensors.items():
            if mode == "INPUT":
                kind = value.type.tensor_type.elem_type
                binding.bind_input(name, "cpu", 0, kind, shapes.get(name, _shape(value)), addresses[name])
            else:
                binding.bind_output(name, "cpu")
        self._session.run_with_iobinding(binding)
        for value, made in zip(self._model.graph.output, binding.get_outputs(), strict=True):
            size = math.prod(made.shape()) * DTYPES[value.type.tensor_type.elem_type][1]
            ctypes.memmove(addresses[value.name], made.data_ptr(), size)


class EngineInspector:
    def _do_get_engine_information(self: Any, format: Any) -> str:
        assert format.name == "JSON"
        layers = [self._layer(node) for node in self._engine._model.graph.node]
        new = self._strict.module.__version__.startswith("11.")
        return json.dumps({"Layers": layers, "I/O Tensors" if new else "Bindings": []})

    def _layer(self: Any, node: Any) -> Any:
        if not self._engine._head["detailed"]:
            return node.name
        if self._strict.module.__version__.startswith("11."):
            kind = {"Format": "Row major linear FP32 format (kLINEAR)", "DataType": "Float"}
        else:
            kind = {"Format/Datatype": "Row major linear FP32"}
        outputs = [{"Name": name, "Dimensions": [1], **kind} for name in node.output]
        layer = {"Name": f"{node.op_type}_myl0", "LayerType": "kgen", "Inputs": [], "Outputs": outputs}
        metadata = f"[ONNX Layer: {node.output[0]}]\x1e[ONNX Layer: other]"
        return {**layer, "TacticName": f"__my_{node.op_type}", "StreamId": 0, "Metadata": metadata}


class IExecutionContext:
    def _do_set_optimization_profile_async(self: Any, profile_index: int, stream_handle: int) -> bool:
        if not 0 <= profile_index < self._engine._get_num_optimization_profiles():
            return False
        self._profile, self._shapes = profile_index, {}
        return True

    def _do_set_device_memory(self: Any, memory: int, size: int) -> None:
        if self._strategy is None or self._strategy.name != "USER_MANAGED":
            raise ValueError("this context has memory of its own")
        if memory % ALIGNMENT or size < WORKSPACE * (1 + self._profile):
            raise ValueError(f"device memory at {memory:#x} of {size} bytes is unaligned or too small")
        self._memory = memory

    def _do_set_input_shape(self: Any, name: str, shape: Any) -> bool:
        value, mode = self._engine._tensors[name]
        declared, given = _shape(value), list(shape)
        bounds = self._engine._head["profiles"][self._profile].get(name, [declared, declared])
        within = all(low <= size <= high for low, size, high in zip(bounds[0], given, bounds[1], strict=True))
        self._shapes[name] = given
        return mode == "INPUT" and within

    def _do_set_tensor_address(self: Any, name: str, memory: int) -> bool:
        if memory == 0 or memory % ALIGNMENT:
            return False
        self._addresses[name] = memory
        return name in self._engine._tensors

    def _do_infer_shapes(self: Any) -> list[str]:
        inputs = [(v, m) for v, m in self._engine._tensors.values() if m == "INPUT"]
        return [v.name for v, _ in inputs if -1 in _shape(v) and v.name not in self._shapes]

    def _do_execute_async_v3(self: Any, stream_handle: int) -> bool:
        engine = self._engine
        user = self._strategy is not None and self._strategy.name == "USER_MANAGED"
        if set(self._addresses) != set(engine._tensors) or self._do_infer_shapes() or (user and not self._memory):
            return False
        if not os.environ.get(ZEROS):
            engine._run(self._addresses, self._shapes)
        return True


ACTS = {
    kind.__name__: kind
    for kind in (
        Builder,
        EngineInspector,
        IBuilderConfig,
        ICudaEngine,
        IExecutionContext,
        IHostMemory,
        ILogger,
        INetworkDefinition,
        IOptimizationProfile,
        ITimingCache,
        OnnxParser,
        ParserError,
        Runtime,
    )
}
