"""``report.html`` as people see it: curves, tables, and a browser if there is one."""

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from archnet.config import Config
from archnet.report import comparison, write
from archnet.report.chart import Line, Mark, lines_chart, marks_chart
from archnet.report.files import by_stage, curves, evaluation, trend
from archnet.runs import RunFolder, write_json
from test_verdict import changed

Make = Callable[..., Config]
BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))),
    None,
)
LAYERS = [
    {"layer": f"block{n}.conv", "operators": "Convolution", "weight_bits": 4, "act_bits": 4,
     "macs": macs, "bops": 16 * macs, "cycles": macs / 9, "weight_bytes": 10 * n,
     "tap": f"block{n}", "error_before": 0.5 / (n + 1), "error_after": 0.1 * n}
    for n, macs in enumerate([900, 90_000, 9_000])
]  # fmt: skip
PIXEL = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="
)
DETAILS: dict[str, Any] = {
    "classes": ["cat", "dog"],
    "usage": "import numpy as np\nprint(np.zeros(1) < 1)\n",
    "confusion": {"rows": "label", "counts": [[40, 2], [1, 57]]},
    "disagreeing": 3,
    "disagreements": [
        {"index": n, "picture": PIXEL, "label": 0, "teacher": 0, "student": 1} for n in range(3)
    ],
}


@pytest.fixture
def folder(make_config: Make) -> Path:
    """A run folder with every table; ten taps in one stage."""
    made = RunFolder.create(make_config())
    versions = {"archnet": "0", "python": "3"}
    write_json(made.metrics, changed() | {"versions": versions})
    write_json(made.path / "layers.json", LAYERS)
    write_json(made.path / "evaluation.json", DETAILS)
    log = made.path / "logs" / "csv" / "000" / "metrics.csv"
    log.parent.mkdir(parents=True)
    names = ["loss/b0/b0", "val/agreement", *(f"loss/joint/b{n}" for n in range(10))]
    rows = [["step", *names]]
    for step in range(10, 60, 10):
        early = step <= 20
        rows.append(
            [str(step), "0.5" if early else "", str(80 + step / 10)]
            + ["" if early else str(0.1 * (n + 1)) for n in range(10)]
        )
    log.write_text("\n".join(map(",".join, rows)) + "\n")
    return made.path


def test_the_verdict_comes_first_and_nothing_from_outside(folder: Path) -> None:
    page = write(folder).read_text()
    body = page.partition("<body>")[2]
    assert body.index('id="verdict"') < body.index("<table")
    assert "fewer bits may do" in body
    assert "import numpy as np\nprint(np.zeros(1) &lt; 1)\n" in page
    for outside in ("src=", 'href="http', "@import", "url("):
        assert outside not in page
    write_json(folder / "metrics.json", changed(cost__on_target__student=9999) | {"versions": {}})
    assert '<section class="verdict bad"' in write(folder).read_text()


def test_curves_stay_in_their_stage_and_have_at_most_eight_colours(folder: Path) -> None:
    found = by_stage(curves(folder))
    assert list(found) == ["b0", "joint"]
    assert found["b0"] == {"b0": [(10, 0.5), (20, 0.5)]}
    assert trend(curves(folder)) == pytest.approx(2.0)
    page = write(folder).read_text()
    charts = re.findall(r"<svg viewBox.*?</svg>", page, re.S)
    joint = next(chart for chart in charts if chart.count("data-line") == 10)
    assert joint.count(" hidden") == 2
    assert "2 more, of lower loss" in page
    # Those of the highest loss are shown.
    assert re.findall(r"<title>(.*?)</title>", joint)[0] == "b9"


@pytest.mark.parametrize(
    "damage",
    [
        {"disagreements": [{"index": "x"}]}, {"confusion": {"rows": "label", "counts": [[1], [2]]}},
        {"classes": [1]}, {"usage": 7}, {"by_length": [{"words": "many"}]}, {"disagreeing": None},
        {"disagreements": [{"index": 1, "label": -1}]},
    ],
)  # fmt: skip
def test_damaged_details_are_left_out(
    damage: dict[str, Any], folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_json(folder / "evaluation.json", DETAILS | damage)
    assert evaluation(folder) == {}
    assert f"{next(iter(damage))} is not what a run writes there" in caplog.text
    assert "Where they disagree" not in write(folder).read_text()


def test_names_are_text_in_every_page(folder: Path) -> None:
    odd = "<script>alert(1)</script>"
    write_json(folder / "layers.json", [LAYERS[0] | {"layer": odd, "tap": odd}])
    sentences = {"index": 0, "source": odd, "reference": odd, "teacher": odd, "student": odd}
    details = {**DETAILS, "classes": [odd, odd], "disagreements": [sentences]}
    write_json(folder / "evaluation.json", details)
    page = write(folder).read_text()
    assert odd not in page
    assert page.count("&lt;script&gt;alert(1)") >= 6


def test_charts_take_whatever_numbers_there_are() -> None:
    assert lines_chart([], "x", "y") == marks_chart([], "x", "y") == ""
    assert lines_chart([Line("a", [(1, 0.0), (2, float("nan"))])], "x", "y") == ""
    for points in ([(1, 1e-9)], [(1, 5.0), (1, 5.0)], [(0, 1e-30), (10**9, 1e30)]):
        assert "NaN" not in lines_chart([Line("<a>", points)], "x", "y")
        assert "nan" not in marks_chart([Mark("<a>", *points[0])], "x", "y")


PROBE = """
<script>
const headings = [...document.querySelectorAll("#layers th")];
const heading = headings.find((one) => /MACs/.test(one.textContent));
const first = () => document.querySelector("#layers tbody tr").cells[0].textContent;
const seen = [];
for (let i = 0; i < 2; i++) { heading.querySelector("button").click(); seen.push(first()); }
document.querySelector(".legend input").click();
document.title = JSON.stringify({
  seen, sort: heading.getAttribute("aria-sort"),
  verdict: document.querySelector("#verdict").getBoundingClientRect().top,
  wider: document.documentElement.scrollWidth - innerWidth,
  hidden: document.querySelectorAll("svg .hidden").length,
});
</script>
"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
@pytest.mark.parametrize("width", [400, 1280])
def test_a_browser_shows_the_verdict_and_sorts_the_table(
    width: int, folder: Path, tmp_path: Path
) -> None:
    page = write(folder).read_text().replace("</body>", PROBE + "</body>")
    (folder / "probed.html").write_text(page)
    command = [str(BROWSER), "--headless=new", "--no-sandbox", "--disable-gpu", "--dump-dom",
               f"--user-data-dir={tmp_path}/browser", "--enable-logging=stderr",
               f"--window-size={width},900", f"file://{folder}/probed.html"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert "CONSOLE" not in done.stderr, done.stderr
    title = re.search(r"<title>(\{.*?\})</title>", done.stdout)
    assert title, done.stderr[-2000:]
    found = json.loads(title[1])
    assert found["seen"] == ["block1.conv", "block0.conv"]
    assert found["sort"] == "ascending"
    assert found["verdict"] < 300
    assert found["wider"] <= 0
    assert found["hidden"] == 3


def test_the_comparison_is_sorted_by_the_same_script(folder: Path, tmp_path: Path) -> None:
    (page, *_) = comparison.write(comparison.compare([folder]), tmp_path)
    assert 'class="sortable' in page.read_text()
