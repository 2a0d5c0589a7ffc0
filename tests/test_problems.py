import dataclasses

import pytest
import torch

from carv.checkpoint import save_checkpoint
from carv.commands.pilot import PilotConfig, run_pilot
from carv.density import uniform_steps
from carv.problems import Problem, ProblemConfig, load_problem, load_source
from carv.rng import stream
from carv.runs.pilot_folder import PilotRecord
from carv.tasks.sds.config import SDSConfig
from carv.tasks.sds.train import Trainer, world_teacher
from carv.tasks.toy import GaussianToy
from carv.variance.advice import Design
from carv.variance.predict import predict

MODULE = """
import carv
from carv.problems import Problem
from carv.tasks.toy import GaussianToy

class Mine(GaussianToy):
    base = carv.uniform_steps(100, 300)

ready = GaussianToy(dim=3)

def factory():
    return GaussianToy(dim=5)

def problem():
    toy = GaussianToy()
    return Problem.of(toy, carv.uniform_steps(1, 9), proposals={"own": carv.uniform_steps(1, 9)})

def one_estimate(at):
    return ready.theta

number = 3
"""


@pytest.fixture
def module(tmp_path, monkeypatch, request):
    """A user's module in the working folder; its name is new for every test, as modules are imported once."""
    name = f"users_{abs(hash(request.node.name))}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    return name


def test_the_toy_has_the_usual_proposals_and_gives_estimates():
    problem = load_problem(ProblemConfig("toy"))
    assert list(problem.proposals) == ["uniform", "weight", "defensive"]
    estimator = problem.estimator(Design(2, 4, "defensive", "nested"))
    assert torch.isfinite(estimator.estimate(problem.task, stream(0)).gradient[0]).all()


@pytest.mark.parametrize(("field", "names"), [("proposal", "uniform, weight"), ("coupling", "per-render")])
def test_an_unknown_proposal_or_coupling_is_refused_with_the_known_ones(field, names):
    design = dataclasses.replace(Design(1, 1, "uniform", "iid"), **{field: "best"})
    with pytest.raises(ValueError, match=f"no {field} 'best'.*{names}"):
        load_problem(ProblemConfig("toy")).estimator(design)


def test_a_users_pipeline_is_found_by_module_and_object(module):
    mine = load_problem(ProblemConfig(f"{module}:Mine"))
    assert (mine.base.low, mine.base.high) == (100, 300)
    assert "weight" in mine.proposals
    assert load_problem(ProblemConfig(f"{module}:ready")).task.latent_shape == (3,)
    assert load_problem(ProblemConfig(f"{module}:factory", t_max=500)).base.high == 500
    assert list(load_problem(ProblemConfig(f"{module}:problem")).proposals) == ["uniform", "own"]
    assert mine.fingerprint["module"]


def test_a_function_of_a_stream_is_an_estimator_and_no_pipeline(module):
    config = ProblemConfig(f"{module}:one_estimate")
    assert not isinstance(load_source(config), Problem)
    with pytest.raises(ValueError, match="returns single estimates"):
        load_problem(config)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("toys", "unknown task 'toys'; use toy, sds, distill, or module:object"),
        ("no_such_module:x", "no module 'no_such_module' here"),
        ("{module}:absent", "has no 'absent'"),
        ("{module}:number", "is a int; give an object with upstream"),
    ],
)
def test_a_task_that_is_not_there_gets_one_sentence(module, task, message):
    with pytest.raises(ValueError, match=message):
        load_problem(ProblemConfig(task.format(module=module)))


def test_settings_survive_json_and_name_only_what_the_task_has(tmp_path):
    for config in (ProblemConfig(), ProblemConfig("sds", steps=3), ProblemConfig("sds", run=tmp_path)):
        given = config.to_dict()
        assert ProblemConfig.from_dict(given).to_dict() == given
    assert "prompt" not in ProblemConfig("toy").to_dict()


def test_sds_is_measured_at_the_checkpoint_of_a_run(tmp_path):
    config = SDSConfig("a red chair", teacher="world", field="voxel", size=16, resolution=8, samples=4)
    trainer = Trainer(config, world_teacher(config))
    trainer.step()
    save_checkpoint(tmp_path, trainer.state_dict(), config.to_json())
    problem = load_problem(ProblemConfig("sds", run=tmp_path))
    assert torch.equal(problem.task.field.density, trainer.field.density)
    assert problem.fingerprint["checkpoint"]
    assert not problem.task.stratify_azimuth  # the pilot's renders are independent
    with pytest.raises(ValueError, match="holds no checkpoint"):
        load_problem(ProblemConfig("sds", run=tmp_path / "absent"))


def test_a_folder_is_loaded_once_and_anew_when_its_checkpoint_is_another(tmp_path):
    config = SDSConfig("a red chair", teacher="world", field="voxel", size=16, resolution=8, samples=4)
    trainer, found = Trainer(config, world_teacher(config)), []
    for _ in range(2):
        trainer.step()
        save_checkpoint(tmp_path, trainer.state_dict(), config.to_json())
        found.append(load_problem(ProblemConfig("sds", run=tmp_path)))
        assert load_problem(ProblemConfig("sds", run=tmp_path)) is found[-1]
        assert torch.equal(found[-1].task.field.density, trainer.field.density)
    assert found[0].fingerprint != found[1].fingerprint


def test_a_pilots_folder_gives_back_what_was_measured(tmp_path):
    record = run_pilot(ProblemConfig(), PilotConfig(renders=5, bins=4, repetitions=6), tmp_path, quiet=True)
    loaded = PilotRecord.load(tmp_path)
    for name in ("problem", "weight", "timed", "cost", "seed", "settings", "fingerprint", "provenance"):
        assert getattr(loaded, name) == getattr(record, name), name
    for name, proposal in record.proposals.items():
        before, after = (
            predict(one.tables, 2, 4, q).variance for one, q in ((record, proposal), (loaded, loaded.proposals[name]))
        )
        assert before.interval() == after.interval()


def test_a_damaged_pilot_gets_one_sentence(tmp_path):
    with pytest.raises(ValueError, match=r"holds no pilot.json: make one with `carv pilot"):
        PilotRecord.load(tmp_path)
    run_pilot(ProblemConfig(), PilotConfig(renders=5, bins=4, repetitions=6), tmp_path, quiet=True)
    (tmp_path / "tables.safetensors").write_bytes(b"not tables")
    with pytest.raises(ValueError, match="cannot be read"):
        PilotRecord.load(tmp_path)


def test_gradients_that_do_not_fit_in_memory_are_projected(tmp_path, monkeypatch):
    monkeypatch.setattr("carv.commands.pilot.MEMORY_LIMIT", 1000)
    record = run_pilot(ProblemConfig(), PilotConfig(renders=4, bins=4, repetitions=6), tmp_path, quiet=True)
    assert record.tables.block_within is not None
    exact = GaussianToy().exact(uniform_steps(20, 980))
    assert record.tables.m2.mean() == pytest.approx(float(exact.m2.mean()), rel=1.0)
