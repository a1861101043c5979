"""Test the page of made-up runs, parsed and in a browser."""

import math
import re
import shutil
import subprocess
from collections import Counter
from html.parser import HTMLParser

import matplotlib
import numpy as np
import pytest
from matplotlib.image import imread

from helpers.made_up_runs import LABELS, record, study, words
from lalora_app.reports.charts import all_charts as all_charts
from lalora_app.reports.page import to_html, write_report

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
QUIET = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
    *("--enable-logging=stderr", "--v=0"),
)


class Balanced(HTMLParser):
    """Fails where a tag is closed that is not open; collects what the page refers to."""

    VOID = ("meta", "link", "br")

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.links, self.tags = [], [], [], Counter()

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        self.ids += [value for key, value in attrs if key == "id"]
        self.links += [value for key, value in attrs if key in ("href", "src", "xlink:href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def parsed(page: str) -> Balanced:
    found = Balanced()
    found.feed(page)
    found.close()
    assert found.open == []
    return found


@pytest.fixture(scope="module")
def comparison() -> str:
    partition = {"labels": ["ham", "spam"], "clients": [[30, 5]] * 4}
    runs = study(error=0.2, partition=partition, config={"output": "/secret/place"})
    runs[0].config["train.lr-a"] = 7.25
    return to_html(runs, "Three methods")


def test_a_comparison_has_a_panel_for_each_epsilon_and_a_legend_in_each(comparison):
    sections = re.findall(r"<section.*?<h3>(.*?)</h3>(.*?)</section>", comparison, re.S)
    found = {title: re.findall(r"<svg.*?</svg>", body, re.S) for title, body in sections}
    assert {title: len(panels) for title, panels in found.items()} == {
        "Scores by privacy budget": 2,
        "Accuracy by round": 2,
        "Balanced accuracy by round": 2,
        "Accuracy by upload": 2,
        "Accuracy by ε spent": 1,
        "Aggregation error by round": 2,
        "Examples per client": 1,
    }
    for panel, title in zip(found["Accuracy by round"], ("ε = 1", "ε = inf"), strict=True):
        assert set(words(panel)) >= {title, "round", "accuracy %", *LABELS}
    assert (
        "Not shown: runs with ε = inf (la-lora, rolora, dp-lora); they have no finite ε."
        in comparison
    )


def test_a_comparison_is_one_page_that_fetches_nothing(comparison):
    found = parsed(comparison)
    assert found.tags["svg"] == 2 * 4 + 1 + 2 + 1
    assert (
        found.tags["script"]
        == found.tags["iframe"]
        == found.tags["style"] - found.tags["svg"] - 1
        == 0
    )
    assert max(Counter(found.ids).values()) == 1
    assert all(link.startswith(("#", "data:")) for link in found.links)
    assert {link[1:] for link in found.links if link.startswith("#")} <= set(found.ids)
    assert not re.search(r"url\((?!#)|@import", comparison)


def test_a_comparison_says_what_it_is_and_what_is_not_private(comparison):
    assert "18 runs of la-lora, rolora, dp-lora" in comparison
    assert "at ε = 1, inf, seeds 0, 1, 2" in comparison
    assert "by 4 clients" in comparison
    assert "with ε = 1 and δ = 1e-05" in comparison
    assert comparison.count("<strong>NOT private.</strong>") == 1
    assert comparison.count('<span class="tag">NOT private</span>') == 3  # the rows of ε = inf


def test_settings_that_differ_are_told_from_common_ones(comparison):
    common, differing = comparison.split("Where they differ")
    assert "<dt>lora.rank</dt><dd>8</dd>" in common
    assert "<dt>seed</dt><dd>0, 1, 2</dd>" in common
    assert "train.lr-a</th>" in differing
    assert "<td>7.25, 2.0</td>" in differing
    assert "la-lora at ε = 1: the runs of this mean differ in train.lr-a." in comparison
    assert "/secret/place" not in comparison


def test_the_same_runs_make_the_same_page_whatever_matplotlib_is_set_to():
    before = dict(matplotlib.rcParams)
    page = to_html([record()], "one")
    assert dict(matplotlib.rcParams) == before
    with matplotlib.rc_context({"axes.facecolor": "red", "svg.fonttype": "path", "font.size": 30}):
        assert to_html([record()], "one") == page


def test_a_single_run_is_a_page_too(tmp_path):
    write_report([record(failed=(2,))], tmp_path / "report.html", "la-lora, ε = 3")
    page = (tmp_path / "report.html").read_text("utf-8")
    assert parsed(page).tags["svg"] == 4
    assert "One run of la-lora at ε = 3, seed 0" in page
    assert "la-lora at ε = 3: rounds failed, 1 of 4 (seed 0)." in page
    assert "All settings" in page
    assert "Where they differ" not in page
    assert "NOT private" not in page


@pytest.mark.parametrize(
    ("epsilon", "config", "reason"),
    [
        (math.inf, {}, "no noise was added"),
        (3.0, {"privacy.noise": "seeded"}, "privacy.noise is seeded"),
    ],
)
def test_a_run_that_is_not_private_says_so_and_promises_nothing(epsilon, config, reason):
    page = to_html([record(epsilon=epsilon, config=config)], "one")
    assert f"<strong>NOT private.</strong> la-lora at ε = {epsilon:g}: {reason}" in page
    assert "differential privacy with" not in page


def test_texts_of_configs_and_labels_are_escaped():
    evil = "<script>alert('x')</script>"
    run = record(label=evil, config={"model.name": evil, "data.name": evil})
    found = parsed(page := to_html([run, record()], evil))
    assert found.tags["script"] == 0
    assert page.count("&lt;script&gt;") >= 4


def test_a_seed_that_was_run_twice_is_noted():
    assert "the same seed was run more than once" in to_html([record(), record()], "twice")


def test_a_report_of_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="at least one run"):
        write_report([], tmp_path / "report.html", "none")


def browse(page, tmp_path, width, *options) -> subprocess.CompletedProcess:
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    size = f"--window-size={width},3000"
    command = [CHROMIUM, *QUIET, profile, size, *options, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=180, check=True)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH to open the report with")
def test_a_browser_shows_the_report_without_errors_and_without_overflow(comparison, tmp_path):
    page, shot = tmp_path / "report.html", tmp_path / "report.png"
    page.write_text(comparison, "utf-8")
    seen = browse(page, tmp_path, 1280, f"--screenshot={shot}")
    assert "CONSOLE" not in seen.stderr
    picture = imread(shot)
    assert picture.shape[1] == 1280
    assert all(part.std() > 0.01 for part in np.array_split(picture[..., :3], 6))

    # A copy with a script tells its width; that its message is seen shows that errors would be.
    script = (
        "<script>const d = document.documentElement; d.dataset.over = d.scrollWidth - innerWidth;"
        "d.dataset.hidden = Math.max(...[...document.querySelectorAll('.scroll')]"
        ".map(s => s.scrollWidth - s.clientWidth)); console.error('probe')</script></body>"
    )
    page.write_text(comparison.replace("</body>", script), "utf-8")
    for width in (1280, 500):
        probed = browse(page, tmp_path, width, "--dump-dom")
        assert "CONSOLE" in probed.stderr
        assert int(re.search(r'data-over="(-?\d+)"', probed.stdout)[1]) <= 0
        hidden = int(re.search(r'data-hidden="(-?\d+)"', probed.stdout)[1])
        assert hidden <= 0 if width == 1280 else hidden > 0  # a phone scrolls the table
