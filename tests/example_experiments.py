"""Experiments to save and to show: one that asks a question, one that would do harm, and any at all."""

import dataclasses
import struct

from hypothesis import strategies as st

from carv.report.experiment import Chart, Curve, Experiment, Figure, Table

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
