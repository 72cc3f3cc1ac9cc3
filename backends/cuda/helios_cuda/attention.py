"""Which library runs attention: measured on the device, once for each form, and recorded; or given by name.

::

    chooser = Chooser(device)
    chooser.settle(forms(plan))          # at compile time: measures every form that is new
    chooser.run(q, k, v, scale=None)     # never measures
    state = chooser.plan                 # {"bf16 b=1 s=8640 t=11040 h=40 d=128": {"library": "cudnn", ...}, ...}
    chooser.use(state)                   # the same bits again, or a BackendError that says what is different

Libraries differ in their last bits, so a run that is to be continued must take the ones that it began with. A form that
nobody settled runs in Triton, and is recorded as such when it first does.

Attention of quantised operands is another op, with forms of a dtype of their own: only our kernel runs it, whatever
library was asked for, and that kernel runs nothing else, so that a plan in bfloat16 never has a quantised one. It is
recorded beside the others, as ``triton e4m3``.

Before a library is timed, some rows of its result are compared with float32 arithmetic: a wrong one is refused, however
fast. Of two within 2% of each other the first in the list wins, so that noise does not decide.

What to expect of one H200, at the 600–650 TFLOP/s that the best of them reach in bfloat16 (published figures; nothing
here was measured by us). Attention of all 40 layers, a step, 384 × 640:

==========================================================  =======  ===========
step                                                        TFLOP    ms
==========================================================  =======  ===========
stage 0: 39 × (2940 × 2940), the last block 540 × 2940          6.9        11
stage 1: 39 × (4560 × 4560), the last block 2160 × 4560        16.8     26–28
stage 2: 39 × (11040 × 11040), the last block 8640 × 11040     99.3   153–166
text, stage 2: 40 × (8640 × 512)                                3.6         6
==========================================================  =======  ===========

One layer of each is in ``helios_cuda.kernels.attention``.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from helios.errors import BackendError, InputError, unknown_name
from helios.graph import Node, Value
from helios.passes import Plan
from helios_cuda.attention_libraries import E4M3, LIBRARIES, QUANTISED, TRITON, Device, Form, Library, describe
from helios_cuda.choice import RESUME, elapsed, fastest, reason

__all__ = ["MEASURE", "Chooser", "Clock", "device_clock", "forms"]

Clock = Callable[[Callable[[], object]], float]
"""Milliseconds that one call takes on the device."""

MEASURE = "measure"
SECONDS = 1.0
"""That all timed calls of one ``settle`` may take together, about. Loading and compiling libraries comes on top."""
REPEATS = 9
BOUND = {torch.bfloat16: 2.0**-6, torch.float16: 2.0**-8, torch.float32: 2.0**-12}
"""Of the relative error of a library's result, in the Euclidean norm; four times and more what a right one has."""
ROWS = 16
KEYS_AT = {"attention": 1, "quantized_attention": 1, "scaled_attention": 2}
"""Ops that are attention, and which operand of theirs the keys are."""


def forms(plan: Plan) -> list[Form]:
    """The different attentions of a plan."""
    found = (_form(node) for graph in plan.graphs.values() for node in graph.nodes if node.op in KEYS_AT)
    return list(dict.fromkeys(found))


def _form(node: Node) -> Form:
    q, k = node.inputs[0], node.inputs[KEYS_AT[node.op]]
    assert isinstance(q, Value)
    assert isinstance(k, Value)
    form = Form.of(q, k)
    return form if node.op == "attention" else dataclasses.replace(form, dtype=E4M3)


def device_clock(call: Callable[[], object]) -> float:
    """Between two events on the current stream."""
    return 1e3 * elapsed(call)


