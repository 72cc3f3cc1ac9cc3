"""``report.html``: what it shows, that nothing hostile gets through, and that a real browser is content with it."""

from __future__ import annotations

import copy
import json
import re
import shlex
import shutil
import subprocess
import time
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from helios.backend import select
from helios_conformance import checks, execute, figures, html, suite
from helios_conformance.charts import Axis
from helios_conformance.draws import Root
from helios_conformance.record import record
from helios_conformance.references import References
from helios_conformance.session import Session

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium on this machine (Debian: apt install chromium)"
)


@cache
def real_cases() -> list[dict[str, Any]]:
    """A few cases, run on the CPU backend and judged; one of them as if its output had been far off."""
    session = Session(select("cpu"), Root(3, "n"))
    told = []
    names = ("linear", "attention", "rms_norm", "silu", "cast")
    for case in suite.choose("bf16", "quick", ("ops",)):
        if case.check != "op_values" or case.id.partition("[")[0] not in names:
            continue
        references = References({case.id: checks.get(case.check).reference(case, session.root)})
        started = time.perf_counter()
        told.append(record(case, *execute.run_here(case, session, references), time.perf_counter() - started))
    return told


SYNTHETIC = {
    # Made up: a figure here was measured nowhere.
    "realtime": {
        "size": "mini",
        "steps": [1, 1, 1],
        "fps": {"steady": 3.21, "first_chunk": 2.5, "wall": 3.0},
        "latency": {"p50": 10.2, "p99": 12.9, "chunks": [10 + (i * 37 % 11) / 5 for i in range(45)]},
        "split": {"text": 0.1, "history": 0.2, "denoise": 8.0, "decode": 1.9},
        "class": "measured (synthetic)",
        "ceilings": [
            {"what": "matrix product", "shape": "8192×5120×5120", "rate": 7e14, "unit": "FLOP/s", "source": "x"},
            {"what": "copy", "shape": "1 GB", "rate": 3000.0, "unit": "GB/s", "source": "x"},
        ],
        "roofline": [
            {"op": "linear", "flops": 4.1e14, "bytes": 9e11, "seconds": 0.7, "share": 0.83, "bound": "FLOP"},
            {"op": "attention", "flops": 1.3e14, "bytes": 1e11, "seconds": 0.3, "share": 0.71, "bound": "FLOP"},
            {"op": "all", "flops": 5.4e14, "bytes": 1e12, "seconds": 1.05, "share": 0.7, "bound": ""},
            {"op": "rms_norm", "flops": 2e10, "bytes": 8e10, "seconds": 0.05, "share": 0.5, "bound": "bytes"},
        ],
        "full_length": False,
    },
    "divergence": {
        "chunks": list(range(44)),
        "psnr": [60 - i / 2 for i in range(44)],
        "relative": [1e-3 * 1.2**i for i in range(44)],
    },
}


def report() -> dict[str, Any]:
    cases = copy.deepcopy(real_cases())
    cases[0] |= {"state": "fail", "reason": "o0: norm of the error 0.5 is beyond 0.01"}
    passed = sum(c["state"] == "pass" for c in cases)
    ops = {"state": "fail", "passed": passed, "failed": 1, "unsupported": 0, "not_run": 0, "required": len(cases)}
    return copy.deepcopy(SYNTHETIC) | {
        "format": 1,
        "suite": {"hash": "ab" * 32, "name": "quick", "levels": ["ops"], "filters": [], "seed": 3, "nonce": "n"},
        "verdict": {
            "word": "not certified",
            "sentence": "For bf16, level ops, quick suite: not certified.",
            "closed": False,
            "levels": {"ops": ops | {"reason": "1 failed"}},
            "reasons": ["a required case failed"],
        },
        "scope": {"precision": "bf16", "kind": "kernels", "levels": ["ops"]},
        "tier": "self-tested",
        "not_proved": ["That the named device computed these outputs."],
        "backend": {"label": "cpu", "kind": "kernels", "emulated": "", "device": {"name": "A CPU", "memory": 8 << 30}},
        "weights": {"origin": "random", "seed": 3, "scale": "1/sqrt(fan-in)"},
        "environment": {"packages": {"torch": "2.13"}, "os": "Linux", "threads": [1, 2]},
        "coverage": [["linear", 10, 0, 0, ""], ["qk_norm_rope", 0, 4, 0, ""]],
        "cases": cases,
        "started": "2026-11-23T12:00:00Z",
        "finished": "2026-11-23T12:01:00Z",
        "peak_rss": {"parent": 1 << 30, "worker": 2 << 30},
        "reproduce": ["helios certify --backend cpu --suite quick --seed 3 --nonce n"],
    }


