"""Finding and choosing a backend; the reference backend; what a broken one does to others."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch

from helios import backend as backends
from helios import op as ops
from helios.backend import API_VERSION, Backend, Candidate, DeviceInfo, Kernel, ReferenceBackend, parse_spec, select
from helios.errors import BackendError, BackendUnavailable, InputError, UnknownBackend
from helios.graph import Builder, Node, Rate
from helios.lower import lower
from helios.pipeline import load
from helios_cpu import CpuBackend


class Card(Backend):
    """A backend with two devices that counts its probes."""

    name = "card"
    probes = 0

    def __init__(self, provider: str = "", index: int = 0) -> None:
        self.provider, self.index = provider, index

    def devices(self) -> Sequence[DeviceInfo]:
        type(self).probes += 1
        return [DeviceInfo(0, "first"), DeviceInfo(1, "second", 8)]


class Absent(Card):
    name = "absent"

    def devices(self) -> Sequence[DeviceInfo]:
        raise BackendUnavailable("no card is plugged in", "plug one in")


class Raising(Card):
    name = "raising"

    def devices(self) -> Sequence[DeviceInfo]:
        raise OSError("libcard.so: undefined symbol")


class NoDevice(Card):
    name = "none"

    def devices(self) -> Sequence[DeviceInfo]:
        return []


class Old(Card):
    name = "old"
    api_version = API_VERSION + 1


class Wishful(Card):
    name = "wishful"
    fusions = ("adaln", "adalm")


class NotABackend:
    pass


class Point(importlib.metadata.EntryPoint):
    """An entry point that gives one of the classes here, or fails as an import does."""

    def load(self) -> Any:
        if self.value == "broken:Backend":
            raise ImportError("No module named 'card_sdk'")
        return globals().get(self.value.partition(":")[2], CpuBackend)


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make these the registered backends: name to class name, or several pairs."""

    def register(*pairs: tuple[str, str]) -> None:
        points = [Point(name, value if ":" in value else f"test:{value}", "helios.backends") for name, value in pairs]

        def entry_points(**wanted: str) -> list[Point]:
            assert wanted == {"group": "helios.backends"}
            return points

        monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
        Card.probes = 0

    return register


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ("cuda", ("cuda", "", 0)),
        ("cuda:1", ("cuda", "", 1)),
        ("ort:cuda", ("ort", "cuda", 0)),
        ("ort:cuda:12", ("ort", "cuda", 12)),
        ("reference:mps", ("reference", "mps", 0)),
    ],
)
def test_specs(spec: str, parts: tuple[str, str, int]) -> None:
    assert parse_spec(spec) == parts


@pytest.mark.parametrize("spec", [":1", "a:b:c", "a:b:c:1", ":", "a:", "a::1", "a:1:b"])
def test_wrong_specs(spec: str) -> None:
    with pytest.raises(InputError, match="is not a backend"):
        parse_spec(spec)


def test_our_backends_are_found_as_those_of_others_are() -> None:
    assert {"cpu", "reference"} <= set(backends.names())
    assert backends.load("cpu") is CpuBackend
    assert isinstance(select("cpu"), CpuBackend)


