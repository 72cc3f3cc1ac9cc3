"""The level's cases: ceilings, timed runs, prompts in turns, and the long run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from helios_conformance.budget import Errors
from helios_conformance.case import Case, Check, Observation, Verdict
from helios_conformance.draws import Root
from helios_conformance.realtime import ceilings, soak, tied, timed, varied
from helios_conformance.realtime.options import STEPS, Options
from helios_conformance.realtime.scene import refusal
from helios_conformance.realtime.summary import MALFORMED
from helios_conformance.references import References
from helios_conformance.session import Session

__all__ = ["CHECKS", "VARIANT"]

VARIANT = "distilled"
"""The one that runs in real time."""

PATIENCE, LONG = 3600.0, 4 * 3600.0
"""Seconds for a case: a device far from real time may still say how far; and for the long run."""


class _Level:
    """What the checks of this level have in common: a case may not be run, with the reason, and is never green then."""

    name: str
    label: str

    def cases(self, precision: str) -> Iterator[Case]:
        yield self._case(precision, VARIANT, STEPS[0])

    def _case(self, precision: str, detail: str, steps: tuple[int, ...], *, required: bool = True) -> Case:
        params = {"variant": VARIANT, "steps": list(steps)}
        id_ = f"{self.label}[{precision},{detail}]"
        return Case(id_, "realtime", self.name, precision, params, "full", required, PATIENCE if required else LONG)

    def observe(self, case: Case, session: Session) -> Observation:
        why = self.unwanted(case, Options.of(session.options))
        why = why or refusal(session, case.precision, case.params["variant"])
        return Observation(facts={"not_run": why}) if why else self.run(case, session)

    def judge(self, case: Case, observation: Observation, root: Root, references: References) -> Verdict:
        if "not_run" in observation.facts:
            return Verdict("not_run", str(observation.facts["not_run"]))
        try:
            return self.conclude(case, observation, root, references)
        except MALFORMED as error:  # whoever shares the worker's process can write what it likes
            why = f"what came back is no observation of this case: {type(error).__name__}: {error}"
            return Verdict("fail", why[:500])

    def reference(self, case: Case, root: Root) -> Mapping[str, Errors]:
        return {}

    def unwanted(self, case: Case, options: Options) -> str:
        """Why the options leave this case out; empty where they do not."""
        return ""

    def run(self, case: Case, session: Session) -> Observation:
        raise NotImplementedError

    def conclude(self, case: Case, observation: Observation, root: Root, references: References) -> Verdict:
        raise NotImplementedError


class Ceilings(_Level):
    """What the device can do at most on the shapes of the model."""

    name, label = "realtime_ceilings", "ceilings"

    def run(self, case: Case, session: Session) -> Observation:
        return Observation(facts={"rows": ceilings.measure(session, case.precision, case.params["variant"])})

    def conclude(self, case: Case, observation: Observation, root: Root, references: References) -> Verdict:
        found = {row["what"] for row in observation.facts["rows"] if row["rate"]}
        missing = [what for what in ceilings.KINDS if what not in found]
        return Verdict("fail", f"no ceiling of {', '.join(missing)} could be measured") if missing else Verdict("pass")


class Timed(_Level):
    """Frames a second of one list of steps."""

    name, label = "realtime_timed", "realtime"

    def cases(self, precision: str) -> Iterator[Case]:
        for steps in STEPS:
            yield self._case(precision, f"{VARIANT},{'-'.join(map(str, steps))}", steps)

    def unwanted(self, case: Case, options: Options) -> str:
        wanted = options.steps
        other = wanted is not None and list(wanted) != case.params["steps"]
        return f"the run was asked for steps {list(wanted or ())} alone" if other else ""

    def run(self, case: Case, session: Session) -> Observation:
        return timed.observe(case, session)

    def conclude(self, case: Case, observation: Observation, root: Root, references: References) -> Verdict:
        return timed.judge(case, observation, root, references)

    def reference(self, case: Case, root: Root) -> Mapping[str, Errors]:
        return tied.reference(case, root)


class Varied(_Level):
    """Repeated against varied prompts."""

    name, label = "realtime_varied", "varied"

    def run(self, case: Case, session: Session) -> Observation:
        return varied.observe(case, session)

    def conclude(self, case: Case, observation: Observation, root: Root, references: References) -> Verdict:
        return varied.judge(case, observation)


class Soak(_Level):
    """The long run, where one is asked for."""

    name, label = "realtime_soak", "soak"

    def cases(self, precision: str) -> Iterator[Case]:
        yield self._case(precision, VARIANT, STEPS[1], required=False)

    def unwanted(self, case: Case, options: Options) -> str:
        return "" if options.soak else "no long run was asked for; --soak 30m makes one"

    def run(self, case: Case, session: Session) -> Observation:
        return soak.observe(case, session)

    def conclude(self, case: Case, observation: Observation, root: Root, references: References) -> Verdict:
        return soak.judge(case, observation)


CHECKS: tuple[Check, ...] = (Ceilings(), Timed(), Varied(), Soak())
