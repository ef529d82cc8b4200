"""report.html: complete, escaped, in need of nothing; and it opens in a browser where one is installed."""

import html.parser
import re
import shutil
import subprocess

import numpy as np
import pandas as pd
import pytest

from sparsereg.calibration import CalibrationProblem
from sparsereg.calibration.findings import Finding
from sparsereg.calibration.measures import measure
from sparsereg.calibration.reporting import tables
from sparsereg.calibration.reporting.page.page import _MOST_TARGETS, Contents, render
from sparsereg.calibration.weight_table import weight_frame
from tests.calibration.command.test_run import SMALL, run

EVIL = "<script>document.title='EVIL'</script>\"'><img src=http://evil.example/x onerror=alert(1)>"
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Page(html.parser.HTMLParser):
    """Every element with its attributes, the texts, and whether what is opened is closed."""

    VOID = ("meta", "img", "input", "br", "link")

    def __init__(self, text):
        super().__init__()
        self.elements, self.texts, self.open = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag

    def handle_data(self, data):
        self.texts.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def contents(name="total", group="g", id="h", num_targets=3, kept=None, **others):
    rng = np.random.default_rng(0)
    names = tuple(f"{name} {i}" for i in range(num_targets))
    problem = CalibrationProblem(
        rng.random((num_targets, 8)), rng.random(num_targets) * 5, rng.random(8) + 1, target_names=names,
        target_groups=np.array([f"{group} {i % 2}" for i in range(num_targets)]),
        ids=np.array([f"{id} {i}" for i in range(8)]),
    )  # fmt: skip
    weights = problem.starting_weights * rng.random(8) * 3 if kept is None else np.asarray(kept, float)
    targets = tables.target_frame(problem, weights, rng.random(num_targets))
    targets["price"] = targets.multiplier
    provenance = {
        "started": "2026-01-02T03:04:05+00:00", "machine": "m",
        "command": f"calibrate.py problem.targets={name}",
        "versions": {"sparsereg": "1", "python": "3"},
        "inputs": [{"key": "problem.targets", "path": name, "bytes": 1, "sha256": "0" * 64}],
    }  # fmt: skip
    told = {"method": "all", "required": [], "holdout": None, "bounds_hit": 0, "provenance": provenance}
    values = {
        "results": measure(problem, weights) | told,
        "settings": {"method": "all", "problem": {"targets": name}},
        "targets": targets,
        "groups": tables.group_frame(targets, problem, weights),
        "weights": weight_frame(problem, weights),
        "initial_weights": problem.starting_weights,
    }
    return Contents(**values | others)


def evil():
    return contents(
        EVIL, EVIL, EVIL,
        findings=[Finding("tiny", 0, EVIL, EVIL)],
        holdout=pd.DataFrame(
            [{"fold": 0, "group": EVIL, "targets": 1, "initial_mean_are": 0.1, "mean_are": 0.2,
              "median_are": 0.2, "large_mean_are": None, "fitted_mean_are": 0.0, "fitted_median_are": 0.0}]
        ),
        bystanders=pd.DataFrame(
            {"name": [EVIL], "statistic": ["total"], "initial": [1.0], "estimate": [2.0], "targeted": [False]}
        ),
        estimates=pd.DataFrame({"name": [EVIL], "se": [1.0]}),
    )  # fmt: skip


def test_nothing_from_data_becomes_markup():
    page = Page(render(evil()))
    assert page.open == []
    assert len(page.all("script")) == 1
    assert {image["src"].partition(",")[0] for image in page.all("img")} == {"data:image/svg+xml;base64"}
    assert not [a for _, attributes in page.elements for a in attributes if a.startswith("on")]
    shown = "".join(page.texts)
    assert shown.count(EVIL) >= 10  # as text, whole


def test_the_page_speaks_of_the_units_of_the_survey():
    c = contents()
    problem = {"targets": "T.csv", "unit_names": ("company", "$employee")}
    text = render(Contents(**{**vars(c), "settings": {"method": "all", "problem": problem}}))
    shown = " ".join(Page(text).texts)
    assert "Companies kept" in shown
    assert "all companies stay" in shown
    assert "household" not in shown.lower().replace("num_households", "").replace("problem=households", "")
    strange = {**problem, "unit_names": ("$<b>\\frac", "p")}
    assert Page(render(Contents(**{**vars(c), "settings": {"problem": strange}}))).open == []