def test_an_argument_beats_the_variable_beats_auto(install: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    install(("card", "Card"), ("cpu", "helios_cpu:CpuBackend"))
    assert select().name == "card"
    assert select("auto").name == "card"
    monkeypatch.setenv("HELIOS_BACKEND", "cpu")
    assert select().name == "cpu"
    assert select("auto").name == "card"
    assert select("reference").name == "reference"
    monkeypatch.setenv("HELIOS_BACKEND", "auto")
    assert select().name == "card"
    monkeypatch.setenv("HELIOS_BACKEND", "")
    assert select().name == "card"


def test_provider_and_index_arrive(install: Any) -> None:
    install(("card", "Card"))
    chosen = select("card:fast:1")
    assert isinstance(chosen, Card)
    assert (chosen.provider, chosen.index, chosen.label) == ("fast", 1, "card:1")
    with pytest.raises(BackendUnavailable, match=r"has no device 2; it has 0 \(first\), 1 \(second\)"):
        select("card:2")


def test_an_unknown_name() -> None:
    with pytest.raises(UnknownBackend) as refused:
        select("cpv")
    assert "did you mean 'cpu'?" in str(refused.value)
    assert "reference" in str(refused.value)
    assert "helios backends" in refused.value.fix


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("broken:Backend", "fails on import: ImportError: No module named 'card_sdk'"),
        ("Old", f"is made for backend API {API_VERSION + 1}, this Helios has {API_VERSION}"),
        ("Wishful", "unknown op 'adalm': did you mean 'adaln'?"),
        ("NotABackend", "is not a subclass of helios.backend.Backend"),
        ("Absent", "no card is plugged in"),
    ],
)
def test_a_broken_one_says_why_and_harms_nobody(install: Any, value: str, text: str) -> None:
    install(("broken", value), ("card", "Card"))
    with pytest.raises(BackendUnavailable) as refused:
        select("broken")
    assert text in str(refused.value)
    found = {c.name: c for c in backends.candidates()}
    assert text in found["broken"].why
    assert not found["broken"].available
    assert found["card"].available
    assert select().name == "card"


def test_a_probe_that_raises_anything(install: Any) -> None:
    install(("raising", "Raising"), ("none", "NoDevice"))
    found = {c.name: c for c in backends.candidates()}
    assert "its probe raised OSError: libcard.so" in found["raising"].why
    assert "maintainer" in found["raising"].fix
    assert (found["none"].available, found["none"].why) == (False, "it names no device")
    assert select().name == "reference"


def test_two_packages_that_claim_one_name(install: Any) -> None:
    install(("card", "one:Card"), ("card", "two:Card"), ("cpu", "helios_cpu:CpuBackend"))
    with pytest.raises(BackendUnavailable, match="two packages claim the backend name 'card': one:Card and two:Card"):
        select("card")
    assert select().name == "cpu"


def test_one_package_that_is_listed_twice_is_one(install: Any) -> None:
    """An editable install beside a stale one lists the same entry twice."""
    install(("card", "Card"), ("card", "Card"))
    assert select("card").name == "card"


def test_auto_tries_ours_by_preference_and_others_before_the_cpu(install: Any) -> None:
    pairs = [("ort", "Absent"), ("cpu", "Absent"), ("zebra", "Absent"), ("aardvark", "Absent"), ("trt", "Absent")]
    install(*pairs, ("cuda", "Absent"))
    order = [name for name, _ in backends.explain_automatic()]
    assert order == ["cuda", "trt", "aardvark", "zebra", "cpu", "ort", "reference"]


def test_auto_and_its_explanation_agree(install: Any) -> None:
    install(("cuda", "Absent"), ("card", "Card"), ("cpu", "helios_cpu:CpuBackend"))
    assert backends.explain_automatic() == [("cuda", "no card is plugged in"), ("card", "chosen")]
    assert select().name == "card"


def test_auto_never_takes_what_is_emulated(install: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Card, "emulated", "a simulator")
    install(("card", "Card"), ("cpu", "helios_cpu:CpuBackend"))
    assert backends.explain_automatic() == [("card", "it is emulated: a simulator"), ("cpu", "chosen")]
    assert select().name == "cpu"
    assert select("card").name == "card"


def test_an_explanation_of_what_was_found_probes_nothing(install: Any) -> None:
    install(("card", "Card"), ("cpu", "helios_cpu:CpuBackend"))
    found = list(backends.candidates())
    assert Card.probes == 1
    assert backends.explain_automatic(found)[-1] == ("card", "chosen")
    assert Card.probes == 1


def test_auto_probes_none_after_its_choice(install: Any) -> None:
    install(("cuda", "Card"), ("zebra", "Card"))
    assert select().name == "card"  # what the class calls itself, registered as cuda
    assert Card.probes == 1


