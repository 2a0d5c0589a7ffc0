"""A stage of training: killed and resumed to the same numbers, within its minutes, with averaged weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from carv.checkpoint import RunFolderError, save_checkpoint
from carv.rng import stream
from carv.training import loop
from carv.training.loop import Progress, Stage, fit, learning_rate, recent_loss
from carv.training.stages import forget

from training_runs import killed, silent

pytest.importorskip("diffusers")
pytest.importorskip("transformers")


def line_fit(steps: int, rate: float = 0.1, minutes: float = 1.0) -> Stage:
    torch.manual_seed(0)
    model = nn.Linear(3, 1)

    def loss(step: int) -> Tensor:
        x = torch.randn(8, 3, generator=stream(0, "line", step).generator())
        return ((model(x)[:, 0] - x.sum(dim=1)) ** 2).mean()

    return Stage("line", model, loss, rate, steps, minutes)


def test_a_killed_stage_goes_on_to_the_same_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, broken = line_fit(40), line_fit(40)
    straight = fit(whole, tmp_path / "a", "{}", silent)
    monkeypatch.setattr(loop, "_CHECKPOINT_SECONDS", 0.0)
    killed(monkeypatch, 17, lambda: fit(broken, tmp_path / "b", "{}", silent))
    resumed = line_fit(40)
    lines: list[str] = []
    progress = fit(resumed, tmp_path / "b", "{}", lines.append)
    assert lines[0] == "line: going on from step 17 of 40"
    assert progress.losses == straight.losses
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name])


def test_a_stage_that_is_done_is_not_trained_again(tmp_path: Path) -> None:
    first = line_fit(10)
    fit(first, tmp_path, "{}", silent)
    again = line_fit(10)
    assert fit(again, tmp_path, "{}", silent).done == 10
    assert torch.equal(first.model.weight, again.model.weight)


def test_the_minutes_decide_the_steps_once_and_a_resumed_run_keeps_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(10**6))  # three looks at the clock a step or fewer: each timed step takes one second
    monkeypatch.setattr(loop.time, "perf_counter", lambda: float(next(clock)))
    killed(monkeypatch, 1, lambda: fit(line_fit(0, minutes=2.0), tmp_path, "{}", silent))
    lines: list[str] = []
    progress = fit(line_fit(0, minutes=2.0), tmp_path, "{}", lines.append)
    assert lines[0] == "line: going on from step 25 of 120"
    assert (progress.done, progress.planned) == (120, 120)


def test_timed_steps_have_rates_that_do_not_depend_on_the_plan() -> None:
    for step in range(loop._TIMED.stop):
        assert len({learning_rate(step, planned, 0.1) for planned in (0, 30, 5000)}) == 1
    rates = [learning_rate(step, 1000, 0.1) for step in range(1000)]
    assert max(rates) == rates[99] == rates[100] == 0.1
    assert rates[-1] == pytest.approx(0.1 / 900)


def test_the_model_ends_with_the_averaged_weights(tmp_path: Path) -> None:
    stage = line_fit(300)
    progress = fit(stage, tmp_path, "{}", silent)
    assert torch.equal(stage.model.weight, progress.average["weight"])
    assert stage.model.weight.sub(1).abs().max() < 0.05  # it learned the line
    assert not stage.model.training
    assert not stage.model.weight.requires_grad


def test_another_configuration_does_not_go_on(tmp_path: Path) -> None:
    fit(line_fit(5), tmp_path, '{"seed": 0}', silent)
    with pytest.raises(RunFolderError, match="other settings"):
        fit(line_fit(5), tmp_path, '{"seed": 1}', silent)


def test_a_loss_that_is_not_finite_stops_the_stage_with_one_sentence(tmp_path: Path) -> None:
    stage = line_fit(5)
    broken = Stage("line", stage.model, lambda step: stage.loss(step) / 0, 0.1, 5, 1.0)
    with pytest.raises(ValueError, match="loss of the line is inf at step 0; lower its learning rate"):
        fit(broken, tmp_path, "{}", silent)
    assert not (tmp_path / "line").exists()


def test_the_recent_loss_has_the_standard_error_of_its_mean() -> None:
    mean, error = recent_loss([9.0, 1.0, 2.0, 3.0], count=3)
    assert (mean, error) == (2.0, pytest.approx(1 / 3**0.5))


def test_a_stage_says_its_minutes_and_the_loss_at_its_end() -> None:
    losses = [9.0] * 50 + [1.0, 3.0] * 100
    found = Progress(250, 250, losses, 90.0, {}).facts(8)
    assert (found["steps"], found["batch"], found["minutes"], found["loss"]) == (250, 8, 1.5, 2.0)
    assert found["loss_standard_error"] == pytest.approx(1 / 200**0.5, rel=0.01)


def test_forgetting_deletes_the_named_checkpoints_and_nothing_else(tmp_path: Path) -> None:
    for name in ("old", "kept"):
        save_checkpoint(tmp_path / name, {"x": torch.zeros(1)}, "{}")
    (tmp_path / "old" / "notes.txt").write_text("mine")
    forget(tmp_path, ("old", "never made"))
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()) == [
        "kept/checkpoint.safetensors",
        "old/notes.txt",
    ]
