"""The process that runs the device: ``python -m helios_conformance.worker READ WRITE``, started by the suite.

It serves case after case until its pipe closes. It may die at any moment; the parent judges, notes and replaces it.
Its standard output and error are a log file, so that what a backend prints disturbs nobody.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from helios_conformance.protocol import Channel, Closed, case_of, encode

__all__ = ["main"]


def main() -> int:
    """Serve until the parent goes away; 0."""
    channel = Channel(int(sys.argv[1]), int(sys.argv[2]))
    for descriptor in (int(sys.argv[1]), int(sys.argv[2])):
        os.set_inheritable(descriptor, False)  # a helper process of the backend's must not keep the pipe open
    _guard()
    with contextlib.suppress(Closed):
        _serve(channel)
    return 0


def _guard() -> None:
    """Tell in the log where a crash was, die with the parent, and be what the kernel kills first for want of memory."""
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)  # the parent asks so where a case hangs
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        with contextlib.suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text("1000")
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # a log file here


def _serve(channel: Channel) -> None:
    from helios_conformance import execute

    session = _start(channel, channel.receive()["start"])
    while session is not None:
        message = channel.receive()
        case, file = case_of(message["run"]), Path(message["file"])
        observation = execute.observe(case, session)
        try:
            channel.send({"done": encode(case, observation, file)})
        except (TypeError, ValueError) as error:
            channel.send({"unfit": f"{type(error).__name__}: {error}"})


def _start(channel: Channel, start: Mapping[str, Any]) -> Any:
    """The session, or None where the backend cannot run here: the parent is told either way."""
    import torch

    from helios_conformance.draws import Root
    from helios_conformance.session import Session
    from helios_conformance.subject import describe, refusal, selected

    torch.set_num_threads(start["threads"])
    try:
        backend = selected(start["backend"])
        root = Root(start["seed"], start["nonce"])
        session = Session(
            backend,
            root,
            model=start["model"],
            options=start["options"],
            tell=lambda told: channel.send({"told": dict(told)}),
        )
        told = describe(backend, start["backend"], session)
    except Exception as error:
        channel.send({"refused": refusal(error)})
        return None
    channel.send({"ready": told, "withheld": dict(backend.withheld)})
    return session


if __name__ == "__main__":
    sys.exit(main())