def test_none_at_all(install: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    install(("card", "Absent"))
    monkeypatch.setattr(ReferenceBackend, "devices", lambda self: [])
    with pytest.raises(BackendUnavailable, match="no backend can run here"):
        select()
    assert backends.explain_automatic()[-1] == ("reference", "it names no device")


def test_a_candidate_without_devices_is_not_available() -> None:
    assert not Candidate("x", Card).available
    assert Candidate("x", Card, (DeviceInfo(0, "d"),)).available


def test_defaults_of_the_base_class() -> None:
    class Bare(Backend):
        name = "bare"

    bare = Bare()
    with pytest.raises(BackendError, match="does not say which devices it has"):
        bare.devices()
    assert bare.device == torch.device("cpu")
    assert bare.memory() is None
    assert bare.label == "bare"
    assert Bare("", 2).label == "bare:2"
    assert bare.supports(Node("silu", (), (), ())) == "no kernel"
    bare.synchronize()
    with pytest.raises(InputError, match="'bare' has no providers"):
        Bare("fast")


# The reference backend.


def test_the_reference_has_every_op() -> None:
    assert set(ReferenceBackend().kernels) == set(ops.names())
    assert ReferenceBackend().label == "reference"
    assert ReferenceBackend("meta").label == "reference:meta"


def test_a_device_that_torch_does_not_know() -> None:
    with pytest.raises(InputError, match="torch knows no device 'qpu'"):
        select("reference:qpu")


def test_a_device_that_is_not_here() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a cuda device here")
    with pytest.raises(BackendUnavailable) as refused:
        select("reference:cuda")
    assert "torch cannot use the device cuda" in refused.value.why
    assert refused.value.fix


@pytest.mark.parametrize("spec", ["reference", "reference:cpu", "reference:meta"])
def test_it_runs_a_graph_on_that_device(spec: str) -> None:
    with Builder("g") as build:
        x = build.input("x", (1, 2, 4), torch.float32, Rate.STEP)
        zeros: Any = ops.get("full")(shape=(1, 2, 4), value=0.5, dtype=torch.float32)
        build.output("y", ops.get("add")(ops.get("rms_norm")(x), zeros))

    class Nothing:
        def read(self, name: str) -> torch.Tensor:
            raise AssertionError(name)

    backend = select(spec)
    program = lower({"g": build.graph()}, backend)
    program.load(Nothing())
    y = program.run("g", {"x": torch.ones(1, 2, 4)})["y"]
    assert y.device == backend.device
    if y.device.type == "cpu":
        assert torch.allclose(y, torch.full((1, 2, 4), 1.5))


def test_a_whole_pipeline_without_arithmetic() -> None:
    """Text to frames on shapes alone: every graph of a pipeline lowers and runs; the numbers are zeros."""
    pipeline = load(size="tiny", variant="distilled", backend="reference:meta", precision="fp32")
    result = pipeline.generate("a lighthouse", chunks=1, height=64, width=64)
    assert result.latents.shape == (1, 16, 9, 8, 8)
    assert not result.latents.any()
    assert result.frames.shape == (1, 33, 64, 64, 3)
    assert pipeline.coverage is not None
    assert pipeline.coverage.fallbacks == 0


class Slim(ReferenceBackend):
    """Overrides ``supports`` alone: the kernels of what it refuses are never asked for."""

    name = "slim"

    def supports(self, node: Node) -> str | None:
        return "not today" if node.op == "silu" else None

    @property
    def kernels(self) -> Mapping[str, Kernel]:  # type: ignore[override]
        return {name: Kernel(ops.get(name).fn) for name in ops.names() if name != "silu"}


def test_a_refused_node_never_reaches_the_kernels() -> None:
    with Builder("g") as build:
        build.output("y", ops.get("silu")(build.input("x", (2,), torch.float32, Rate.STEP)))
    program = lower({"g": build.graph()}, Slim(), fallback="reference")
    assert program.coverage.rows() == [("silu", 0, 0, 1, "not today")]
