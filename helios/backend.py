"""The backend interface, and how one is found and chosen.

A backend is a class with a ``name``, ``devices()`` and ``kernels``; everything else has a default that is right for
a device that torch can address. It registers by the entry point ``helios.backends``; ours use no other way.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.metadata
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

import helios.ops  # noqa: F401  (registers the opset)
from helios import op
from helios.errors import BackendError, BackendUnavailable, InputError, UnknownBackend, unknown_name
from helios.graph import Node
from helios.precision import DTYPES

if TYPE_CHECKING:
    from helios.passes import Plan
    from helios.program import Program

__all__ = ["API_VERSION", "Backend", "Candidate", "DeviceInfo", "Kernel", "ReferenceBackend", "candidates", "select"]

API_VERSION = 1
"""Raised when the contract between Helios and a backend changes."""

PRECISIONS: Mapping[str, torch.dtype] = DTYPES


@dataclasses.dataclass(frozen=True, slots=True)
class DeviceInfo:
    """One device: its index for selection, what the vendor calls it, and its memory in bytes where known."""

    index: int
    name: str
    memory: int | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Kernel:
    """How a backend runs an op.

    Args:
        run: takes the op's operands in order and its attributes by keyword, returns what the op returns. Operands are
            tensors on the backend's device, of any strides and alignment; they must not be written to. Outputs must not
            alias an operand unless the op only moves data. Work is put on the device's current stream.
        prepare: takes the same operands, ``None`` for those not in ``weights``, and returns an opaque handle: a packed,
            re-laid or quantised form. Called once at load; ``run`` then takes the handle, the other operands and the
            attributes, and the original weights may be freed.
        weights: names of the operands that ``prepare`` consumes.
    """

    run: Callable[..., Any]
    prepare: Callable[..., Any] | None = None
    weights: tuple[str, ...] = ()


class Backend:
    """Base class. Mandatory: ``name``, ``devices`` and ``kernels`` (or ``compile``, for whole-graph engines).

    Args:
        provider: what stands between the first and the last colon of ``name:provider:index``; "" for none.
        index: of the device.
        options: what was chosen of ``options``; the rest has its default.

    Attributes:
        chosen: the value of each option.
    """

    name: ClassVar[str]
    api_version: ClassVar[int] = API_VERSION
    emulated: str = ""
    """What computes in the device's place, where something does; empty for the real device. Reports say it everywhere,
    and nothing emulated is ever certified."""
    precisions: tuple[str, ...] = ("fp32", "bf16")
    """Names of the precisions that this backend offers, its default first."""
    withheld: Mapping[str, str] = {}
    """Why it does not offer a precision that others do, by name, in the words of what refuses: a library, a device."""
    vae_precisions: Mapping[str, str] = {}
    """In which arithmetic (``fp32``, ``bf16``, ``fp16``) the VAE decodes by default, by the name of the run's
    precision; of those not named here as published, in float32. Encoding is in float32 always."""
    fusions: tuple[str, ...] = ()
    """Fused ops that it wants; each needs a kernel. All others reach it written out as core ops."""
    kernels: Mapping[str, Kernel] = {}
    """By op name."""
    options: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """What can be chosen of it beside the device: by name all values, the default first. A class that has some takes
    them as keywords of its constructor."""
    chosen: Mapping[str, str] = {}

    def __init__(self, provider: str = "", index: int = 0, **options: str) -> None:
        if provider:
            raise InputError(f"backend {self.name!r} has no providers, so {provider!r} means nothing to it")
        self._require_options(options)
        self.index = index
        self.chosen = {name: options.get(name, values[0]) for name, values in self.options.items()}

    @classmethod
    def _require_options(cls, options: Mapping[str, str]) -> None:
        for name, value in options.items():
            if name not in cls.options:
                had = f"it has {_in_words(cls.options)}" if cls.options else "it has none"
                raise InputError(f"backend {cls.name!r} has no option {name!r}; {had}", "leave it out")
            if value not in cls.options[name]:
                raise InputError(unknown_name(f"{name} of backend {cls.name!r}", value, cls.options[name]))

    def devices(self) -> Sequence[DeviceInfo]:
        """The devices that are there, or raise BackendUnavailable with the reason and one fix."""
        raise BackendError(f"backend {self.name!r} does not say which devices it has")

    @property
    def device(self) -> torch.device:
        """Where tensors live between kernels."""
        return torch.device("cpu")

    def supports(self, node: Node) -> str | None:
        """``None`` if this backend runs the node, or the reason why not. Sees types, rates and attributes.

        A whole-graph engine overrides this together with ``compile``; both are asked with fused and with core nodes.
        """
        return None if node.op in self.kernels else "no kernel"

    def compile(self, plan: Plan, *, fallback: str = "error") -> Program:
        """A program for the plan. Whole-graph engines override this and return a ``Program`` that supplies
        ``evaluate``; others get one kernel a node."""
        from helios.lower import compile_kernels

        return compile_kernels(plan, self, fallback=fallback)

    def execution_plan(self) -> Mapping[str, Any]:
        """What bits and speed depend on besides the graphs, as JSON values: versions of libraries, algorithms that were
        chosen by measurement. Kept in the state of a run."""
        return {}

    def use_execution_plan(self, plan: Mapping[str, Any]) -> None:
        """Choose as in this plan, which ``execution_plan`` gave, before anything is compiled.

        Raises:
            BackendError: it cannot be followed here: another library, version or device.
        """

    def synchronize(self) -> None:
        """Wait for the device."""

    def mark(self) -> Any:
        """A point in time: when all work that was put on the device before is done. Here the host waits for it; a
        backend whose device keeps its own time need not."""
        self.synchronize()
        return time.perf_counter()

    def seconds_between(self, first: Any, second: Any) -> float:
        """Seconds from one mark to a later one; waits for that."""
        return float(second - first)

    def fetch(self, tensor: Tensor) -> Tensor:
        """A tensor in host memory, when it is finished; of the meta device, which holds no numbers, zeros of its shape.

        Raises:
            BackendError: the device failed in work that was queued before, and the backend can say how.
        """
        with self.explained("its work"):
            return torch.zeros(tensor.shape, dtype=tensor.dtype) if tensor.is_meta else tensor.cpu()

    @property
    def overlaps(self) -> bool:
        """Whether what is queued ``beside`` is computed while the host and the device go on: runs then begin a chunk
        before they hand out the one before it."""
        return False

    def beside(self, *tensors: Tensor) -> AbstractContextManager[None]:
        """Within, work, marks and fetches belong to a queue beside the usual one; here it is the same.

        Args:
            tensors: of the usual queue, read within: all that was queued there before is waited for by the device.
                Without any nothing is waited for. What is computed within is to be fetched within, now or later.
        """
        return contextlib.nullcontext()

    def explained(self, doing: str) -> AbstractContextManager[None]:
        """Within, what the device raises is told as a BackendError, where the backend knows what it means.

        Args:
            doing: for the sentence "no room for …", such as ``the weights``.
        """
        return contextlib.nullcontext()

    def memory(self) -> tuple[int, int] | None:
        """Free and total bytes of the device, where it can say."""
        return None

    @property
    def label(self) -> str:
        """As it would be selected again, its options aside."""
        return self.name + (f":{self.index}" if self.index else "")

    @property
    def unusual(self) -> dict[str, str]:
        """Its options that are not at their defaults."""
        return {name: value for name, value in self.chosen.items() if value != self.options[name][0]}


def _in_words(options: Mapping[str, tuple[str, ...]]) -> str:
    return ", ".join(f"{name}={'|'.join(values)}" for name, values in options.items())


class ReferenceBackend(Backend):
    """Runs the op bodies on any torch device: the day-zero use of a device that nobody has ported to.

    ``reference`` is the CPU, ``reference:mps``, ``reference:xpu``, ``reference:cuda:1`` are others; on
    ``reference:meta`` the whole pipeline runs with no arithmetic.
    """

    name = "reference"
    precisions = ("fp32", "bf16", "fp64", "fp16", "fp8", "fp8-attention", "fp8-weights")

    def __init__(self, provider: str = "", index: int = 0) -> None:
        super().__init__("", index)
        try:
            self._device = torch.device(provider or "cpu", index) if index else torch.device(provider or "cpu")
        except RuntimeError as error:
            raise InputError(f"torch knows no device {provider!r}: {str(error).splitlines()[0]}") from error

    @functools.cached_property
    def kernels(self) -> Mapping[str, Kernel]:  # type: ignore[override]
        return {name: Kernel(op.get(name).fn) for name in op.names()}

    def devices(self) -> Sequence[DeviceInfo]:
        try:
            torch.empty(1, device=self._device)
        except Exception as error:
            why = str(error).strip().splitlines()[0]
            raise BackendUnavailable(
                f"torch cannot use the device {self._device}: {why}", "install the torch build for this device"
            ) from error
        return [DeviceInfo(self.index, f"torch {self._device}")]

    @property
    def device(self) -> torch.device:
        return self._device

    def synchronize(self) -> None:
        module = getattr(torch, self._device.type, None)
        if self._device.type not in ("cpu", "meta") and module is not None and hasattr(module, "synchronize"):
            module.synchronize(self._device)

    @property
    def label(self) -> str:
        return "reference" if self._device.type == "cpu" else f"reference:{self._device}"


@dataclasses.dataclass(frozen=True, slots=True)
class Candidate:
    """A backend by name: its class, its devices, or why it has none here."""

    name: str
    cls: type[Backend] | None
    devices: tuple[DeviceInfo, ...] = ()
    why: str = ""
    fix: str = ""

    @property
    def available(self) -> bool:
        return bool(self.devices)

    @property
    def passed_over(self) -> str:
        """Why ``auto`` does not take it; empty where it may. What is emulated has to be asked for by name."""
        emulated = "" if self.cls is None else self.cls.emulated
        return self.why or (f"it is emulated: {emulated}" if emulated else "")


GROUP = "helios.backends"
PREFERENCE = ("cuda", "ascend", "trt", "cpu", "ort", "reference")
"""The order in which ``auto`` tries; backends of others come before ``cpu``, by name."""


def entry_points() -> dict[str, list[importlib.metadata.EntryPoint]]:
    """Registered backends by name; more than one entry under a name is a conflict."""
    found: dict[str, list[importlib.metadata.EntryPoint]] = {}
    for point in importlib.metadata.entry_points(group=GROUP):
        known = found.setdefault(point.name, [])
        if all(other.value != point.value for other in known):
            known.append(point)
    return found


def names() -> list[str]:
    return sorted({"reference", *entry_points()})


def load(name: str) -> type[Backend]:
    """The class of a backend. Raises UnknownBackend, or BackendUnavailable if it cannot be imported."""
    if name == "reference":
        return ReferenceBackend
    points = entry_points().get(name)
    if not points:
        raise UnknownBackend(unknown_name("backend", name, names()), fix="`helios backends` lists what is installed")
    if len(points) > 1:
        claims = " and ".join(sorted(p.value for p in points))
        raise BackendUnavailable(f"two packages claim the backend name {name!r}: {claims}", "uninstall one of them")
    try:
        cls = points[0].load()
    except Exception as error:
        raise BackendUnavailable(
            f"backend {name!r} fails on import: {type(error).__name__}: {error}",
            f"repair or uninstall {points[0].value}",
        ) from error
    return _checked(name, cls)


def _checked(name: str, cls: Any) -> type[Backend]:
    """Validate at registration, not at the first call."""
    if not (isinstance(cls, type) and issubclass(cls, Backend)):
        raise BackendUnavailable(f"backend {name!r}: {cls!r} is not a subclass of helios.backend.Backend")
    if cls.api_version != API_VERSION:
        raise BackendUnavailable(
            f"backend {name!r} is made for backend API {cls.api_version}, this Helios has {API_VERSION}",
            fix="install versions of both that match",
        )
    unknown = sorted(set(cls.fusions) - set(op.names()))
    if unknown:
        raise BackendUnavailable(f"backend {name!r} wants {unknown_name('op', unknown[0], op.names())}")
    empty = next((option for option, values in cls.options.items() if not values), None)
    if empty is not None:
        raise BackendUnavailable(f"backend {name!r} has an option {empty!r} without values")
    return cls


def probe(name: str) -> Candidate:
    """One registered backend with its devices, or why it has none; never raises, whatever the backend does."""
    try:
        cls = load(name)
        devices = tuple(cls().devices())
    except BackendError as error:
        return Candidate(name, None, why=error.why, fix=error.fix)
    except Exception as error:
        why = f"its probe raised {type(error).__name__}: {error}"
        return Candidate(name, None, why=why, fix="report this to the backend's maintainer")
    return Candidate(name, cls, devices, why="" if devices else "it names no device")


def candidates() -> Iterator[Candidate]:
    """Every registered backend, by name; a broken one harms nobody else."""
    return (probe(name) for name in names())


def select(spec: str | None = None, options: Mapping[str, str] | None = None) -> Backend:
    """The backend to use: an argument beats ``HELIOS_BACKEND`` beats ``auto``.

    Args:
        spec: ``name[:provider][:index]`` such as ``cuda:1``, ``ort:cuda``, ``reference:mps``; or ``auto``.
        options: values of ``Backend.options``, by name. They do not change what ``auto`` chooses.

    Raises:
        UnknownBackend: nobody has that name.
        InputError: the backend has no such option or value; says which it has.
        BackendUnavailable: it cannot run here; or, for ``auto``, none can.
    """
    spec = spec or os.environ.get("HELIOS_BACKEND") or "auto"
    if spec == "auto":
        return _automatic(options or {})
    name, provider, index = parse_spec(spec)
    cls = load(name)
    backend = _made(cls, provider, index, options or {})
    devices = backend.devices()
    if all(device.index != index for device in devices):
        known = ", ".join(f"{d.index} ({d.name})" for d in devices) or "none"
        raise BackendUnavailable(f"backend {name!r} has no device {index}; it has {known}")
    return backend


def parse_spec(spec: str) -> tuple[str, str, int]:
    """``name[:provider][:index]`` in its three parts."""
    name, *rest = spec.split(":")
    index = int(rest.pop()) if rest and rest[-1].isdigit() else 0
    if not name or len(rest) > 1 or "" in rest:
        raise InputError(f"{spec!r} is not a backend", fix="write name[:provider][:index], such as cuda:1 or ort:cuda")
    return name, rest[0] if rest else "", index


def _made(cls: type[Backend], provider: str, index: int, options: Mapping[str, str]) -> Backend:
    """An instance. Options are checked here: a class that has none need not take any."""
    cls._require_options(options)
    return cls(provider, index, **options)


def _rank(name: str) -> tuple[float, str]:
    """Place in the order of ``auto``: ours by ``PREFERENCE``, those of others by name just before ``cpu``."""
    return (PREFERENCE.index(name) if name in PREFERENCE else PREFERENCE.index("cpu") - 0.5, name)


def _automatic(options: Mapping[str, str]) -> Backend:
    for name in sorted(names(), key=_rank):
        candidate = probe(name)
        if candidate.cls is not None and not candidate.passed_over:
            return _made(candidate.cls, "", candidate.devices[0].index, options)
    raise BackendUnavailable("no backend can run here", fix="`helios doctor` says why, backend by backend")


def explain_automatic(found: Iterable[Candidate] | None = None) -> list[tuple[str, str]]:
    """Each backend in the order that ``auto`` tries, with why it lost, up to the choice, whose reason is "chosen".

    Args:
        found: what ``candidates`` gave, so that nothing is probed twice; ``None`` probes.
    """
    lines: list[tuple[str, str]] = []
    for candidate in sorted(candidates() if found is None else found, key=lambda c: _rank(c.name)):
        lines.append((candidate.name, candidate.passed_over or "chosen"))
        if not candidate.passed_over:
            break
    return lines
