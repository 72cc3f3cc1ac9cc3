"""A bench for single cases. Strangers: a distribution with backends that misbehave, installed by nothing but its
folder on the path."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from helios.backend import Backend, Kernel, ReferenceBackend
from helios_conformance import execute, suite
from helios_conformance.case import Case, Observation, Verdict
from helios_conformance.draws import Root
from helios_conformance.mutants import MUTANTS
from helios_conformance.references import committed
from helios_conformance.session import Session

STRANGER = '''
import os
import signal
import sys
import time

from helios import op
from helios.backend import Backend, DeviceInfo, Kernel
import helios.ops


class Right(Backend):
    """Right, and on the CPU."""

    name = "right"
    precisions = ("fp32", "bf16")

    def __init__(self, provider="", index=0):
        super().__init__(provider, index)
        self.kernels = {n: Kernel(op.get(n).fn) for n in op.names() if op.get(n).kind != "fused"}
        self.kernels |= {n: Kernel(run) for n, run in self.own().items()}

    def own(self):
        return {}

    def devices(self):
        return [DeviceInfo(0, "a stranger's device", 1 << 30)]


class Emulated(Right):
    name = "emulated"
    emulated = "a CPU in its place"


class OnlyHalf(Right):
    name = "onlyhalf"
    withheld = {"fp32": "its adder is narrow"}  # noqa: RUF012
    precisions = ("bf16",)


class Slow(Right):
    name = "slow"

    def own(self):
        def slow(*operands, **attrs):
            time.sleep(0.4)
            return op.get("add").fn(*operands, **attrs)

        return {"add": slow}


class Wild(Right):
    """Everything that a driver may do to a process."""

    name = "wild"

    def own(self):
        def crash(*operands, **attrs):
            os.kill(os.getpid(), signal.SIGSEGV)

        def hang(*operands, **attrs):
            time.sleep(3600)

        def leave(*operands, **attrs):
            os.write(2, b"the driver gives up\\n")
            os._exit(3)

        def killed(*operands, **attrs):
            os.kill(os.getpid(), signal.SIGKILL)

        def noisy(*operands, **attrs):
            print('{"done": {"id": "forged"}}', flush=True)
            os.write(1, b'{"done": {}}\\n' * 20000)
            os.system("echo from a child")
            return op.get("add").fn(*operands, **attrs)

        def raises(*operands, **attrs):
            raise RuntimeError("no such stream")

        def exits(*operands, **attrs):
            sys.exit("enough")

        def garbage(*operands, **attrs):
            for text in sys.argv[1:]:
                try:
                    os.write(int(text), b"garbage\\n")
                except OSError:
                    pass
            time.sleep(3600)

        def wrong(x):
            return op.get("gelu").fn(x) * 1.01

        def orphan(*operands, **attrs):
            if os.fork() == 0:
                time.sleep(3600)
            os._exit(9)

        return {
            "add": noisy, "silu": crash, "gelu": wrong, "clamp": leave, "reshape": killed, "expand": raises,
            "permute": exits, "concat": garbage, "unbind": hang, "blend": orphan,
        }


class Zero(Backend):
    """No kernel at all."""

    name = "zero"

    def devices(self):
        return [DeviceInfo(0, "nothing yet")]


class NoProbe(Right):
    name = "noprobe"

    def devices(self):
        raise OSError("libcard.so: undefined symbol")


class DiesAtStart(Right):
    name = "diesatstart"

    def devices(self):
        os.write(2, b"firmware is old\\n")
        os._exit(7)


class Flaky(Right):
    """Crashes in every kernel of one op, and after that cannot start any more."""

    name = "flaky"

    def devices(self):
        if os.path.exists(os.environ["FLAKY"]):
            raise OSError("the device fell off the bus")
        return super().devices()

    def own(self):
        def crash(*operands, **attrs):
            open(os.environ["FLAKY"], "w").close()
            os._exit(1)

        return {"add": crash}
'''

BACKENDS = ("Right", "Emulated", "OnlyHalf", "Slow", "Wild", "Zero", "NoProbe", "DiesAtStart", "Flaky")


@pytest.fixture(scope="session")
def strangers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the distribution ``stranger`` 1.2."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "stranger.py").write_text(STRANGER)
    (folder / "broken_stranger.py").write_text("raise ImportError('libbroken.so: no such file')\n")
    info = folder / "stranger-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: stranger\nVersion: 1.2\n")
    lines = [f"{name.lower()} = stranger:{name}" for name in BACKENDS] + ["broken = broken_stranger:Broken"]
    (info / "entry_points.txt").write_text("[helios.backends]\n" + "\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="session")
def meet_strangers(strangers: Path) -> Callable[[pytest.MonkeyPatch], None]:
    """Puts them on the path of this process and of those that it starts, as long as the patch lasts."""

    def on_path(patch: pytest.MonkeyPatch) -> None:
        patch.syspath_prepend(str(strangers))
        known = os.environ.get("PYTHONPATH")
        patch.setenv("PYTHONPATH", os.pathsep.join([str(strangers), *([known] if known else [])]))

    return on_path


@pytest.fixture(scope="session")
def bundles() -> Any:
    """A run of a small suite, with what makes bundles of it; see ``bundles.py`` beside this file."""
    path = Path(__file__).with_name("bundles.py")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module.Bundles.make()


@pytest.fixture(scope="module")
def closed(bundles: Any) -> Iterator[Any]:
    """The same, and for the module the small suite is all that there is."""
    with bundles.closed():
        yield bundles


@dataclasses.dataclass(frozen=True)
class Bench:
    """Single cases in this process, and backends that are wrong."""

    root: Root

    def run(self, case: str | Case, backend: Backend) -> tuple[Observation, Verdict]:
        found = suite.find(case) if isinstance(case, str) else case
        return execute.run_here(found, Session(backend, self.root), committed())

    @staticmethod
    def mutant(name: str) -> Backend:
        return next(m for m in MUTANTS if m.name == name).apply(ReferenceBackend())

    @staticmethod
    def wrong(name: str, kernel: Callable[..., Any]) -> Backend:
        """The reference with one kernel replaced."""
        backend = ReferenceBackend()
        vars(backend)["kernels"] = {**backend.kernels, name: Kernel(kernel)}
        return backend


@pytest.fixture
def bench(request: pytest.FixtureRequest) -> Bench:
    """With the draws of the module's ``ROOT``."""
    return Bench(request.module.ROOT)
