"""Experiments as records: what is refused, what the page and the Markdown say of them, and that none does harm."""

import base64
import dataclasses
import json
import math
import re
import shutil
import struct
import subprocess
import tempfile
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from carv.problems import ProblemConfig
from carv.report import findings, markdown, page
from carv.report.comparison import comparison, ours, paper
from carv.report.experiment import EXPERIMENT, Chart, Curve, Experiment, Figure, Table
from carv.report.pictures import MOST_BYTES
from carv.report.plates import chart as chart_plate
from carv.report.style import legend_columns
from carv.report.summary import summary
from carv.runs.cell import Cell, StopConfig, run_cell
from carv.variance.advice import Design

HOSTILE = (
    '</td></svg><script>document.title="run"</script><img src=x onerror=alert(1)> \'"|$x_1$`*_font: 1px x; url(#a)'
)
ROWS = {"uniform": (Figure(1.0, None, 1.0), Figure(2.2612, 0.102, 2.63)), "strata": (Figure(None), Figure(3.0, 0.0))}
TABLE = Table("ECM over K", ("K = 1", "K = 8"), ROWS)
CURVES = {"uniform": Curve((1.0, 8.0), (1.0, 2.26), (1.0, 2.06), (1.0, 2.46)), "strata": Curve((1.0, 8.0), (1.0, 2.5))}
CHART = Chart("ECM over K, drawn", "K", "ECM (seconds)", CURVES, "95 % interval over prompts", log_x=True)
ASKED = Experiment("Table 1", "What does re-use save?", "5 prompts x 2 seeds.", "Ours peaks at K = 8, as the paper's.")


def png(width=3, height=2, name=b"IHDR", signature=b"\x89PNG\r\n\x1a\n"):
    return signature + struct.pack(">I4sII", 13, name, width, height) + b"\x08\x02\0\0\0 pixels"


def full(**changed):
    kept = {"config": {"seeds": [0, 1], "teacher": "small"}, "provenance": {"carv": "0", "threads": 1}}
    made = {"tables": (TABLE,), "charts": (CHART,), "pictures": {"Samples": "samples.png"}, **kept, **changed}
    return dataclasses.replace(ASKED, **made)


def left_in(folder, experiment, picture=None):
    experiment.save(folder)
    for name in experiment.pictures.values():
        (folder / name).write_bytes(png() if picture is None else picture)
    return folder


def changed_json(folder, change):
    path = left_in(folder, full()) / EXPERIMENT
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))
    return folder


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


# The record

words = st.text(st.characters(exclude_categories=("Cc", "Cs")), min_size=1, max_size=8).filter(str.strip)
numbers = st.floats(-1e100, 1e100)
positive = st.floats(1e-9, 1e9)
figures = st.builds(Figure, numbers, st.none() | st.floats(0, 1e100), st.none() | numbers) | st.just(
    Figure(None, None, 2.0)
)


@st.composite
def tables(draw):
    columns = tuple(draw(st.lists(words, min_size=1, max_size=3)))
    row = st.tuples(*[figures] * len(columns))
    return Table(draw(words), columns, draw(st.dictionaries(words, row, min_size=1, max_size=3)))


@st.composite
def curves(draw):
    points = draw(st.lists(st.tuples(positive, positive, positive, positive), min_size=1, max_size=4))
    x, y, a, b = zip(*points, strict=True)
    ends = (tuple(map(min, a, b)), tuple(map(max, a, b))) if draw(st.booleans()) else ((), ())
    return Curve(x, y, *ends)


drawings = st.builds(
    Chart,
    words,
    words,
    words,
    st.dictionaries(words, curves(), min_size=1, max_size=3),
    words,
    st.booleans(),
    st.booleans(),
)
plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | numbers | words,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(words, inner, max_size=2),
    max_leaves=4,
)
experiments = st.builds(
    Experiment,
    *[words] * 4,
    tables=st.lists(tables(), max_size=2).map(tuple),
    charts=st.lists(drawings, max_size=2).map(tuple),
    pictures=st.dictionaries(words, st.sampled_from(["a.png", "b c.png"]), max_size=2),
    config=st.dictionaries(words, plain, max_size=2),
    provenance=st.dictionaries(words, plain, max_size=2),
)


@settings(max_examples=30)
@given(experiments)
def test_what_is_saved_is_what_is_loaded(experiment):
    with tempfile.TemporaryDirectory() as folder:
        loaded = Experiment.load(left_in(Path(folder), experiment))
        assert loaded == experiment
        orders = [[list(one.rows) for one in each.tables] for each in (loaded, experiment)]
        assert orders[0] == orders[1]


