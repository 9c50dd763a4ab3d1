"""The report in a real browser: Chromium without a window, driven through the pipes of its own debugging protocol."""

import fcntl
import itertools
import json
import os
import re
import select
import shutil
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
from sidetask_bench import report
from sidetask_bench.gallery import Gallery

from packages.bench.tests.test_report import HOSTILE, make, pictures

pytestmark = pytest.mark.thorough

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PHONE, DESKTOP, PAPER = (390, 844), (1280, 900), (718, 1000)

# Chromium reads commands from descriptor 3 and answers on 4.
LAUNCH = (
    "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); os.execv(sys.argv[3], sys.argv[3:])"
)


class Chromium:
    """One page; `call` is a command of the protocol, `events` what has happened meanwhile."""

    def __init__(self, profile):
        down, up = os.pipe(), os.pipe()
        # Out of the way of 3 and 4.
        theirs = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (down[0], up[1])]
        options = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-extensions",
            "--in-process-gpu",
            "--remote-debugging-pipe",
            "--no-first-run",
        ]
        options += [f"--user-data-dir={profile}", "--disable-dev-shm-usage", "--disable-background-networking"]
        command = [sys.executable, "-c", LAUNCH, *map(str, theirs), CHROMIUM, *options, "about:blank"]
        null = subprocess.DEVNULL
        self.process = subprocess.Popen(command, pass_fds=theirs, stdin=null, stdout=null, stderr=null)
        for end in (down[0], up[1], *theirs):
            os.close(end)
        self.to, self.back = down[1], up[0]
        self.numbers, self.rest, self.events, self.session = itertools.count(), b"", [], None
        page = next(t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page")
        self.session = self.call("Target.attachToTarget", targetId=page["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def close(self):
        os.close(self.to)
        os.close(self.back)
        self.process.kill()
        self.process.wait()

    def call(self, method, **params):
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.to, json.dumps(message).encode() + b"\0")
        answer = self.wait(lambda m: m.get("id") == number)
        assert "error" not in answer, (method, answer)
        return answer["result"]

    def wait(self, wanted, seconds=900):
        until = time.monotonic() + seconds
        while True:
            while b"\0" in self.rest:
                text, _, self.rest = self.rest.partition(b"\0")
                message = json.loads(text)
                if "id" not in message:
                    self.events.append(message)
                if wanted(message):
                    return message
            assert select.select([self.back], [], [], max(0, until - time.monotonic()))[0], "Chromium does not answer"
            self.rest += os.read(self.back, 1 << 16)

    def open(self, path):
        self.events.clear()
        self.call("Page.navigate", url=path.as_uri())
        self.await_event("Page.loadEventFired")

    def await_event(self, method, condition=lambda found: True):
        """Wait until it has happened; it may have already."""

        def wanted(message):
            return message.get("method") == method and condition(message["params"])

        if not any(map(wanted, self.events)):
            self.wait(wanted)

    def run(self, script):
        """The value of an expression on the page."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def view(self, size, scheme="light", media="screen"):
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=size[0],
            height=size[1],
            deviceScaleFactor=1,
            mobile=size == PHONE,
        )
        self.call(
            "Emulation.setEmulatedMedia", media=media, features=[{"name": "prefers-color-scheme", "value": scheme}]
        )

    def mouse(self, x, y, *kinds):
        for kind in kinds:
            press = {} if kind == "mouseMoved" else {"button": "left", "clickCount": 1}
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **press)

    def click(self, script):
        """Press the middle of an element, as a hand would."""
        x, y = self.run(
            f"""(() => {{ const e = {script}; e.scrollIntoView({{block: "center", inline: "center"}});
            const b = e.getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2]; }})()"""
        )
        self.mouse(x, y, "mouseMoved", "mousePressed", "mouseReleased")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("there is no Chromium here, so that reports are not looked at in a browser")
    browser = Chromium(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A report of rows with long and hostile names, a gap, and a table with many classes."""
    folder = tmp_path_factory.mktemp("comparison")
    rows = ("single", "equal", HOSTILE, "a-method-with-a-name-that-goes-on-and-on")
    data = make(folder, rows=rows, steps=30)
    data["rows"][1]["mean"]["depth"]["rmse"] = None
    for row in data["rows"]:
        for run in row["runs"]:
            classes = {f"class {i}": 0.1 * i + 0.5 for i in range(13)}
            run["by_class"] = {"depth": {"by": "segmentation", "classes": classes}}
    (folder / "comparison.json").write_text(json.dumps(data))
    shown = pictures(rows)
    for strip in list(shown.strips):
        shown.strips.append(type(strip)("normals", strip.sample, strip.pictures))
    shown.legends["normals"] = shown.legends["depth"]
    return report.write(folder, shown), data


@pytest.fixture
def page(browser, written):
    browser.view(DESKTOP)
    browser.open(written[0])
    return browser


VISIBLE = "(e => e.getClientRects().length > 0)"
ROWS = 'row => [...row.cells].map(cell => cell.innerText.trim().split("\\n")[0])'


def test_it_opens_without_a_complaint_and_asks_for_nothing(page, written):
    page.run("document.fonts.ready.then(() => 1)")
    kinds = {event["method"] for event in page.events}
    assert not kinds & {"Runtime.exceptionThrown", "Log.entryAdded", "Page.javascriptDialogOpening"}
    asked = [e["params"]["request"]["url"] for e in page.events if e["method"] == "Network.requestWillBeSent"]
    assert asked[0] == written[0].as_uri()
    assert all(url.startswith("data:image/png;base64,") for url in asked[1:])
    assert page.run(f'{VISIBLE}(document.querySelector(".rows"))'), "the script has run"


def test_what_the_page_does_not_bring_along_is_blocked_and_heard_of(page, written):
    """As the test above would see it if the page asked for something, or ran what is not its script."""
    page.run('document.body.insertAdjacentHTML("beforeend", "<img src=https://example.org/x.png onerror=alert(1)>")')
    page.await_event("Log.entryAdded", lambda found: "Content Security Policy" in found["entry"]["text"])
    assert not any(event["method"] == "Page.javascriptDialogOpening" for event in page.events)


def test_a_press_on_a_column_sorts_by_it(page, written):
    names = [row["name"] for row in written[1]["rows"]]

    def order(table):
        return page.run(f"[...document.querySelectorAll('{table} tbody tr')].map(r => Number(r.dataset.row))")

    means = [row["mean"]["depth"]["absolute"] for row in written[1]["rows"]]
    best_first = sorted(range(len(names)), key=lambda row: means[row])
    press = "document.querySelectorAll('#results thead button')[3]"
    assert "depth" in page.run(f"{press}.innerText")
    for expected, said in ((best_first, "ascending"), (best_first[::-1], "descending"), (range(len(names)), None)):
        page.click(press)
        assert order("#results") == list(expected)
        assert page.run(f"{press}.closest('th').getAttribute('aria-sort')") == said


def test_what_is_undefined_comes_last_either_way(page, written):
    table = """[...document.querySelectorAll('.tables table')].find(t => t.tHead.innerText.includes('RMSE'))"""
    for _ in range(2):
        page.click(f"{table}.tHead.querySelectorAll('button')[2]")
        assert page.run(f"{table}.tBodies[0].rows[3].dataset.row") == "1"
        assert page.run(f"{table}.tBodies[0].rows[3].cells[2].innerText") == "–"


def test_a_press_on_a_row_hides_it_everywhere(page, written):
    hidden = f"[...document.querySelectorAll('[data-row=\"2\"]')].filter({VISIBLE})"
    before = page.run(f"{hidden}.map(e => e.tagName.toLowerCase())")
    assert {"tr", "g", "figure"} <= set(before)
    others = page.run(f"[...document.querySelectorAll('[data-row=\"1\"]')].filter({VISIBLE}).length")
    page.click("document.querySelectorAll('.rows button')[2]")
    assert page.run(f"{hidden}.length") == 0
    assert page.run(f"[...document.querySelectorAll('[data-row=\"1\"]')].filter({VISIBLE}).length") == others
    assert page.run("document.querySelectorAll('.rows button')[2].ariaPressed") == "false"
    page.click("document.querySelector('.rows button:last-child')")
    assert page.run(f"{hidden}.map(e => e.tagName.toLowerCase())") == before


# Scrolling takes the value away that is shown, and is told of in the next frame.
SCROLLED = "await new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"
CHART = """[...document.querySelectorAll('[data-marks]')].find(c => c.ariaLabel.startsWith('Validation, depth'))"""


def test_the_pointer_reads_values(page, written):
    folder = written[0].parent
    run_lines = [
        [json.loads(line) for line in (folder / run["folder"] / "metrics.jsonl").read_text().splitlines()]
        for run in written[1]["rows"][0]["runs"]
    ]
    mean = sum(lines[2]["validation"]["depth"]["absolute"] for lines in run_lines) / len(run_lines)
    mark = next(m for m in json.loads(page.run(f"{CHART}.dataset.marks")) if m[2].startswith("single, epoch 3:"))
    x, y = page.run(
        f"""(async () => {{ const s = {CHART}.querySelector("svg"); s.scrollIntoView({{block: "center"}});
        {SCROLLED}; const b = s.getBoundingClientRect(), k = b.width / s.viewBox.baseVal.width;
        return [b.x + {mark[0]} * k, b.y + {mark[1]} * k]; }})()"""
    )
    page.mouse(x, y, "mouseMoved")
    said = page.run("document.getElementById('tip').innerText")
    assert said == mark[2]
    assert said.startswith(f"single, epoch 3: {mean:.4g} (")
    box = page.run("(() => { const b = tip.getBoundingClientRect(); return [b.left, b.right, b.top, b.bottom]; })()")
    assert 0 <= box[0] < box[1] <= DESKTOP[0]
    assert box[3] < y or box[2] > y, "what is pointed at is not covered"
    page.mouse(2, 2, "mouseMoved")
    assert page.run("tip.hidden")
    page.click("document.querySelectorAll('.rows button')[0]")
    page.run(f"(async () => {{ {CHART}.scrollIntoView({{block: 'center'}}); {SCROLLED}; }})()")
    page.mouse(x, y, "mouseMoved")
    assert not page.run("tip.innerText").startswith("single") or page.run("tip.hidden")


def test_values_are_marked_where_they_are_drawn(page):
    """The line of a row goes through its marks."""
    paths = page.run(
        f"""[0, 1].map(row => [...{CHART}.querySelectorAll(`[data-row="${{row}}"][id*=line2d] path,
        g[data-row="${{row}}"] > path`)].map(p => p.getAttribute("d")))"""
    )
    marks = json.loads(page.run(f"{CHART}.dataset.marks"))
    for row, drawn in enumerate(paths):
        expected = [(x, y) for x, y, _, of in marks if of == row]
        lines = [[(float(x), float(y)) for x, y in re.findall(r"[ML] (\S+) (\S+)", path)] for path in drawn]
        assert any(len(line) == len(expected) and np.allclose(line, expected, atol=0.1) for line in lines)


def test_the_gallery_switches_task_and_row(page):
    pictures = f"[...document.querySelectorAll('.gallery figure')].filter({VISIBLE})"
    everything = page.run(f"{pictures}.length")
    assert everything == 4 * 6

    def choose(which, value):
        page.run(
            f"""(() => {{ const s = document.querySelectorAll('.gallery select')[{which}]; s.value = "{value}";
            s.dispatchEvent(new Event("change")); }})()"""
        )
        return page.run(f"{pictures}.map(f => [f.closest('section').dataset.task, f.dataset.row ?? null])")

    wide = page.run(f"{pictures}[0].offsetWidth")
    assert {task for task, _ in choose(0, "depth")} == {"depth"}
    found = choose(1, "2")
    assert found == [["depth", None], ["depth", None], ["depth", "2"]] * 2
    assert page.run(f"{pictures}[0].offsetWidth") > wide
    choose(0, "")
    assert len(choose(1, "")) == everything


def test_of_many_tasks_the_gallery_shows_one_and_paper_all(browser, tmp_path):
    make(tmp_path, steps=4)
    shown = pictures()
    strip, legend = shown.strips[0], shown.legends["depth"]
    names = [f"task {i}" for i in range(6)]
    path = report.write(tmp_path, Gallery([replace(strip, task=name) for name in names], dict.fromkeys(names, legend)))
    browser.view(DESKTOP)
    browser.open(path)
    sections = f"[...document.querySelectorAll('.gallery section')].filter({VISIBLE}).map(s => s.dataset.task)"
    assert browser.run(sections) == names[:1]
    browser.view(PAPER, media="print")
    assert browser.run(sections) == names


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [PHONE, DESKTOP], ids=["phone", "desktop"])
def test_nothing_is_wider_than_the_screen(page, written, size, scheme):
    page.view(size, scheme)
    page.open(written[0])
    assert page.run("document.documentElement.scrollWidth") <= size[0]
    assert page.run(
        "[...document.querySelectorAll('h1, h2, h3, p, .chart, .strip, pre')]"
        ".every(e => e.getBoundingClientRect().right <= innerWidth)"
    )
    style = "getComputedStyle(document.body)"
    ground, ink = (
        sum(map(int, re.findall(r"\d+", page.run(f"{style}.{what}"))[:3])) for what in ("backgroundColor", "color")
    )
    assert (ground > ink) is (scheme == "light")


def test_paper_has_all_of_it_and_no_switches(page, written):
    page.view(PAPER, media="print")
    inside = "e => e.getBoundingClientRect().right <= innerWidth + 1"
    assert page.run(f"[...document.querySelectorAll('table, pre, figure, p')].filter(e => !({inside})(e)).length") == 0
    assert page.run(f"[...document.querySelectorAll('.rows, .switches, .live')].filter({VISIBLE}).length") == 0
    page.view(PAPER, "dark", media="print")
    assert page.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.call("Page.printToPDF", printBackground=True)["data"].startswith("JVBERi")  # %PDF
