"""`carv distill`, `carv pilot distill` and `carv attribute` as users type them, on the teachers that ship with carv."""

import csv
import json

import pytest

from carv.world.clips import make_clips, write_clips
from command_line import carv


@pytest.fixture(scope="module")
def distilled(tmp_path_factory):
    out = tmp_path_factory.mktemp("distilled")
    said = carv(
        "distill", "--out", out, "--steps", 2, "--fake-steps", 1, "--renders", 2, "--generator.renoise", 2,
        "--generator.coupling", "per-render", "--samples", 200,
    )  # fmt: skip
    assert said.returncode == 0, said.stderr
    return out, said


def test_a_distillation_leaves_its_generator_its_history_and_a_sheet(distilled):
    out, said = distilled
    last = json.loads((out / "history.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 2
    assert last["frechet"] > 0
    assert last["frechet_error"] > 0
    assert (out / "generator" / "config.json").exists()
    assert (out / "samples.png").stat().st_size > 1000
    assert json.loads((out / "metrics.json").read_text())["config"]["generator"]["renoise"] == 2
    assert "frechet" in said.stdout
    assert str(out) in said.stdout


def test_the_same_distillation_again_does_nothing_and_another_is_refused(distilled):
    out, _ = distilled
    same = ("--steps", 2, "--fake-steps", 1, "--renders", 2, "--generator.renoise", 2, "--samples", 200)
    coupled = ("--generator.coupling", "per-render")
    again = carv("distill", "--out", out, *same, *coupled, "--json")
    assert again.returncode == 0
    assert json.loads(again.stdout)["steps"] == 2
    other = carv("distill", "--out", out, *same)
    assert other.returncode == 2
    assert "other settings" in other.stderr
    assert other.stderr.count("\n") == 1


def test_a_pilot_of_a_distillation_says_where_its_variance_comes_from(distilled, tmp_path):
    out, _ = distilled
    said = carv(
        "pilot", "distill", "--run", out, "--out", tmp_path, "--renders", 6, "--bins", 4, "--repetitions", 6,
        "--no-antithetic",
    )  # fmt: skip
    assert said.returncode == 0, said.stderr
    assert json.loads((tmp_path / "pilot.json").read_text())["problem"] == {
        "task": "distill", "t_min": 20, "t_max": 980, "run": str(out),
    }  # fmt: skip


def test_a_pilot_of_a_distillation_without_a_run_gets_one_sentence(tmp_path):
    said = carv("pilot", "distill", "--out", tmp_path)
    assert said.returncode == 2
    assert "give --run" in said.stderr
    assert said.stderr.count("\n") == 1


def test_an_attribution_ranks_clips_with_errors_and_makes_its_page(tmp_path):
    write_clips(make_clips(3, 0, lengths=(9,)), tmp_path / "clips")
    write_clips(make_clips(1, 1, lengths=(9,)), tmp_path / "query")
    out = tmp_path / "out"
    same = ("--train", tmp_path / "clips", "--query", tmp_path / "query", "--frames", 9, "--top-k", 1, "--out", out)
    said = carv("attribute", *same, "--draws", 4, "--first", 4)
    assert said.returncode == 0, said.stderr
    with (out / "scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3
    assert sorted(int(row["rank"]) for row in rows) == [1, 2, 3]
    assert all(float(row["low"]) < float(row["score"]) < float(row["high"]) for row in rows)
    page = (out / "index.html").read_text()
    assert "<html" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    more = carv("attribute", *same, "--draws", 8, "--first", 4, "--json")
    assert more.returncode == 0, more.stderr
    assert json.loads(more.stdout)["config"]["draws"] == 8
