"""The page of `carv attribute`: queries beside their examples, and nothing that a stranger's files could do to it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from carv.report import attribution
from carv.tasks.attribution.run import run
from carv.variance.values import Value

from attribution_runs import load_once, save_teacher, settings, write_clip


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("wan"))


@pytest.fixture(autouse=True)
def _load_each_teacher_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("carv.tasks.attribution.run.load_teacher", load_once)


@pytest.fixture(scope="module")
def page(teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """Of a run whose names and captions are markup."""
    pytest.importorskip("jinja2")
    folder = tmp_path_factory.mktemp("page")
    for i in range(3):
        write_clip(folder / "train" / f"<b>{i}.gif", i)
        (folder / "train" / f"<b>{i}.txt").write_text("<script>")
    config = settings(teacher_folder, folder, query=(str(folder / "train"),))
    run(config, folder / "out", quiet=True)
    path = attribution.write(folder / "out")
    return path.read_text(), folder / "out"


def test_the_page_shows_queries_beside_their_examples_and_loads_nothing(page: tuple[str, Path]) -> None:
    text, _ = page
    assert text.count('<section class="study" id="q') == 3
    assert text.count("data:image/gif;base64,") == 3 + 2 * 3  # each query, its most and its least influential clip
    assert "http:" not in text.replace("http://www.w3.org/", "")
    assert "https:" not in text
    assert "<script" not in text
    assert "<b>" not in text
    assert "&lt;script&gt;" in text
    assert "default-src 'none'" in text


def test_the_page_says_scores_with_errors_ranks_with_intervals_and_how_sure_the_top_is(page: tuple[str, Path]) -> None:
    text, out = page
    results = json.loads((out / "results.json").read_text())
    for query in results["queries"]:
        best = query["scores"][0]
        assert str(Value(best["score"], best["standard_error"])) in text
        assert f"({best['rank_low']} to {best['rank_high']})" in text
    assert "the top 1 is right" in text
    assert "P(top 1 right)" in text


def test_the_same_results_make_the_same_page(page: tuple[str, Path]) -> None:
    text, out = page
    assert attribution.write(out).read_text() == text


def test_pictures_that_are_gone_large_or_outside_the_folder_are_not_shown(
    page: tuple[str, Path], tmp_path: Path
) -> None:
    _, out = page
    results = json.loads((out / "results.json").read_text())
    (tmp_path / "in" / "media").mkdir(parents=True)
    (tmp_path / "secret.gif").write_bytes(b"GIF89a secret")
    (tmp_path / "in" / "media" / "text.gif").write_bytes(b"no picture")
    (tmp_path / "in" / "media" / "page.html").write_bytes(b"GIF8")
    for query, media in zip(results["queries"], ("../secret.gif", "media/text.gif", "media/page.html"), strict=True):
        query["media"] = media
    for example in results["examples"]:
        example["media"] = "media/gone.gif"
    (tmp_path / "in" / "results.json").write_text(json.dumps(results))
    assert "data:image" not in attribution.write(tmp_path / "in").read_text()


@pytest.mark.parametrize(
    ("content", "says"),
    [(None, "holds no results.json"), ("{", "damaged"), ('{"kind": "pilot"}', "not of an attribution")],
)
def test_a_folder_of_something_else_is_one_sentence(tmp_path: Path, content: str | None, says: str) -> None:
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    with pytest.raises(ValueError, match=says):
        attribution.write(tmp_path)


def test_results_of_another_version_are_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text('{"kind": "attribution", "config": {}}')
    with pytest.raises(ValueError, match="not of this version"):
        attribution.write(tmp_path)
