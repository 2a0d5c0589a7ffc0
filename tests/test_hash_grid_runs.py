"""Text-to-3D with the hash-grid field: resumed, opened level by level, and set from the command line."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
import tyro

from carv.checkpoint import load_checkpoint, save_checkpoint
from carv.gradient import Renders
from carv.rng import stream
from carv.schedule import NoiseSchedule
from carv.tasks.sds.config import EstimatorConfig, SDSConfig
from carv.tasks.sds.export import write_mesh
from carv.tasks.sds.hash_grid import PAPER, HashGridConfig, HashGridField
from carv.tasks.sds.train import Trainer
from carv.teachers.exact import ExactTeacher
from carv.variance.vjp import batched_task_pull_back, jacobian_sketch
from carv.world.cameras import PAPER_RANGE, WORLD_RANGE
from carv.world.dataset import load_world

SMALL = HashGridConfig(levels=3, log2_entries=6, coarsest=3, finest=7, width=5, open_levels=3)
"""Levels of 3, 4 and 7 cells: the first has an entry for each of its 64 vertices, the others share 64."""


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    world = load_world(size=16, views=16, cache_dir=tmp_path_factory.mktemp("world"))
    return ExactTeacher(world.images_float(), NoiseSchedule.scaled_linear(), world.mask, bandwidth=0.1)


def small_run(**changes) -> SDSConfig:
    grid = HashGridConfig(levels=4, log2_entries=10, coarsest=4, finest=12, width=8, open_levels=2, open_after=0)
    grid = dataclasses.replace(grid, open_every=2)
    given = {"teacher": "world", "steps": 6, "samples": 6, "size": 16, "field": "hash", "hash_grid": grid} | changes
    return SDSConfig("a red chair", EstimatorConfig(renoise=4), **given)


def test_a_resumed_run_is_bit_for_bit_the_run_that_never_stopped(teacher, tmp_path):
    """It stops at step 3, between the openings of level 3 (step 2) and level 4 (step 4)."""
    config = small_run()
    whole, first, second = (Trainer(config, teacher) for _ in range(3))
    for _ in range(6):
        whole.step()
    for _ in range(3):
        first.step()
    assert first.field.encoding.open_levels == 3
    save_checkpoint(tmp_path, first.state_dict(), config.to_json())
    second.load_state_dict(load_checkpoint(tmp_path, config.to_json()))
    assert second.field.encoding.open_levels == 3, "what is exported from a checkpoint has the levels of its step"
    for _ in range(3):
        second.step()
    before, after = whole.state_dict(), second.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert {f"adam.{i}.exp_avg" for i in range(8)} <= before.keys()


def test_all_that_is_open_is_trained_and_all_that_is_closed_is_left(teacher):
    trainer = Trainer(small_run(), teacher)
    before = {name: value.clone() for name, value in trainer.field.state_dict().items()}
    for _ in range(2):  # the background's first layers move once its last one is not 0
        trainer.step()
    after = trainer.field.state_dict()
    assert [name for name in before if torch.equal(before[name], after[name])] == []
    closed = trainer.field.encoding.levels[2].first
    table = "encoding.table"
    assert torch.equal(before[table][:, closed:], after[table][:, closed:])


def test_rates_are_those_of_the_settings_and_decay_alike(teacher):
    trainer = Trainer(small_run(steps=2), teacher)
    rates = []
    for _ in range(2):
        trainer.step()
        rates.append([group["lr"] for group in trainer.optimiser.param_groups])
    assert rates[0] == [0.01, 1e-4]
    assert rates[1] == pytest.approx([0.55 * 0.01, 0.55 * 1e-4])


def test_gradients_of_many_draws_are_batched_and_can_be_sketched(teacher):
    trainer = Trainer(small_run(), teacher)
    trainer.step()
    task = trainer.task
    state = task.upstream(Renders((stream(0),), 0, 1))
    f = torch.randn(5, *state.z.shape, generator=rng())
    found = batched_task_pull_back(task, state, f)
    expected = torch.stack([torch.cat([g.flatten() for g in task.pull_back(state, one, True)]) for one in f])
    assert not found.looped
    torch.testing.assert_close(found.matrix(), expected, rtol=1e-4, atol=1e-4)
    probes = tuple(torch.randn((3, *p.shape), generator=rng(1)) for p in task.parameters)
    sketch = jacobian_sketch(state.z, tuple(task.parameters), probes)
    directions = torch.cat([part.flatten(1) for part in probes], 1)
    torch.testing.assert_close(f.flatten(1) @ sketch.flatten(1).T, expected @ directions.T, rtol=1e-3, atol=1e-2)


def test_the_mesh_of_a_new_field_is_its_blob(tmp_path):
    """20 softplus(-6 r) = 10 at r = 0.072."""
    import trimesh

    faces = write_mesh(tmp_path / "mesh.glb", HashGridField(HashGridConfig(), 8, stream(0)), 64)
    mesh = trimesh.load(tmp_path / "mesh.glb", force="mesh")
    assert len(mesh.faces) == faces > 20
    radius = math.log(math.exp(0.5) - 1) / -6
    assert abs(mesh.vertices).max() == pytest.approx(radius, abs=0.02)


def test_settings_survive_json_and_those_of_before_the_hash_grid_can_be_read():
    config = small_run(cameras="paper")
    assert SDSConfig.from_json(config.to_json()) == config
    old = json.loads(SDSConfig("a red chair").to_json())
    for name in ("field", "hash_grid", "cameras"):
        del old[name]
    assert SDSConfig.from_json(json.dumps(old)) == SDSConfig("a red chair", field="voxel")


def test_the_command_line_reaches_the_papers_field_and_cameras():
    args = ["a red chair", "--field", "hash", "--cameras", "paper"]
    for name, value in dataclasses.asdict(PAPER).items():
        if name != "learn_background":
            args += [f"--{name.replace('_', '-')}", str(value)]
    config = tyro.cli(SDSConfig, args=args, config=(tyro.conf.OmitArgPrefixes,))
    assert config.hash_grid == PAPER
    assert isinstance(dataclasses.replace(config, hash_grid=SMALL).build_field(), HashGridField)
    assert config.camera_range is PAPER_RANGE
    assert SDSConfig("a red chair").camera_range is WORLD_RANGE


BAD_SETTINGS = [
    ({"levels": 0}, "levels must be at least 1, got 0"),
    ({"open_every": 0}, "open_every must be at least 1"),
    ({"log2_entries": 25}, "log2_entries must be at most 24"),
    ({"coarsest": 16, "finest": 8}, "finest must be at least coarsest, got 8 and 16"),
    ({"levels": 2, "open_levels": 3}, "open_levels must be at most levels = 2, got 3"),
    ({"open_after": -1}, "open_after must not be negative"),
]


@pytest.mark.parametrize(("settings", "message"), BAD_SETTINGS)
def test_impossible_settings_get_one_clear_sentence(settings, message):
    with pytest.raises(ValueError, match=message):
        HashGridConfig(**settings)
