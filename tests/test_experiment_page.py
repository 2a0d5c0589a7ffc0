"""Experiments on the report's page: all that their records say, every chart drawn, and no harm done."""

import base64
import dataclasses
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings

from carv.problems import ProblemConfig
from carv.report import findings, markdown, page
from carv.report.experiment import Chart, Curve, Experiment, Figure, Table
from carv.report.plates import chart as chart_plate
from carv.report.style import legend_columns
from carv.report.summary import summary
from carv.runs.cell import Cell, StopConfig, run_cell
from carv.variance.advice import Design

from example_experiments import ASKED, CHART, HOSTILE, drawings, full, hostile, left_in, png


def rendered(*folders):
    return page.render(findings.load(folders))


class Elements(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_data(self, data):
        self.text += data

    def of(self, tag, name):
        return [value for at, known, value in self.attributes if (at, known) == (tag, name)]


# The page


@pytest.fixture(scope="module")
def one_page(tmp_path_factory):
    return rendered(left_in(tmp_path_factory.mktemp("one"), full()))


def test_a_page_of_one_experiment_says_all_that_its_record_does(one_page):
    elements = Elements(one_page)
    for text in ("Table 1", ASKED.question, ASKED.setting, ASKED.finding, "ECM over K", "2.26(10)", "paper's", "2.63"):
        assert text in elements.text.replace("\u00a0", " ")
    assert "Bars: 95\u00a0% interval over prompts" in elements.text
    assert "carv report: Table 1" in one_page
    for text in ("teacher", "[0, 1]", "threads"):
        assert f"<dt>{text}</dt>" in one_page or f"<dd>{text}</dd>" in one_page
    assert "Variance report" not in one_page
    assert "nav" not in elements.tags


def test_ours_and_the_papers_are_told_apart_by_ear_and_eye(one_page):
    assert '2.26(10)<small><span class="heard">, paper\'s </span>2.63</small>' in re.sub(r"\s*\n\s*", "", one_page)
    assert re.search(r'class="corner">ours<small>paper\'s</small>', one_page)
    assert "Above: ours, with its standard error in the last digits; below it: the paper's." in one_page


def test_a_table_without_the_papers_figures_is_not_headed_by_them(tmp_path):
    table = Table("t", ("a",), {"r": (Figure(1.0, 0.1),)})
    text = rendered(left_in(tmp_path, full(tables=(table,))))
    assert "Above: ours" not in text
    assert '<td class="corner"></td>' in text


def test_a_chart_has_words_for_ears_and_a_table_of_its_points(one_page):
    elements = Elements(one_page)
    assert elements.of("svg", "aria-label") == ["ECM over K, drawn: ECM (seconds) against K, for uniform, strata."]
    table = one_page[one_page.index("<summary>Numbers") :]
    cells = re.findall("<td>(.*?)</td>", table[: table.index("</table>")])
    assert cells[:8] == ["uniform", "1", "1", "1 (exact)", "uniform", "8", "2.26", "2.06 to 2.46"]
    assert cells[8:] == ["strata", "1", "1", "", "strata", "8", "2.5", ""]


def test_pictures_are_in_the_page_and_the_policy_allows_no_others(one_page, tmp_path):
    elements = Elements(one_page)
    [source] = elements.of("img", "src")
    head, _, data = source.partition(",")
    assert head == "data:image/png;base64"
    assert base64.b64decode(data) == png()
    assert (elements.of("img", "alt"), elements.of("img", "width")) == (["Samples"], ["3"])
    assert "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri" in one_page
    assert "img-src" not in rendered(left_in(tmp_path, full(pictures={})))


def test_more_than_three_experiments_have_a_list_of_links(tmp_path):
    folders = [left_in(tmp_path / f"e{i}", dataclasses.replace(ASKED, name=f"Figure {i}")) for i in range(4)]
    assert "nav" not in Elements(rendered(*folders[:3])).tags
    text = rendered(*folders)
    elements = Elements(text)
    links = elements.of("a", "href")
    assert links == ["#e0", "#e1", "#e2", "#e3"]
    assert {link[1:] for link in links} <= set(elements.of("section", "id"))
    assert "carv report: Figure 0; Figure 1; Figure 2; and 1 more</title>" in text


def test_text_of_strangers_is_shown_as_it_is_written_and_runs_nothing(tmp_path):
    text = rendered(left_in(tmp_path, hostile()))
    elements = Elements(text)
    assert not {"script", "iframe", "object", "link", "form"} & set(elements.tags)
    assert not [name for _, name, _ in elements.attributes if name.startswith("on")]
    assert elements.tags.count("img") == 1
    assert elements.tags.count("svg") == text.count("</svg>") == 1
    assert HOSTILE not in text
    fields = ("name", "question", "setting", "finding", "title", "column", "row", "chart", "x", "y", "curve", "band")
    for what in (*fields, "caption", "key", "part", "version"):
        assert f"{HOSTILE} {what}" in elements.text, what
    assert "onerror=alert(1)> '\\\"|" in elements.text  # of config, as JSON
    drawing = text[text.index("<svg") : text.index("</svg>")]
    assert "\u200b_a" in drawing
    assert drawing.count("<text") == drawing.count("</text>")
    assert "font: 9px " in drawing


def test_an_experiment_and_cells_of_a_sweep_share_a_folder_and_a_page(tmp_path):
    measured = run_cell(
        Cell(ProblemConfig("toy"), Design(1, 2, "weight", "per-render"), 3, StopConfig("fixed", cap=100))
    )
    (left_in(tmp_path, full()) / "records.jsonl").write_text(json.dumps(measured) + "\n")
    found = findings.load([tmp_path])
    assert (len(found.experiments), len(found.studies)) == (1, 1)
    text = page.render(found)
    assert "Variance report" in text
    assert text.index('id="e0"') < text.index('id="s0"')
    assert "carv report: Table 1; toy</title>" in text


def test_a_phone_needs_no_sideways_scrolling(tmp_path):
    """A table of 20 columns and a picture of 2,000 pixels, in a frame of 360 with all details unfolded."""
    program = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
    if program is None:
        pytest.skip("no chromium here to open the page with")
    wide = Table("wide", tuple(f"column {i}" for i in range(20)), {"a row": (Figure(1.5, 0.1, 2.0),) * 20})
    folders = [left_in(tmp_path / f"e{i}", full(tables=(wide,)), png(2000, 10)) for i in range(4)]
    (tmp_path / "page.html").write_text(rendered(*folders))
    harness = tmp_path / "harness.html"
    harness.write_text(
        """<iframe id="f" src="page.html" width="360" height="800"></iframe><pre id="o"></pre><script>f.onload = () => {
        const d = f.contentDocument
        d.querySelectorAll("details").forEach(x => x.open = true)
        const wide = [...d.querySelectorAll("svg, img")].filter(x => x.getBoundingClientRect().right > 360).length
        o.textContent = JSON.stringify([d.documentElement.scrollWidth, wide])}</script>"""
    )
    flags = ("--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile")
    flags += ("--allow-file-access-from-files", "--dump-dom")
    found = subprocess.run([program, *flags, harness.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    width, beyond = json.loads(re.search(r'<pre id="o">(.*?)</pre>', found.stdout)[1])
    assert width <= 360
    assert beyond == 0


def test_the_summary_holds_the_record_and_where_it_is(tmp_path):
    found = findings.load([left_in(tmp_path, full())])
    [made] = json.loads(json.dumps(summary(found), allow_nan=False))["experiments"]
    assert made.pop("folder") == str(tmp_path)
    assert made["tables"][0]["rows"]["uniform"][1] == {"value": 2.2612, "error": 0.102, "paper": 2.63}
    assert made.keys() == {one.name for one in dataclasses.fields(Experiment)}


def test_the_same_experiments_make_the_same_page_and_markdown(tmp_path, one_page):
    left_in(tmp_path, full())
    assert markdown.markdown([Experiment.load(tmp_path)]) == markdown.markdown([full()])
    assert rendered(tmp_path) == one_page


# Charts


@pytest.mark.parametrize(
    "curve",
    [
        Curve((1.0,), (1.0,), (0.5,), (2.0,)),
        Curve((3.0, 3.5), (1.0, 1.0)),
        Curve((1e-100, 1e100), (1e-100, 1e100)),
        Curve((1e-100, 1.0), (1.0, 1.0)),
        Curve((1.0, 1.0), (2.0, 2.0), (-1e100, 0.0), (1e100, 2.0)),
        Curve(tuple(2.0**i for i in range(30)), (1.0,) * 30, (-1.0,) * 30, (3.0,) * 30),
    ],
)
@pytest.mark.parametrize("log", [False, True])
def test_every_curve_can_be_drawn(curve, log):
    chart = Chart("t", "x", "y", {"a": curve, "b": curve}, "a band", log, log)
    assert chart_plate.plate(chart, "k").svg.startswith("<svg")


@settings(max_examples=5)
@given(drawings)
def test_every_chart_can_be_drawn(chart):
    assert chart_plate.plate(chart, "k").table.rows


def test_powers_of_two_are_written_on_a_logarithmic_axis():
    svg = chart_plate.plate(CHART, "k").svg
    assert [f">{tick}</text>" in svg for tick in (1, 2, 4, 8, 3, 6)] == [True] * 4 + [False] * 2


def test_bands_of_many_points_are_bands_and_of_few_are_bars():
    def caption(points):
        x = tuple(map(float, range(points)))
        return chart_plate.plate(Chart("t", "x", "y", {"a": Curve(x, x, x, x)}, "a band."), "k").caption

    assert caption(12) == "Bars: a band."
    assert caption(13) == "Bands: a band."
    assert chart_plate.plate(Chart("t", "x", "y", {"a": Curve((1.0,), (1.0,))}), "k").caption == ""


def test_a_legend_has_as_many_columns_as_fit():
    assert legend_columns(["uniform", "IW", "Strat"]) == 3
    assert legend_columns(["a" * 22] * 4) == 2
    assert legend_columns(["a" * 23] * 4) == 1
    assert legend_columns(["a" * 60, "b"]) == 1
    assert legend_columns(["a" * 24, "b", "c" * 24, "d"]) == 1
    assert legend_columns([]) == 1