def test_settings_are_kept_as_json_has_them():
    experiment = full(config={"seeds": (0, 1), "limit": math.inf, "deep": {"lost": math.nan}})
    assert experiment.config == {"seeds": [0, 1], "limit": None, "deep": {"lost": None}}


def test_numbers_of_numpy_are_kept_as_numbers():
    figure = Figure(np.float32(0.5), np.float64(0.25), np.int64(2))
    assert [type(one) for one in dataclasses.astuple(figure)] == [float] * 3
    assert Curve(tuple(np.arange(3)), tuple(np.ones(3, dtype=np.float32))).x == (0.0, 1.0, 2.0)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Figure(math.nan), "a figure is a finite number of at most 1e\\+100, got nan: write None"),
        (lambda: Figure(1.0, math.inf), "a standard error is a finite number"),
        (lambda: Figure(1.0, None, math.nan), "the paper's figure is a finite number"),
        (lambda: Figure(10**400), "a figure is a finite number"),
        (lambda: Figure(True), "a figure is a number, got True"),
        (lambda: Figure("1"), "a figure is a number, got '1'"),
        (lambda: Figure(1.0, -0.1), "a standard error is at least 0"),
        (lambda: Figure(None, 0.1), "belongs to a figure"),
        (
            lambda: Table("t", ("a", "b"), {"r": (Figure(1.0),)}),
            "the table 't': the row 'r' has 1 figures for 2 columns",
        ),
        (lambda: Table("t", (), {"r": ()}), "a table has columns and rows"),
        (lambda: Table("t", ("a",), {}), "a table has columns and rows"),
        (lambda: Table("", ("a",), {"r": (Figure(1.0),)}), "the title of a table must not be empty"),
        (lambda: Curve((), ()), "a curve has points"),
        (lambda: Curve((1.0,), (1.0, 2.0)), "as many x as y"),
        (lambda: Curve((1.0,), (1.0,), (0.0,)), "as many x as y"),
        (lambda: Curve((1.0,), (1.0,), (), (2.0,)), "as many x as y"),
        (lambda: Curve((1.0,), (math.nan,)), "a point's y is a finite number.*leave the point out"),
        (lambda: Curve((1.0,), (1.0,), (2.0,), (1.0,)), "from low to high, got 2 to 1"),
        (lambda: dataclasses.replace(CHART, curves={}), "a chart has curves"),
        (lambda: dataclasses.replace(CHART, band=""), "has bands|have bands: say in `band`"),
        (
            lambda: Chart("t", "x", "y", {"c": Curve((0.0,), (1.0,))}, log_x=True),
            "x is at least 1e-100, but the curve 'c' has 0",
        ),
        (lambda: Chart("t", "x", "y", {"c": Curve((1.0,), (-1.0,))}, log_y=True), "y is at least 1e-100"),
        (lambda: Chart("t", "x", "y", {"c": Curve((1.0,), (5e-324,))}, log_y=True), "y is at least 1e-100"),
        (lambda: full(name=" "), "the name of an experiment must not be empty"),
        (lambda: full(finding="red\x1b[31m"), "control character"),
        (lambda: full(finding="half \ud800"), "surrogate"),
        (lambda: full(config={"out": Path("x")}), "config holds something that JSON does not have"),
        (lambda: full(config={"a": "\ud800"}), "config holds something that JSON does not have"),
        (lambda: full(provenance=[]), "provenance maps names to settings"),
    ],
)
def test_what_no_page_could_show_is_refused_in_a_sentence(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def nested(levels):
    return {"a": nested(levels - 1)} if levels else 1


def put(*path, value):
    def change(record):
        *inner, last = path
        for name in inner:
            record = record[name]
        record[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (put("kind", value="pilot"), "it is not an experiment's record"),
        (put("format", value=2), "it has format 2, this version reads 1"),
        (put("colour", value="red"), "a record has 'colour', which this version does not know"),
        (lambda record: record.pop("finding"), "a record lacks finding"),
        (put("name", value=None), "the name of an experiment is text, got None"),
        (put("tables", value={}), "tables is a list, got dict"),
        (put("tables", 0, "rows", value=[]), "the rows of table 1 maps names"),
        (put("tables", 0, "rows", "uniform", 1, value=3), "table 1, row 'uniform': a figure has the names"),
        (put("tables", 0, "rows", "uniform", 1, "value", value="3"), "table 1, row 'uniform': a figure is a number"),
        (put("tables", 0, "rows", "uniform", value=[]), "the row 'uniform' has 0 figures for 2 columns"),
        (put("charts", 0, "curves", "uniform", "x", value=[1]), "chart 1, curve 'uniform': a curve has points"),
        (put("charts", 0, "curves", "uniform", "y", value="12"), "y is a list"),
        (put("charts", 0, "log_x", value=1), "log_x is true or false"),
        (put("charts", 0, "colour", value=1), "chart 1 has 'colour', which"),
        (put("pictures", value=["samples.png"]), "map captions to names"),
        (put("pictures", "Samples", value=3), "a picture is text"),
        (put("config", value=nested(40)), "config is nested more than 16 deep"),
    ],
)
def test_a_damaged_record_is_one_sentence_that_names_the_file_and_the_place(tmp_path, change, said):
    with pytest.raises(
        ValueError, match=f"experiment.json cannot be read \\(.*{said}.*\\); run its script again"
    ) as told:
        Experiment.load(changed_json(tmp_path, change))
    assert len(str(told.value)) < 700
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"kind": "experiment", "format": 1}', b"1" * 5000],
)
def test_a_file_that_is_something_else_is_one_sentence(tmp_path, content):
    (tmp_path / EXPERIMENT).write_bytes(content)
    with pytest.raises(ValueError, match="cannot be read"):
        Experiment.load(tmp_path)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999", "true"])
