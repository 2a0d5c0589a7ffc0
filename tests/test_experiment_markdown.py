"""Experiments as text and as Markdown: the words and numbers of the page, and no markup from strangers."""

import dataclasses
import re

import pytest
from hypothesis import given

from carv.report import markdown
from carv.report.comparison import comparison, ours, paper
from carv.report.experiment import Figure, Table

from example_experiments import ASKED, TABLE, figures, full, hostile

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
