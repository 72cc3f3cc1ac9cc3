"""``helios certify``: run the suite against a backend, and write down what came of it."""

from __future__ import annotations

import dataclasses
import re
import secrets
import signal
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from helios.cli import output
from helios.cli.options import PRECISIONS, PrecisionOption
from helios.errors import InputError, UnknownBackend, unknown_name
from helios_conformance.cli.realtime_options import nothing_given, with_options

if TYPE_CHECKING:
    from helios_conformance.case import Level as LevelName
    from helios_conformance.run import RunResult, Setup

__all__ = ["EXAMPLES", "certify"]

EXAMPLES = "Examples: helios certify --backend cpu; helios certify --backend cuda:1 --suite full --level all"
SUITES = ("quick", "full")
LEVELS = ("ops", "blocks", "model", "pipeline", "realtime")

BackendName = Annotated[
    str | None, typer.Option(metavar="NAME[:PROVIDER][:INDEX]", help="What is judged.", show_default=False)
]
Level = Annotated[
    str | None,
    typer.Option(
        metavar="ops|blocks|model|pipeline|realtime|all",
        help="The highest level; those that it needs run, too.",
        show_default="pipeline",
    ),
]
SuiteName = Annotated[str, typer.Option(metavar="quick|full", help="Only the full suite can certify.")]
Filters = Annotated[
    list[str] | None,
    typer.Option(
        "--filter",
        metavar="ID",
        help="Only these cases, such as 'attention[bf16,stage2]'; * for any characters. Repeat it for more.",
        show_default=False,
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Where the evidence goes.", show_default="out/certify/BACKEND-TIME"),
]
Seed = Annotated[int, typer.Option(metavar="N", help="Of all draws of the suite.")]
Nonce = Annotated[
    str | None,
    typer.Option(metavar="HEX", help="A challenge that somebody else chose.", show_default="drawn by this run"),
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run in --out; it keeps its settings.")]
Patience = Annotated[float, typer.Option(metavar="X", help="Factor on the time that each case is given.")]
Model = Annotated[
    Path | None,
    typer.Option(metavar="FOLDER", help="A checkpoint for realtime to time: never certified.", show_default=False),
]
Size = Annotated[str | None, typer.Option(metavar="tiny|mini|14b", help="Of realtime.", show_default="14b")]
Steps = Annotated[str | None, typer.Option(metavar="N,N,N", help="Of realtime, a stage.", show_default="its own")]
Height = Annotated[int | None, typer.Option(metavar="PIXELS", help="Of realtime.", show_default="384")]
Width = Annotated[int | None, typer.Option(metavar="PIXELS", help="Of realtime.", show_default="640")]
Soak = Annotated[str | None, typer.Option(metavar="TIME", help="Of realtime: a long run, such as 30m.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Another setting of realtime, such as chunks=45.", hidden=False),
]
Sign = Annotated[
    Path | None,
    typer.Option(metavar="KEY", help="Sign the evidence with this SSH key (ssh-keygen -Y).", show_default=False),
]
Results = Annotated[
    Path | None,
    typer.Option(
        "--from-results", metavar="DIR", help="Judge what came back into an exported folder.", show_default=False
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print the verdict as JSON.")]


def certify(
    backend: BackendName = None,
    level: Level = None,
    suite: SuiteName = "quick",
    precision: PrecisionOption = None,
    filters: Filters = None,
    out: Out = None,
    seed: Seed = 0,
    nonce: Nonce = None,
    resume: Resume = False,
    timeout_factor: Patience = 1.0,
    model: Model = None,
    size: Size = None,
    steps: Steps = None,
    height: Height = None,
    width: Width = None,
    soak: Soak = None,
    set_: Set = None,
    sign: Sign = None,
    from_results: Results = None,
    json: Json = False,
) -> None:
    """Judge a backend by the conformance suite and keep the evidence.

    Exit status: 0 certified or passed, 1 not certified, 2 a mistake in the command, 130 interrupted.
    """
    chosen = filters or []
    if sign is not None and not sign.is_file():
        raise InputError(f"there is no key {sign}", "ssh-keygen -t ed25519 makes one")
    realtime = {"size": size, "steps": steps, "height": height, "width": width, "soak": soak}
    if resume or from_results is not None:
        nothing_given("--resume" if resume else "--from-results", {**realtime, "model": model}, set_ or [])
    if from_results is not None:
        raise typer.Exit(_imported(from_results, out, sign, json=json))
    if resume:
        setup = _resumed(out, backend)
    else:
        setup = _setup(backend, level, suite, precision, chosen, out, seed, nonce, timeout_factor, model)
        setup = with_options(setup, realtime, set_ or [])
    raise typer.Exit(_run(setup, sign, resume=resume, json=json))


def _setup(
    backend: str | None,
    level: str | None,
    suite: str,
    precision: str | None,
    filters: Sequence[str],
    out: Path | None,
    seed: int,
    nonce: str | None,
    patience: float,
    model: Path | None,
) -> Setup:
    """The options, checked without importing any backend."""
    spec = _known(backend)
    _one_of("suite", suite, SUITES)
    _one_of("level", level or "all", (*LEVELS, "all"))
    if precision:
        _one_of("precision to certify", precision, PRECISIONS)
    if nonce is not None and not re.fullmatch(r"[0-9a-fA-F]{8,128}", nonce):
        raise InputError(f"--nonce {nonce!r} is not 8 to 128 hexadecimal digits", f"--nonce {secrets.token_hex(16)}")
    if not 0.01 <= patience <= 1000:
        raise InputError(f"--timeout-factor {patience}: wanted 0.01 to 1000")
    if model is not None and not model.is_dir():
        raise InputError(f"--model {model} is no folder")
    from helios_conformance.draws import Root
    from helios_conformance.run import Setup
    from helios_conformance.runner import precision_of

    precision = precision or precision_of(filters)
    return Setup(
        spec=spec,
        precision=precision,
        suite="full" if suite == "full" else "quick",
        levels=_levels(level, precision, filters),
        filters=tuple(filters),
        root=Root(seed, nonce.lower() if nonce else secrets.token_hex(16)),
        model=None if model is None else str(model.resolve()),
        out=out or _folder(spec),
        timeout_factor=patience,
    )


def _levels(level: str | None, precision: str, filters: Sequence[str]) -> tuple[LevelName, ...]:
    """Up to the one asked for; for cases asked for by their ids, up to the highest of theirs."""
    from helios_conformance.case import PRECISIONS as ALL
    from helios_conformance.runner import check_filters
    from helios_conformance.suite import choose, levels_up_to

    check_filters(filters, precision)
    names = levels_up_to(level or ("all" if filters else "pipeline"))
    if level or not filters:
        return names
    taken = {case.level for p in ([precision] if precision else ALL) for case in choose(p, filters=filters)}
    return levels_up_to(max(taken, key=names.index))


def _known(spec: str | None) -> str:
    """A spec whose name somebody registers; nothing of the backend is imported here."""
    from helios.backend import names, parse_spec

    if spec is None:
        raise InputError("certify judges one backend: which?", "`helios backends` lists them; --backend NAME")
    name = parse_spec(spec)[0]
    if name not in names():
        raise UnknownBackend(unknown_name("backend", name, names()), "`helios backends` lists what is installed")
    return spec


def _one_of(kind: str, name: str, known: Sequence[str]) -> str:
    if name not in known:
        raise InputError(unknown_name(kind, name, known))
    return name


def _folder(spec: str) -> Path:
    name = re.sub(r"[^a-z0-9]+", "-", spec.lower())
    return Path("out/certify") / f"{name}-{datetime.now(UTC):%Y%m%dT%H%M%S}Z"


def _resumed(out: Path | None, backend: str | None) -> Setup:
    from helios_conformance.run import RunFolder, Setup
    from helios_conformance.suite import suite_hash

    if out is None:
        raise InputError("--resume: which run?", "add --out DIR")
    setup = Setup.of(RunFolder.open(out, suite_hash())[1]["setup"], out)
    if backend is not None and backend != setup.spec:
        raise InputError(f"--resume: the run in {out} is of backend {setup.spec!r}", "leave --backend away")
    return setup


# --- the run ----------------------------------------------------------------------------------------------------------


def _run(setup: Setup, sign: Path | None, *, resume: bool, json: bool) -> int:
    """Run, bundle, tell; the exit status."""
    import shlex

    from helios_conformance.live import Progress
    from helios_conformance.runner import Runner

    before = signal.signal(signal.SIGTERM, _interrupt)  # so that a job that is cancelled can go on, too
    progress = Progress(setup.spec, setup.root)
    try:
        with progress:
            result = Runner(setup, progress, resume).run()
        report, verdict = _bundle(result)
    except KeyboardInterrupt:
        output.fail(
            f"interrupted after {output.count(progress.done, 'case')}",
            shlex.join(["helios", "certify", "--resume", "--out", str(setup.out)]) + " goes on",
        )
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    return _end(result, report, verdict, sign, json=json)


def _end(result: RunResult, report: Path, verdict: Mapping[str, Any], sign: Path | None, *, json: bool) -> int:
    """Tell the verdict, then sign; the exit status."""
    from helios_conformance.verdict import exit_code

    _tell(result, report, verdict, json=json)
    if sign is not None:  # last: a key that is refused must not hide the verdict
        from helios_conformance import signing

        signing.sign(report.parent, sign)
    return exit_code(verdict)


def _imported(folder: Path, out: Path | None, sign: Path | None, *, json: bool) -> int:
    """Judge results that came as files; everything else was decided when their cases were exported."""
    from helios_conformance import imported

    result = imported.run(folder, out or _folder("imported"))
    return _end(result, *_bundle(result), sign, json=json)


def _interrupt(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


def _bundle(result: RunResult) -> tuple[Path, dict[str, Any]]:
    """Write the bundle; the path of its page, and the verdict. The run's own files go only when it stands."""
    import json

    from helios_conformance import bundle, environment

    result.environment = result.environment or environment.read(result.backend)
    folder = bundle.write(result, result.setup.out)
    return folder / "report.html", json.loads((folder / "report.json").read_text(encoding="utf-8"))["verdict"]


def _tell(result: RunResult, report: Path, verdict: Mapping[str, Any], *, json: bool) -> None:
    """The verdict with its scope, and where the report is."""
    from helios_conformance.cli import open_ops

    todo = open_ops.of(result)
    if json:
        told = {"verdict": verdict, "todo": [dataclasses.asdict(item) for item in todo]}
        output.print_json({**told, "report": str(report), "out": str(result.setup.out)})
        return
    if result.setup.filters:  # few cases: each with its outcome
        for record in result.records:
            output.line(f"{record['state']}  {record['id']}  {record['reason']}".rstrip())
    for level, told in verdict["levels"].items():
        if told["reason"] and level in result.setup.levels and told["state"] != "pass":
            output.line(f"{level}: {told['state'].replace('_', ' ')}: {told['reason']}")
    open_ops.tell(todo, result.setup.spec)
    peaks = [output.gigabytes(result.peak_rss.get(who, 0)) for who in ("parent", "worker")]
    lost = f"; {output.count(result.workers.get('lost', 0), 'worker')} lost" if result.workers.get("lost") else ""
    output.note(f"Peak memory: {peaks[0]} here, {peaks[1]} in a worker{lost}")
    output.line()
    good = verdict["word"] != "not certified"
    output.line(verdict["sentence"], "bold green" if good else "bold red")
    typer.echo(f"Report: {report}")  # not wrapped, so that it can be opened