def test_json_that_is_not_a_finite_number_is_refused(tmp_path, number):
    path = left_in(tmp_path, full()) / EXPERIMENT
    path.write_text(path.read_text().replace("2.63", number))
    with pytest.raises(ValueError, match="the paper's figure is a"):
        Experiment.load(tmp_path)


def test_a_folder_without_a_record_says_who_leaves_one(tmp_path):
    with pytest.raises(ValueError, match=r"holds no experiment\.json"):
        Experiment.load(tmp_path)


def test_a_record_of_more_than_20_mb_is_not_read(tmp_path):
    (tmp_path / EXPERIMENT).write_bytes(b" " * 20_000_001)
    with pytest.raises(ValueError, match="larger than 20 MB"):
        Experiment.load(tmp_path)


# Pictures


@pytest.mark.parametrize(
    "name",
    [
        "../a.png",
        "/a.png",
        "b/a.png",
        "..\\a.png",
        "C:a.png",
        ".a.png",
        "..",
        "a.svg",
        "a.png\0",
        "a" * 300 + ".png",
        "",
    ],
)
def test_a_picture_is_a_plain_name_in_the_folder(tmp_path, name):
    (tmp_path / "a.png").write_bytes(png())
    with pytest.raises(ValueError, match=r"plain name|must not be empty|control character"):
        full(pictures={"Samples": name})
    with pytest.raises(ValueError, match=r"plain name|must not be empty|control character"):
        Experiment.load(changed_json(tmp_path / "b", put("pictures", "Samples", value=name)))


