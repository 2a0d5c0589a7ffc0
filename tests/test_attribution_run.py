"""`carv attribute` on a tiny random Wan: rankings with errors, resumable, growing."""

from __future__ import annotations

import csv
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from carv.checkpoint import RunFolderError
from carv.tasks.attribution import collect
from carv.tasks.attribution.examples import read_examples
from carv.tasks.attribution.run import load_teacher, run, summary
from carv.tasks.attribution.scores import influence

from attribution_runs import load_once, save_teacher, settings, write_clip

diffusers = pytest.importorskip("diffusers")

image = pytest.importorskip("PIL.Image")


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("wan"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Four training clips of two lengths, and a query."""
    for i in range(4):
        write_clip(tmp_path / "train" / f"clip-{i}.gif", i, 5 if i % 2 else 9)
    captions = {f"clip-{i}.gif": "a red duck" if i % 2 else "a chair" for i in range(4)}
    (tmp_path / "train" / "captions.json").write_text(json.dumps(captions))
    write_clip(tmp_path / "query" / "one.gif", 9)
    (tmp_path / "query" / "one.txt").write_text("a duck")
    return tmp_path


@pytest.fixture(autouse=True)
def _load_each_teacher_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("carv.tasks.attribution.run.load_teacher", load_once)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """Which gradients were computed, and not read."""
    found: list[tuple[str, int, int]] = []
    make = collect.Collector._make

    def spy(self: collect.Collector, example: Any, first: int, last: int) -> None:
        found.append((example.name, first, last))
        make(self, example, first, last)

    monkeypatch.setattr(collect.Collector, "_make", spy)
    return found


def test_scores_are_equation_11_of_the_gradients_at_shared_draws(teacher_folder: Path, data: Path) -> None:
    config = settings(teacher_folder, data)
    results = run(config, data / "out", quiet=True)
    collector = collect.Collector(config, load_teacher(config), data / "direct")
    train = torch.stack([collector.rows(e, 0, 8) for e in read_examples(config.train)])
    query = torch.stack([collector.rows(e, 0, 8) for e in read_examples(config.query)])
    want = influence(query, train, collector.bank.timesteps(0, 8)[1])[0]
    got = {row["example"]: row["score"] for row in results["queries"][0]["scores"]}
    assert [got[f"clip-{i}.gif"] for i in range(4)] == pytest.approx(want.tolist(), abs=1e-6)


def test_a_run_leaves_json_csv_and_pictures_that_agree(teacher_folder: Path, data: Path) -> None:
    results = run(settings(teacher_folder, data), data / "out", quiet=True)
    assert json.loads((data / "out" / "results.json").read_text()) == json.loads(json.dumps(results))
    with (data / "out" / "scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    scores = [float(row["score"]) for row in rows]
    assert scores == sorted(scores, reverse=True)
    assert [int(row["rank"]) for row in rows] == [1, 2, 3, 4]
    for row in rows:
        assert float(row["low"]) < float(row["score"]) < float(row["high"])
        assert float(row["standard_error"]) > 0
        assert int(row["rank_low"]) <= int(row["rank"]) <= int(row["rank_high"])
    query = results["queries"][0]
    assert [look["draws"] for look in query["curve"]] == [4, 8]
    for media in (query["media"], *(one["media"] for one in results["examples"] if one["media"])):
        with image.open(data / "out" / media) as shown:
            assert shown.size == (16, 16)
    text = summary(results, data / "out")
    assert "4 examples, 8 draws each" in text
    assert rows[0]["example"] in text


def test_a_larger_budget_reuses_the_draws_of_a_smaller_one(
    teacher_folder: Path, data: Path, made: list[tuple[str, int, int]]
) -> None:
    run(settings(teacher_folder, data), data / "out", quiet=True)
    made.clear()
    grown = run(settings(teacher_folder, data, draws=16), data / "out", quiet=True)
    assert {(first, last) for _, first, last in made} == {(8, 16)}
    fresh = run(settings(teacher_folder, data, draws=16), data / "fresh", quiet=True)
    assert grown["queries"][0]["scores"] == fresh["queries"][0]["scores"]


def test_another_query_and_another_clip_make_only_their_own_gradients(
    teacher_folder: Path, data: Path, made: list[tuple[str, int, int]]
) -> None:
    run(settings(teacher_folder, data), data / "out", quiet=True)
    made.clear()
    write_clip(data / "train" / "clip-9.gif", 11)
    (data / "train" / "clip-9.txt").write_text("a goose")
    results = run(settings(teacher_folder, data), data / "out", quiet=True)
    assert {name for name, *_ in made} == {"clip-9.gif"}
    assert len(results["queries"][0]["scores"]) == 5


def test_a_run_that_was_stopped_goes_on_to_the_same_numbers(
    teacher_folder: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(settings(teacher_folder, data), data / "whole", quiet=True)
    make, calls = collect.Collector._make, []

    def stopping(self: collect.Collector, example: Any, first: int, last: int) -> None:
        calls.append(example)
        if len(calls) == 7:
            raise KeyboardInterrupt
        make(self, example, first, last)

    monkeypatch.setattr(collect.Collector, "_make", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(settings(teacher_folder, data), data / "out", quiet=True)
    resumed = run(settings(teacher_folder, data), data / "out", quiet=True)
    assert resumed["queries"][0]["scores"] == whole["queries"][0]["scores"]
    assert len(calls) == 11  # 5 examples at 2 budgets, and the one that was stopped


def test_another_teacher_or_projection_is_refused_and_overwrite_starts_again(teacher_folder: Path, data: Path) -> None:
    run(settings(teacher_folder, data, draws=4), data / "out", quiet=True)
    other = settings(teacher_folder, data, draws=4, dimensions=32)
    with pytest.raises(RunFolderError, match="gradients differ"):
        run(other, data / "out", quiet=True)
    tuned = data / "tuned"
    shutil.copytree(teacher_folder, tuned)
    network = diffusers.WanTransformer3DModel.from_pretrained(tuned / "transformer")
    with torch.no_grad():
        network.proj_out.bias += 1
    network.save_pretrained(tuned / "transformer")
    with pytest.raises(RunFolderError, match="network differ"):
        run(settings(tuned, data, draws=4), data / "out", quiet=True)
    assert run(other, data / "out", overwrite=True, quiet=True)["config"]["dimensions"] == 32


def test_a_query_that_is_a_training_example_is_said_and_left_out_of_its_own_ranking(
    teacher_folder: Path, data: Path
) -> None:
    shutil.copy(data / "train" / "clip-0.gif", data / "query" / "one.gif")  # under another caption
    config = settings(teacher_folder, data, draws=4)
    results = run(config, data / "out", quiet=True)
    assert [row["example"] for row in results["queries"][0]["scores"]] != []
    assert "clip-0.gif" not in {row["example"] for row in results["queries"][0]["scores"]}
    assert results["queries"][0]["excluded"] == ["clip-0.gif"]
    assert "one.gif is also a training example" in summary(results, data / "out")
    kept = run(dataclasses.replace(config, exclude_query=False), data / "out", quiet=True)
    assert len(kept["queries"][0]["scores"]) == 4


def test_every_clip_as_query_is_leave_one_out(teacher_folder: Path, data: Path) -> None:
    config = settings(teacher_folder, data, draws=4, query=(str(data / "train"),))
    results = run(config, data / "out", quiet=True)
    assert [len(query["scores"]) for query in results["queries"]] == [3] * 4
    table = {q["name"]: {row["example"]: row["score"] for row in q["scores"]} for q in results["queries"]}
    for a in table:
        for b in table[a]:
            assert table[a][b] == pytest.approx(table[b][a], abs=1e-12)


def test_until_stable_stops_at_the_first_budget_that_suffices(teacher_folder: Path, data: Path) -> None:
    """The query is a training clip under its own caption: its influence on itself is 1 without error."""
    shutil.copy(data / "train" / "clip-0.gif", data / "query" / "one.gif")
    (data / "query" / "one.txt").write_text("a chair")
    config = settings(teacher_folder, data, draws=64, until_stable=True, exclude_query=False)
    results = run(config, data / "out", quiet=True)
    assert results["queries"][0]["scores"][0]["example"] == "clip-0.gif"
    assert results["queries"][0]["stable_at"] == results["draws"] < 64
    assert results["threshold"] == pytest.approx(1 - 0.05 / 5)


def test_at_a_fixed_budget_only_the_last_look_counts(teacher_folder: Path, data: Path) -> None:
    """Where the top is certain from the first look on, an early look would have said so without paying for it."""
    shutil.copy(data / "train" / "clip-0.gif", data / "query" / "one.gif")
    (data / "query" / "one.txt").write_text("a chair")
    results = run(settings(teacher_folder, data, exclude_query=False), data / "out", quiet=True)
    assert results["queries"][0]["stable_at"] in (8, None)
    assert results["threshold"] == pytest.approx(0.95)


def test_what_is_not_stable_yet_is_said(teacher_folder: Path, data: Path) -> None:
    config = settings(teacher_folder, data, draws=4, first=4, top_k=2, until_stable=True, level=0.999999)
    assert "1 of 1 queries are not stable yet" in summary(run(config, data / "out", quiet=True), data / "out")


def test_motion_masks_change_scores_and_still_clips_are_said(teacher_folder: Path, data: Path) -> None:
    pytest.importorskip("cv2")
    write_clip(data / "train" / "clip-0.gif", 20, still=True)
    plain = run(settings(teacher_folder, data, draws=4), data / "plain", quiet=True)
    masked = run(settings(teacher_folder, data, draws=4, masks="flow"), data / "masked", quiet=True)
    assert plain["queries"][0]["scores"] != masked["queries"][0]["scores"]
    assert "no motion was seen in clip-0.gif" in summary(masked, data / "masked")
    with pytest.raises(RunFolderError, match="masks differ"):
        run(settings(teacher_folder, data, draws=4), data / "masked", quiet=True)


def test_own_masks_are_used_and_belong_to_the_example(
    teacher_folder: Path, data: Path, made: list[tuple[str, int, int]]
) -> None:
    masks = data / "masks"
    masks.mkdir()
    for name in ("one", *(f"clip-{i}" for i in range(4))):
        save_file({"mask": torch.ones(16, 16)}, masks / f"{name}.safetensors")
    config = settings(teacher_folder, data, draws=4, masks=str(masks))
    ones = run(config, data / "ones", quiet=True)
    plain = run(settings(teacher_folder, data, draws=4), data / "plain", quiet=True)
    assert [row["score"] for row in ones["queries"][0]["scores"]] == pytest.approx(
        [row["score"] for row in plain["queries"][0]["scores"]], abs=1e-6
    )
    made.clear()
    half = torch.zeros(16, 16)
    half[:8] = 1
    save_file({"mask": half}, masks / "clip-2.safetensors")
    run(config, data / "ones", quiet=True)
    assert {name for name, *_ in made} == {"clip-2.gif"}
    (masks / "clip-3.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no mask for clip-3\.gif"):
        run(config, data / "ones", quiet=True)


def test_unnormalised_products_are_offered(teacher_folder: Path, data: Path) -> None:
    scores = run(settings(teacher_folder, data, draws=4, normalise=False), data / "out", quiet=True)["queries"][0]
    assert max(abs(row["score"]) for row in scores["scores"]) != pytest.approx(0)


def test_the_terms_of_checkpoints_are_added_by_their_rates(
    teacher_folder: Path, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    earlier = save_teacher(tmp_path_factory.mktemp("earlier"), seed=1)

    def scores(out: str, folder: Path, **changes: Any) -> dict[str, float]:
        config = settings(folder, data, draws=4, normalise=False, **changes)
        rows = run(config, data / out, quiet=True)["queries"][0]["scores"]
        return {row["example"]: row["score"] for row in rows}

    last, first = scores("last", teacher_folder), scores("first", earlier)
    both = scores("both", teacher_folder, checkpoints=(str(earlier),), rates=(1e-4, 3e-4))
    assert last != pytest.approx(first)
    assert both == pytest.approx({name: last[name] / 4 + 3 * first[name] / 4 for name in last})
    equal = scores("equal", teacher_folder, checkpoints=(str(earlier),))
    assert equal == pytest.approx({name: (last[name] + first[name]) / 2 for name in last})


def test_a_checkpoint_of_another_network_is_refused(teacher_folder: Path, data: Path) -> None:
    config = settings(teacher_folder, data, checkpoints=("small",))
    with pytest.raises(ValueError, match=r"latents of small are .* and those of"):
        run(config, data / "out", quiet=True)


@pytest.mark.parametrize("changes", [{"design": "iid"}, {"design": "global"}, {"noise": "fixed", "cells": 12}])
def test_every_design_and_noise_runs(teacher_folder: Path, data: Path, changes: dict[str, Any]) -> None:
    results = run(settings(teacher_folder, data, **changes), data / "out", quiet=True)
    assert all(row["standard_error"] > 0 for row in results["queries"][0]["scores"])


def test_antithetic_noise_and_a_proposal_run(teacher_folder: Path, data: Path) -> None:
    results = run(settings(teacher_folder, data, antithetic=True, proposal_shift=3.0), data / "out", quiet=True)
    assert all(row["standard_error"] > 0 for row in results["queries"][0]["scores"])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"train": ()}, "give --train FOLDER"),
        ({"draws": 48}, "powers of two"),
        ({"draws": 1}, "two independent draws"),
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"level": 1.5}, "level must be in"),
        ({"antithetic": True, "design": "iid", "first": 5, "draws": 10}, "must be even"),
        ({"proposal_shift": -1.0}, "proposal_shift"),
        ({"rates": (1.0, 1.0)}, "got 2 for 0 checkpoints"),
        ({"rates": (0.0,)}, "above 0"),
    ],
)
def test_bad_settings_are_one_sentence(data: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        settings(data, data, **changes)


def test_bad_files_are_one_sentence_and_lose_nothing(teacher_folder: Path, data: Path) -> None:
    good = run(settings(teacher_folder, data, draws=4), data / "out", quiet=True)
    (data / "train" / "torn.gif").write_bytes((data / "train" / "clip-0.gif").read_bytes()[:60])
    (data / "train" / "torn.txt").write_text("a duck")
    with pytest.raises(ValueError, match=r"torn\.gif"):
        run(settings(teacher_folder, data, draws=4), data / "out", quiet=True)
    (data / "train" / "torn.gif").unlink()
    assert run(settings(teacher_folder, data, draws=4), data / "out", quiet=True)["queries"] == good["queries"]
    with pytest.raises(ValueError, match="none, flow or a folder"):
        run(settings(teacher_folder, data, masks="nowhere"), data / "out", quiet=True)
    only = (str(data / "train" / "clip-0.gif"),)
    with pytest.raises(ValueError, match="nothing to rank"):
        run(settings(teacher_folder, data, train=only, query=only), data / "out", quiet=True)