class Chooser:
    """The attention of one backend. Not for two threads at once.

    Args:
        device: where it runs; on anything but a GPU, Triton serves, and nothing is recorded.
        libraries: to choose among, Triton included.
        clock: see ``Clock``.
        described: the device as plans name it; ``None`` asks it.
    """

    def __init__(
        self,
        device: torch.device,
        libraries: Sequence[Library] = LIBRARIES,
        clock: Clock = device_clock,
        described: Device | None = None,
    ) -> None:
        self._device, self._clock, self._described = device, clock, described
        self._libraries = {library.name: library for library in libraries}
        self._name = MEASURE
        self._plan: dict[str, dict[str, Any]] = {}
        self._settled: dict[Form, Library] = {}

    @property
    def plan(self) -> dict[str, dict[str, Any]]:
        """What was chosen so far, as JSON values, by form: ``library``, ``version``, ``device``, ``ms`` of each library
        that was measured, and ``refused``: why each other was not."""
        return copy.deepcopy(self._plan)

    def use(self, chosen: str | Mapping[str, Mapping[str, Any]]) -> None:
        """Take a library for all forms, or what a plan has for its own.

        Args:
            chosen: a library's name, or ``measure``: what was chosen before is forgotten, and programs that were
                compiled before should be compiled anew. Or a ``plan``: of forms that it has not nothing is forgotten.

        Raises:
            InputError: no library has that name.
            BackendError: the plan's library is not there, or it or the device is another one.
        """
        if isinstance(chosen, str):
            if chosen != MEASURE and chosen not in self._libraries:
                raise InputError(unknown_name("attention library", chosen, [MEASURE, *self._libraries]))
            self._name, self._plan, self._settled = chosen, {}, {}
            return
        for key, entry in chosen.items():
            self._require(key, entry)
        self._plan |= {key: copy.deepcopy(dict(entry)) for key, entry in chosen.items()}
        self._settled = {}

    def settle(self, wanted: Iterable[Form]) -> None:
        """Choose a library for each form that has none, with random numbers of its size.

        Raises:
            BackendError: the library that was given by name cannot run one of them, or none gives right results.
        """
        if self._device.type != "cuda" and self._described is None:
            return
        wanted = list(dict.fromkeys(wanted))
        new = [form for form in wanted if str(form) not in self._plan]
        current = torch.cuda.device(self._device) if self._device.type == "cuda" else contextlib.nullcontext()
        with torch.no_grad(), current:
            for form in new:
                self._plan[str(form)] = self._choose(form, 1e3 * SECONDS / len(new))
        for form in wanted:
            self._recall(form)

    def run(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Tensor:
        """The op ``attention`` by what was chosen for its form: q ``[b, s, h, d]``, k and v ``[b, t, h, d]``."""
        factor = q.shape[-1] ** -0.5 if scale is None else scale
        if q.device != self._device or (q.device.type != "cuda" and self._described is None):
            return TRITON.run(q, k, v, factor)
        form = Form.of(q, k)
        library = self._settled.get(form) or self._recall(form)
        return _call(library, q, k, v, factor)

    def _recall(self, form: Form) -> Library:
        """What the plan has for a form; what it has not is entered."""
        if str(form) not in self._plan:
            by_name = self._name != MEASURE
            self._plan[str(form)] = self._named(form) if by_name else self._entry(self._libraries[TRITON.name], {}, {})
        library = self._known[self._plan[str(form)]["library"]]
        if why := library.there(form, self._here):
            raise BackendError(f"the plan has {library.name} for attention of {form}: {why}", RESUME)
        self._settled[form] = library
        return library

    @property
    def _known(self) -> Mapping[str, Library]:
        """All that a plan may name."""
        return {**self._libraries, QUANTISED.name: QUANTISED}

    @property
    def _here(self) -> Device:
        self._described = self._described or describe(self._device)
        return self._described

    def _entry(self, library: Library, ms: Mapping[str, float], refused: Mapping[str, str]) -> dict[str, Any]:
        return {
            "library": library.name,
            "version": library.version(),
            "device": str(self._here),
            "ms": dict(ms),
            "refused": dict(refused),
        }

    def _require(self, key: str, entry: Mapping[str, Any]) -> None:
        """That a plan's entry holds here, too."""
        name, wanted, device = (str(entry.get(part, "")) for part in ("library", "version", "device"))
        if name not in self._known:
            known = ", ".join(self._known)
            raise BackendError(f"the plan has the attention library {name!r} for {key}; known are {known}", RESUME)
        if device != str(self._here):
            raise BackendError(f"the plan chose attention of {key} for {device}, this is {self._here}", RESUME)
        try:
            version = self._known[name].version()
        except ImportError:
            version = "not installed"
        if wanted != version:
            raise BackendError(f"the plan has {wanted} for attention of {key}; here it is {version}", RESUME)

    def _choose(self, form: Form, budget: float) -> dict[str, Any]:
        """The entry for a form; timed calls take about ``budget`` milliseconds."""
        if form.dtype == E4M3:
            return self._entry(QUANTISED, {}, {})
        if self._name != MEASURE:
            return self._named(form)
        refused: dict[str, str] = {}
        able: list[Library] = []
        for library in self._libraries.values():
            if why := library.there(form, self._here):
                refused[library.name] = why
            else:
                able.append(library)
        if len(able) == 1:
            return self._entry(able[0], {}, refused)
        ms = self._measure(form, able, budget / len(able), refused)
        if not ms:
            reasons = "; ".join(f"{name}: {why}" for name, why in refused.items())
            raise BackendError(f"no attention library runs {form} on {self._here}: {reasons}")
        return self._entry(self._libraries[fastest(ms)], ms, refused)

    def _named(self, form: Form) -> dict[str, Any]:
        library = self._libraries[self._name]
        if why := library.there(form, self._here):
            why = f"attention by {library.name} was asked for, which cannot run {form}: {why}"
            raise BackendError(why, fix=f"ask for {MEASURE!r}, or for {TRITON.name!r}, which runs everything")
        return self._entry(library, {}, {})

    def _measure(self, form: Form, able: Sequence[Library], share: float, refused: dict[str, str]) -> dict[str, float]:
        """Milliseconds by name; why not goes to ``refused``."""
        q, k, v = _draw(form, self._device)
        scale = form.width**-0.5
        ms: dict[str, float] = {}
        for library in able:
            try:
                error = _error(_call(library, q, k, v, scale), q, k, v, scale)  # this call loads and compiles
                if error <= BOUND[form.dtype]:
                    ms[library.name] = self._time(lambda run=library: _call(run, q, k, v, scale), share)  # type: ignore[misc]
                else:
                    refused[library.name] = f"its result is wrong: relative error {error:.2g}"
            except Exception as problem:  # of any kind: libraries have no common one, and there are others
                refused[library.name] = reason(problem)
        return ms

    def _time(self, call: Callable[[], object], share: float) -> float:
        """The median of as many calls as fit into ``share`` milliseconds, and of one at least."""
        taken = [self._clock(call)]
        while len(taken) < REPEATS and sum(taken) + taken[-1] <= share:
            taken.append(self._clock(call))
        return round(statistics.median(taken), 4)


def _call(library: Library, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    if library.aligned:
        q, k, v = _aligned(q), _aligned(k), _aligned(v)
    return library.run(q, k, v, scale)


def _aligned(x: Tensor) -> Tensor:
    """x, or a copy if it does not start and go on in whole 16 bytes: libraries read so many at once, and do not ask."""
    size, steps = x.element_size(), [step for step, n in zip(x.stride()[:-1], x.shape[:-1], strict=True) if n > 1]
    fits = x.data_ptr() % 16 == 0 and all(step > 0 and step * size % 16 == 0 for step in steps)
    return x if fits and x.stride(-1) == 1 else x.clone(memory_format=torch.contiguous_format)


def _draw(form: Form, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The same normal numbers each time."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(tokens: int) -> Tensor:
        shape = (form.batch, tokens, form.heads, form.width)
        return torch.randn(shape, generator=generator, device=device, dtype=form.dtype)

    return normal(form.queries), normal(form.keys), normal(form.keys)


def _error(out: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float) -> float:
    """Relative, of some rows of all heads, against float32 arithmetic."""
    rows = torch.linspace(0, q.shape[1] - 1, min(ROWS, q.shape[1]), device=q.device).long()
    scores = torch.einsum("bshd,bthd->bhst", q[:, rows].float(), k.float()) * scale
    wanted = torch.einsum("bhst,bthd->bshd", scores.softmax(-1), v.float())
    return float((out[:, rows].float() - wanted).norm() / wanted.norm())