def test_a_link_out_of_the_folder_is_not_followed(tmp_path):
    (tmp_path / "secret.png").write_bytes(png())
    folder = left_in(tmp_path / "here", full())
    (folder / "samples.png").unlink()
    (folder / "samples.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(ValueError, match="a link out of the folder"):
        Experiment.load(folder)


def test_a_folder_that_is_itself_a_link_is_read(tmp_path):
    left_in(tmp_path / "here", full())
    (tmp_path / "there").symlink_to(tmp_path / "here")
    assert Experiment.load(tmp_path / "there") == full()


@pytest.mark.parametrize(
    ("picture", "said"),
    [
        (b"", "is no PNG"),
        (b"<svg onload=alert(1)>" + b" " * 30, "is no PNG"),
        (png(signature=b"\x89PNG\r\n\n\n"), "is no PNG"),
        (png(name=b"IDAT"), "is no PNG"),
        (png(width=0), "has 0 x 2 pixels"),
        (png(2**31, 2**31), "has 2147483648 x 2147483648 pixels, allowed are"),
        (png() + b"\0" * MOST_BYTES, "is larger than 5 MB"),
    ],
    ids=["empty", "svg", "signature", "chunk", "no-pixels", "bomb", "large"],
)
def test_a_picture_that_is_no_reasonable_png_is_refused(tmp_path, picture, said):
    with pytest.raises(ValueError, match=f"the picture samples.png {said}"):
        Experiment.load(left_in(tmp_path, full(), picture))


def test_a_missing_picture_is_named(tmp_path):
    (left_in(tmp_path, full()) / "samples.png").unlink()
    with pytest.raises(ValueError, match=r"the picture samples\.png is not there"):
        Experiment.load(tmp_path)


# Figures as text


@pytest.mark.parametrize(
    ("figure", "text"),
    [
        (Figure(2.6312, 0.081, 2.63), "2.63(8) 2.63"),
        (Figure(1.0, None, 1.0), "1 1"),
        (Figure(0.123456), "0.1235 "),
        (Figure(1.0, 0.0), "1 (exact) "),
        (Figure(None, None, 3.29), "\u2013 3.29"),
        (Figure(1920.0), "1920 "),
    ],
)
def test_a_figure_is_written_with_its_error_beside_the_papers(figure, text):
    assert f"{ours(figure)} {paper(figure)}" == text


@given(figures)
def test_every_figure_can_be_written(figure):
    assert not re.search("nan|inf", ours(figure) + paper(figure))


def test_a_table_says_how_it_is_read():
    made = comparison(TABLE)
    assert made.beside_paper
    assert made.note == "\u2013: not measured."
    alone = comparison(Table("t", ("a",), {"r": (Figure(1.0, 0.1),)}))
    assert (alone.beside_paper, alone.note) == (False, "")


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


def hostile():
    figures, points = (Figure(1.0, 0.1, 2.0),), Curve((1.0, 2.0), (1.0, 2.0), (0.5, 1.0), (2.0, 3.0))
    return Experiment(
        *[f"{HOSTILE} {what}" for what in ("name", "question", "setting", "finding")],
        tables=(Table(f"{HOSTILE} title", (f"{HOSTILE} column",), {f"{HOSTILE} row": figures}),),
        charts=(
            Chart(
                f"{HOSTILE} chart",
                f"{HOSTILE} x",
                f"{HOSTILE} y",
                {f"{HOSTILE} curve": points, "_a": points, "font: 9px b": points},
                f"{HOSTILE} band",
            ),
        ),
        pictures={f"{HOSTILE} caption": "a.png"},
        config={f"{HOSTILE} key": [f"{HOSTILE} value"]},
        provenance={f"{HOSTILE} part": f"{HOSTILE} version"},
    )


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


# Markdown


def test_markdown_has_the_same_words_and_numbers_as_the_page(tmp_path):
    text = markdown.markdown([full()])
    lines = text.splitlines()
    assert lines[0] == "## Table 1"
    assert ASKED.question in lines
    assert f"**{ASKED.finding}**" in lines
    assert ASKED.setting in lines
    assert "| ours (paper's) | K = 1 | K = 8 |" in lines
    assert "| uniform | 1 (paper 1) | 2.26(10) (paper 2.63) |" in lines
    assert "| strata | \u2013 | 3 (exact) |" in lines
    assert "| uniform | 1 | 2.26 (2.06 to 2.46) |" in lines
    markdown.write([full()], tmp_path / "part.md")
    assert (tmp_path / "part.md").read_text() == text
    with pytest.raises(ValueError, match="none of the folders holds one"):
        markdown.write([], tmp_path / "part.md")


def test_text_of_strangers_is_no_markdown_and_no_html():
    text = markdown.markdown([hostile()])
    for mark in "<>`*$|":
        bare = [line for line in text.splitlines() if re.search(rf"(?<!\\){re.escape(mark)}", line.strip("|* "))]
        assert mark in "|*" or not bare, mark
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows[:3]} == {3}


def test_no_line_of_a_paragraph_begins_a_list_or_a_heading():
    words = " ".join(["word"] * 23)  # 114 letters, so that the next word begins a line
    for start in ("- item", "# head", "1. item", "1) item", "=== ===", "+ item", "* item"):
        for text in (start, f"{words} longest {start}"):
            made = markdown.markdown([dataclasses.replace(ASKED, question=text)])
            assert not re.search(r"^\s*([-+*=] |#{1,6} (?!Table 1)|\d+[.)] |===)", made, flags=re.MULTILINE), text


def test_names_with_underscores_stay_readable():
    text = markdown.markdown([dataclasses.replace(ASKED, setting="c_upstream _is_ q ~ p w & 2 * 3 &lt;")])
    assert "c_upstream \\_is\\_ q ~ p w & 2 * 3 \\&lt;" in text


def test_the_same_experiments_make_the_same_page_and_markdown(tmp_path, one_page):
    left_in(tmp_path, full())
    assert markdown.markdown([Experiment.load(tmp_path)]) == markdown.markdown([full()])
    assert rendered(tmp_path) == one_page
