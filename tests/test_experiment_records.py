"""Experiments as records: what is saved is loaded, and what no page could show is refused in a sentence."""

import dataclasses
import json
import math
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings

from carv.report.experiment import EXPERIMENT, Chart, Curve, Experiment, Figure, Table
from carv.report.pictures import MOST_BYTES

from example_experiments import CHART, experiments, full, left_in, png


def changed_json(folder, change):
    path = left_in(folder, full()) / EXPERIMENT
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))
    return folder


# The record


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