def test_the_page_refers_to_nothing_outside_and_allows_nothing():
    page = Page(render(evil()))
    for tag, attributes in page.elements:
        for name in ("src", "href", "action", "srcset", "poster", "data"):
            assert attributes.get(name, "#").startswith(("#", "data:image/svg+xml;base64,")), (tag, name)
    anchors = {a["href"][1:] for a in page.all("a")}
    assert anchors <= {attributes.get("id") for _, attributes in page.elements}
    assert "link" not in {tag for tag, _ in page.elements}
    styles = re.findall(r"<style>(.*?)</style>", render(contents()), re.S)
    assert styles
    assert not re.search(r"@import|url\(|https?:", "".join(styles))
    policy = next(m["content"] for m in page.all("meta") if "http-equiv" in m)
    assert policy.startswith("default-src 'none'")
    assert "script-src 'sha256-" in policy


def test_a_page_says_what_was_required_and_what_was_missed():
    judged = [
        {"key": "ess", "figure": "ess", "limit": 9.0, "reached": 5.5, "met": False, "text": "ess is 5.5"},
        {"key": "max_error", "figure": "max_abs_scaled_error", "limit": 9.0, "reached": 5.0, "met": True,
         "text": ""},
    ]  # fmt: skip
    c = contents()
    text = render(Contents(**{**vars(c), "results": {**c.results, "required": judged}}))
    assert "Requirements: 1 of 2 missed" in text
    assert text.count("✗ missed") == text.count("✓ met") == 1
    assert "<li>ess is 5.5</li>" in text


def test_long_tables_show_the_worst_and_the_dearest_and_say_so():
    c = contents(num_targets=_MOST_TARGETS + 200)
    c.targets["scaled_error"] = np.linspace(0, 1, len(c.targets))
    c.targets["price"] = np.linspace(1, 0, len(c.targets))
    text = render(c)
    assert (
        f"The {_MOST_TARGETS} targets with the largest errors or prices; all 1,700 are in targets.csv" in text
    )
    for shown in ("total 1699", "total 0"):
        assert f'<td class="text name">{shown}</td>' in text
    assert '<td class="text name">total 850</td>' not in text


@pytest.mark.costly
@pytest.mark.parametrize("kept", [[0, 0, 3, 0, 0, 0, 0, 0], [1.0] * 8, [-1, 2, 1, 1, 1, 1, 1, 1]])
@pytest.mark.parametrize("num_targets", [1, 3])
def test_unusual_weights_have_a_page_too(kept, num_targets):
    assert Page(render(contents(num_targets=num_targets, kept=kept))).open == []


def test_households_of_a_group_are_counted_once():
    matrix = np.array([[1.0, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 1]])
    groups = np.array(["a", "a", "b"])
    problem = CalibrationProblem(matrix, np.ones(3), target_groups=groups)
    weights = np.array([2.0, 1, 0, 3])
    targets = tables.target_frame(problem, weights)
    assert targets.households.tolist() == [2, 1, 1]
    assert targets.ess.tolist() == [9 / 5, 1, 1]
    frame = tables.group_frame(targets, problem, weights)
    assert frame.households.tolist() == [2, 1]
    assert frame.ess.tolist() == [9 / 5, 1]


def test_every_run_has_its_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder, results = run(*SMALL, "num_households=null", "method=calibrate")
    text = (folder / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    sections = {a.get("id") for a in page.all("section")}
    assert sections >= {
        "asked",
        "reached",
        "groups",
        "targets",
        "weights",
        "heldout",
        "findings",
        "provenance",
    }
    targets = pd.read_csv(folder / "targets.csv")
    assert set(targets.name) <= {t.strip() for t in page.texts}
    assert f"weighting effect {results['weighting_effect']:.2f}" in text


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
def test_a_browser_shows_the_page_sorts_it_and_runs_nothing_else(tmp_path):
    file = tmp_path / "report.html"
    c = evil()
    press = "for (const b of document.querySelectorAll('#table-of-targets th button')) b.click();"
    done = "document.title = [...document.querySelectorAll('#table-of-targets tbody tr')].map(r => "
    done += "r.cells[r.cells.length - 1].dataset.v).join(' ');"
    # The page's policy lets only its own script run: the test adds to it where it is made.
    from sparsereg.page import page as module

    folder = tmp_path / "template"
    shutil.copytree(module._HERE, folder)
    with (folder / "page.js").open("a") as script:
        script.write(press + done)
    before, module._HERE = module._HERE, folder
    try:
        file.write_text(render(c), encoding="utf-8")
    finally:
        module._HERE = before
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--dump-dom")
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    shown = subprocess.run([BROWSER, *flags, profile, file.as_uri()], capture_output=True, timeout=120)
    dom = shown.stdout.decode()
    title = re.search(r"<title>(.*?)</title>", dom, re.S).group(1)
    numbers = [float(v) for v in title.split()]
    assert numbers == sorted(numbers, reverse=True)
    assert len(numbers) == 3
