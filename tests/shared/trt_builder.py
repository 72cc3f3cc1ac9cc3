"""Processes that build one engine through the recorder. Started once, it forks one for each line that it is told:
``HOME SECONDS DEVICE NAME``; importing torch anew for each would take longer than all builds.

A process writes ``NAME.out``, how many engines it built, into ``HOME``, and what it was told on the way to
``NAME.err``; where it fails its traceback is there. When this one ends, at the end of its input or otherwise, so do
all that it forked.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import traceback
from pathlib import Path

import torch
import trt_acts
from trt_rig import HostMachine, recorded

from helios.graph import Builder, Rate
from helios.ops.linear import linear
from helios.passes import build_plan
from helios_trt.build import Settings
from helios_trt.engines import Engines
from helios_trt.store import Store
from helios_trt.units import units_of


class Weights:
    """A reader of one weight."""

    def read(self, name: str) -> torch.Tensor:
        return torch.ones(8, 8)


def build() -> int:
    """How often the engine of a product was built."""
    with Builder("product") as recording:
        x = recording.input("x", (2, 8), torch.float32, Rate.STEP)
        w = recording.input("w", (8, 8), torch.float32, Rate.WEIGHTS)
        recording.output("y", linear(x, w))
    (unit,) = units_of(build_plan({"product": recording.graph()}), ["w"], "profiles")
    with recorded(11) as strict:
        Engines(HostMachine(), Store(), Settings()).ready(unit, Weights())
        return sum(call == "Builder.build_serialized_network" for call, _ in strict.calls)


PR_SET_PDEATHSIG = 1


def child(home: str, seconds: str, name: str) -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    os.environ |= {"XDG_CACHE_HOME": home, trt_acts.STEP: seconds}
    sys.stderr = (Path(home) / f"{name}.err").open("w", buffering=1)
    try:
        (Path(home) / f"{name}.out").write_text(str(build()))
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)  # the end of the interpreter waits for threads that no fork has


def main() -> None:
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    forked = []
    try:
        for line in sys.stdin:
            pid = os.fork()
            if pid == 0:
                child(*line.split())
            forked.append(pid)
            sys.stdout.write(f"{pid}\n")
            sys.stdout.flush()
    finally:
        for pid in forked:  # none was waited for, so none of these numbers is another's by now
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


if __name__ == "__main__":
    main()