class Page(HTMLParser):
    """The tags with their attributes, the text by the section that it is in, and ids in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


def test_it_says_the_verdict_first_and_then_what_it_does_not_prove() -> None:
    words = Page(html.render(report())).words.partition("Helios conformance report")[2]
    order = [
        "not certified",
        "For bf16, level ops, quick suite: not certified.",
        "Quick",
        "Self-tested",
        "What this report does not prove",
        "That the named device computed these outputs.",
        "Levels",
        "Ops , case by case" if "Ops , case" in words else "Ops, case by case",
        "Error against budget",
        "Latency of each chunk",
        "Roofline",
        "Divergence over chunks",
        "Coverage",
        "Environment",
        "Failures, and how to reproduce each",
        "All cases",
    ]
    places = [words.index(part) for part in order]
    assert places == sorted(places)


@pytest.mark.parametrize("word", ["passed", "imported"])
def test_the_large_letters_say_what_is_no_certification(word: str) -> None:
    text = html.render({"verdict": {"word": word, "sentence": "s"}})
    assert f'<span class="word">{word}, not a certification</span>' in text
    assert f"<title>{word}, not a certification:" in text


def test_the_same_report_gives_the_same_bytes() -> None:
    assert html.render(report()) == html.render(copy.deepcopy(report()))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"backend": {"emulated": "a CPU stands in for the device"}}, "a CPU stands in for the device"),
        ({"suite": {"filters": ["linear*"]}}, "Only cases that match linear*"),
        ({"suite": {"name": "quick"}}, "The quick suite ran"),
        ({"tier": "self-tested"}, "nobody watched"),
        ({"tier": "imported"}, "The results came as files"),
        ({"coverage": [["linear", 0, 0, 7, "no kernel"]]}, "7 nodes ran by the reference"),
        ({"scope": {"kind": "engine"}}, "Graphs run whole"),
    ],
)
def test_what_must_not_be_overlooked_is_said_loudly(change: dict[str, Any], word: str) -> None:
    quiet = {"suite": {"name": "full"}, "tier": "witnessed", "verdict": {"word": "certified", "sentence": "s"}}
    assert 'class="loud"' not in html.render(quiet)
    loud = html.render(quiet | change).partition('class="loud"')[2].partition("</ul>")[0]
    assert word in loud


def test_a_report_with_nothing_in_it_still_is_a_page() -> None:
    page = Page(html.render({}))
    assert "no verdict" in page.words


def test_the_matrix_counts_cases_and_gives_reasons() -> None:
    text = html.render(report())
    cell = re.search(r'<span class="cell state fail" tabindex="0">(.*?)</td>', text, re.DOTALL)
    assert cell is not None
    assert "norm of the error 0.5 is beyond 0.01" in cell[1]
    assert text.count('<span class="cell state pass">') >= 4


def test_failures_come_with_a_command_that_runs_them_again() -> None:
    command = html.reproduce(report(), report()["cases"][0])
    words = shlex.split(command)
    assert words[:4] == ["helios", "certify", "--backend", "cpu"]
    assert words[words.index("--filter") + 1] == real_cases()[0]["id"]
    assert words[words.index("--seed") + 1] == "3"
    assert words[words.index("--nonce") + 1] == "n"
    assert shlex.quote(real_cases()[0]["id"]) in Page(html.render(report())).words


def test_what_was_imported_is_not_run_again_but_exported() -> None:
    words = shlex.split(html.reproduce({"setup": {"imported": True}}, {"id": "a[b]", "precision": "fp32"}))
    assert words[:4] == ["helios", "cases", "export", "DIR"]
    assert words[words.index("--filter") + 1] == "a[b]"


def test_a_hostile_name_stays_one_word_of_the_command() -> None:
    hostile = {"backend": {"label": "cpu; rm -rf ~\n$(id)`id`'\""}}
    words = shlex.split(html.reproduce(hostile, {"id": "a[b]", "precision": "bf16"}))
    assert words[3].startswith("cpu; rm -rf ~")
    assert words[4] == "--precision"


def test_shares_of_the_budget() -> None:
    errors = {"norm": 0.5, "worst": "inf", "gain": -0.25, "misrounded": 0.3, "count": 4}
    bounds = {"norm": 1.0, "worst": 2.0, "gain": 1.0, "misrounded": 1.0, "count": 4}
    exact = dict.fromkeys(("norm", "worst", "gain", "misrounded"), 0.0)
    cases = [
        {
            "id": "a[x]",
            "outputs": {"o0": {"errors": errors, "bounds": bounds}, "o1": {"errors": exact, "bounds": exact}},
        }
    ]
    found = [(s.output, s.statistic, s.fraction) for s in figures.shares(cases)]
    assert found[:3] == [("o0", "worst", float("inf")), ("o0", "norm", 0.5), ("o0", "gain", 0.25)]
    assert {row[2] for row in found[3:]} == {0.0}
    assert ("o0", "misrounded") not in {row[:2] for row in found}, "a bound of 1 on a part bounds nothing"


def test_every_timed_run_is_shown_with_its_setting() -> None:
    told = report()
    one = told["realtime"]
    told["realtime"] = one | {"runs": [one | {"case": "first"}, one | {"case": "second", "steps": [2, 2, 2]}]}
    words = Page(html.render(told)).words
    for part in ("first", "second", "steps 1, 1, 1", "steps 2, 2, 2", "shorter than the rules ask"):
        assert part in words


def test_what_nothing_bounds_has_no_share() -> None:
    errors = {"norm": 0.5, "worst": 0.1, "gain": 0.2, "misrounded": 0.3}
    bounds = {"norm": "inf", "worst": "inf", "gain": "inf", "misrounded": 1.0}
    assert figures.shares([{"id": "a[x]", "outputs": {"o0": {"errors": errors, "bounds": bounds}}}]) == []


def test_axes_put_values_where_they_belong() -> None:
    assert [Axis(1e-3, 10.0, log=True).at(v) for v in (0.0, 1e-3, 0.1, 10.0, float("inf"))] == [
        0,
        0,
        pytest.approx(0.5),
        1,
        1,
    ]
    assert Axis(0, 44).ticks() == [0, 10, 20, 30, 40]
    assert Axis(5.0, 5.0).at(5.0) == 0.0


HOSTILE = [
    "<script>document.title='owned'</script>",
    "</script><script>document.title='owned'</script>",
    "<img src=x onerror=\"document.title='owned'\">",
    "'\"><svg onload=document.title='owned'>",
    "</title><script>document.title='owned'</script>",
    "</style><script>document.title='owned'</script>",
    "]]><!--",
    "{{ 7 * 7 }}{% for x in y %}",
    "javascript:document.title='owned'",
    "device \u202egpj.exe\u2066 \u200f",
    "מעבד גרפי 显卡 👩‍🚀 🏳️‍🌈",
    "nul\x00 bell\x07 escape\x1b[31m \udcff",
    "&lt;b&gt; &amp; &#x3c;script&#x3e;",
]


def poisoned(value: Any, text: str) -> Any:
    """Every text of a JSON tree replaced, keys too where they are not ours."""
    if isinstance(value, dict):
        return {key: poisoned(item, text) for key, item in value.items()}
    if isinstance(value, list):
        return [poisoned(item, text) for item in value]
    return text if isinstance(value, str) else value


def hostile_report(text: str) -> dict[str, Any]:
    told: dict[str, Any] = poisoned(report(), text)
    told["environment"][text] = {text: text}
    told["verdict"]["levels"][text] = {"state": text, "reason": text}
    told["cases"] += [dict(case, id=text) for case in report()["cases"]]
    told["coverage"].append([text, text, text, text, text])
    return told


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_becomes_markup(text: str) -> None:
    rendered = html.render(hostile_report(text))
    rendered.encode()  # no lone surrogate is left
    page, harmless = Page(rendered), Page(html.render(hostile_report("harmless")))
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in harmless.tags]
    handlers = [name for _, attrs in page.tags for name in attrs if name.startswith("on")]
    assert not handlers
    for _, attrs in page.tags:
        for name in ("href", "src"):
            assert (attrs.get(name) or "#").startswith(("#", "data:,"))


def test_marks_that_turn_or_hide_text_are_written_out() -> None:
    shown = html.plain("a\u202eb\x00c\u2066\ud800\n👩\u200d🚀")
    assert shown == "a‹U+202E›b‹U+0000›c‹U+2066›‹U+D800›\n👩\u200d🚀"


def test_a_reason_of_a_hundred_kilobytes_is_cut_and_says_so() -> None:
    told = report()
    told["cases"][0]["reason"] = "<b>" * 34_000
    text = html.render(told)
    assert "82,000 more characters in report.json" in text
    assert len(text) < len(html.render(report())) + 100_000


def test_it_needs_nothing_from_outside() -> None:
    text = html.render(report())
    assert not re.search(r"(?:src|href)=\"(?!#|data:,)", text)
    assert "url(" not in text
    assert "@import" not in text
    assert "default-src 'none'" in text


def test_a_chart_of_ten_thousand_cases_stays_small() -> None:
    bounds = {"norm": 1.0, "worst": 1.0, "gain": 1.0, "misrounded": 0.5}
    cases = [
        {
            "id": f"op{i % 90}[bf16,{i}]",
            "outputs": {"o0": {"errors": dict.fromkeys(bounds, (i % 97) / 100), "bounds": bounds}},
        }
        for i in range(10_000)
    ]
    chart = figures.budget_chart(figures.shares(cases))
    assert chart is not None
    assert len(chart) < 3_000_000


def browse(page: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Chromium without a window. Its console goes to stderr, in lines that say CONSOLE."""
    assert CHROMIUM is not None
    profile = page.parent / "profile"
    fixed = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]
    quiet = ["--no-first-run", "--disable-extensions", "--disable-background-networking", "--enable-logging=stderr"]
    command = [CHROMIUM, *fixed, *quiet, f"--user-data-dir={profile}", *options, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


def console(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@needs_chromium
def test_a_browser_shows_it_without_a_complaint(tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    html.write(report(), page)
    done = browse(page, "--dump-dom")
    assert console(done) == []
    assert "Copy</button>" in done.stdout, "the script ran"


@needs_chromium
def test_the_console_is_really_watched(tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    page.write_text(html.render(report()).replace("</main>", "<script>document.title='owned'</script></main>"))
    done = browse(page, "--dump-dom")
    assert any("Content Security Policy" in line for line in console(done)), "a stranger's script is refused"
    assert "<title>owned" not in done.stdout


@needs_chromium
def test_a_browser_finds_nothing_hostile_in_it(tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    html.write(hostile_report(" ".join(HOSTILE)), page)
    done = browse(page, "--dump-dom")
    assert console(done) == []
    assert "<title>owned" not in done.stdout
    assert "<img" not in done.stdout


@needs_chromium
@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_wider_than_the_screen(tmp_path: Path, width: int) -> None:
    page = tmp_path / "report.html"
    told = report()
    told["cases"][0]["reason"] = "w" * 5000
    told["backend"]["device"]["name"] = "d" * 500
    # The browser measures, in a frame of the phone's width: a window has a least width.
    frame = f'<iframe id="f" style="width:{width}px;height:900px;border:0"></iframe>'
    measure = "f.onload = () => { document.title = 'wide ' + f.contentDocument.documentElement.scrollWidth; };"
    content = json.dumps(html.render(told)).replace("</", "<\\/")
    script = f"<script>const f = document.getElementById('f'); {measure} f.srcdoc = {content};</script>"
    page.write_text(f'<!DOCTYPE html><meta charset="utf-8">{frame}{script}')
    done = browse(page, "--dump-dom", "--virtual-time-budget=5000")
    wide = re.search(r"<title>wide (\d+)", done.stdout)
    assert wide is not None
    assert int(wide[1]) <= width


@needs_chromium
def test_a_phone_shows_the_levels_whole(tmp_path: Path) -> None:
    """Nothing of that table is to be scrolled to: what it hides may be the number that failed."""
    page, told = tmp_path / "report.html", report()
    level = told["verdict"]["levels"]["ops"] | {"passed": 19555, "unsupported": 10000, "reason": "r" * 400}
    told["verdict"]["levels"] = dict.fromkeys(("ops", "blocks", "model", "pipeline", "realtime"), level)
    frame = '<iframe id="f" style="width:390px;height:900px;border:0"></iframe>'
    find = "const d = f.contentDocument, t = d.querySelector('.levels');"
    least = "Math.max(...[...t.querySelectorAll('tbody *')].map(e => e.getBoundingClientRect().right))"
    measure = f"f.onload = () => {{ {find} document.title = [t.scrollWidth, t.clientWidth, {least}].join(' '); }};"
    content = json.dumps(html.render(told)).replace("</", "<\\/")
    script = f"<script>const f = document.getElementById('f'); {measure} f.srcdoc = {content};</script>"
    page.write_text(f'<!DOCTYPE html><meta charset="utf-8">{frame}{script}')
    seen = re.search(r"<title>([\d. ]+)<", browse(page, "--dump-dom", "--virtual-time-budget=5000").stdout)
    assert seen is not None
    inner, outer, right = map(float, seen[1].split())
    assert inner <= outer
    assert 0 < right <= 390


@needs_chromium
@pytest.mark.parametrize(
    ("name", "scheme", "size"), [("light", 1, "1280,1600"), ("dark", 0, "1280,1600"), ("phone", 1, "500,1600")]
)
def test_screenshots_show_something(tmp_path: Path, name: str, scheme: int, size: str) -> None:
    import numpy as np
    from PIL import Image

    page, shot = tmp_path / "report.html", tmp_path / f"{name}.png"
    html.write(report(), page)
    browse(page, f"--screenshot={shot}", f"--window-size={size}", f"--blink-settings=preferredColorScheme={scheme}")
    pixels = np.asarray(Image.open(shot).convert("L"), dtype=float)
    assert pixels.std() > 10, "an empty page is of one colour"
    assert (np.median(pixels) < 100) == (name == "dark")
