"""carv.schedule against every diffusers scheduler that states its forward process."""

from __future__ import annotations

import json
from typing import Any

import diffusers
import pytest
import torch

from carv.schedule import NoiseSchedule

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}

DISCRETE: list[tuple[str, dict[str, Any]]] = [
    ("DDPMScheduler", {}),
    ("DDIMScheduler", {}),
    ("DDIMInverseScheduler", {}),
    ("PNDMScheduler", {}),
    ("LMSDiscreteScheduler", {}),
    ("EulerDiscreteScheduler", {}),
    ("EulerAncestralDiscreteScheduler", {}),
    ("HeunDiscreteScheduler", {}),
    ("KDPM2DiscreteScheduler", {}),
    ("KDPM2AncestralDiscreteScheduler", {}),
    ("DPMSolverMultistepScheduler", {}),
    ("DPMSolverMultistepInverseScheduler", {}),
    ("DPMSolverSinglestepScheduler", {}),
    ("UniPCMultistepScheduler", {}),
    ("SASolverScheduler", {}),
    ("DEISMultistepScheduler", {}),
    ("DDPMParallelScheduler", {}),
    ("DDIMParallelScheduler", {}),
    ("LCMScheduler", {}),
    ("TCDScheduler", {}),
    ("UnCLIPScheduler", {}),
    ("CogVideoXDDIMScheduler", {}),
    ("CogVideoXDPMScheduler", {}),
    ("CogVideoXDDIMScheduler", {"snr_shift_scale": 1.0, "rescale_betas_zero_snr": True}),
    ("PNDMScheduler", {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}),
    ("DDPMScheduler", {"beta_schedule": "squaredcos_cap_v2"}),
    ("DDPMScheduler", {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 37}),
    ("DDPMScheduler", {"beta_schedule": "laplace"}),
    ("DDPMScheduler", {"beta_schedule": "sigmoid"}),
    ("HeunDiscreteScheduler", {"beta_schedule": "exp"}),
    ("DDPMScheduler", {"trained_betas": [0.1, 0.2, 0.4], "num_train_timesteps": 3}),
    ("DDPMScheduler", {"trained_betas": [0.1, 0.2, 0.4]}),  # diffusers leaves num_train_timesteps at 1000
    ("DDIMScheduler", {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}),
    ("EulerDiscreteScheduler", {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}),
    ("UniPCMultistepScheduler", {"rescale_betas_zero_snr": True}),
    ("DDPMScheduler", {"prediction_type": "sample"}),
]
FLOWS: list[tuple[str, dict[str, Any], float]] = [
    ("FlowMatchEulerDiscreteScheduler", {}, 1.0),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, 3.0),
    ("FlowMatchHeunDiscreteScheduler", {"shift": 2.0}, 2.0),
    ("FlowMatchLCMScheduler", {}, 1.0),
    ("UniPCMultistepScheduler", {**FLOW, "flow_shift": 5.0}, 5.0),
    ("DPMSolverMultistepScheduler", {**FLOW, "flow_shift": 3.0}, 3.0),
    ("DPMSolverSinglestepScheduler", FLOW, 1.0),
    ("DPMSolverMultistepScheduler", {"prediction_type": "flow_prediction"}, 1.0),
]
REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("EDMEulerScheduler", {}),
    ("EDMDPMSolverMultistepScheduler", {}),
    ("SCMScheduler", {}),
    ("ScoreSdeVeScheduler", {}),
    ("ScoreSdeVpScheduler", {}),
    ("IPNDMScheduler", {}),
    ("KarrasVeScheduler", {}),
    ("RePaintScheduler", {}),
    ("CMStochasticIterativeScheduler", {}),
    ("DDPMWuerstchenScheduler", {}),
    ("HeliosScheduler", {}),
    ("FlowMapEulerDiscreteScheduler", {}),
    ("EulerDiscreteScheduler", {"timestep_type": "continuous", "prediction_type": "v_prediction"}),
    ("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}),
]


def make(name: str, options: dict[str, Any]) -> Any:
    """A scheduler, or a skip where this version of diffusers has no such class or option."""
    kind = getattr(diffusers, name, None) or getattr(diffusers.schedulers.deprecated, name, None)
    if kind is None:
        pytest.skip(f"diffusers {diffusers.__version__} has no {name}")
    return kind(**options)


def both(scheduler: Any) -> list[NoiseSchedule]:
    """The schedule read from the object and from its JSON config."""
    return [NoiseSchedule.from_diffusers(s) for s in (scheduler, json.loads(scheduler.to_json_string()))]


@pytest.mark.parametrize(("name", "options"), DISCRETE, ids=lambda value: str(value))
def test_discrete_schedulers(name: str, options: dict[str, Any]) -> None:
    scheduler = make(name, options)
    acp = scheduler.alphas_cumprod.double()
    if options.get("rescale_betas_zero_snr"):
        assert float(acp[-1]) in (0.0, 2**-24)
        acp = torch.cat([acp[:-1], acp.new_zeros(1)])
    t = torch.arange(len(acp))
    for schedule in both(scheduler):
        assert not schedule.continuous
        assert schedule.prediction == options.get("prediction_type", "epsilon")
        assert schedule.num_steps == len(acp)
        # diffusers' tables are float32: where sigma is small, 1 - acp has lost digits.
        torch.testing.assert_close(schedule.alpha(t, torch.float64), acp.sqrt(), rtol=1e-5, atol=2e-6)
        torch.testing.assert_close(schedule.sigma(t, torch.float64), (1 - acp).sqrt(), rtol=1e-5, atol=2e-5)
        torch.testing.assert_close(schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2, torch.ones(len(acp)))


def test_add_noise_is_that_of_ddpm() -> None:
    scheduler = make("DDPMScheduler", {})
    generator = torch.Generator().manual_seed(0)
    z, noise = torch.randn(2, 7, 3, 4, 4, generator=generator)
    t = torch.tensor([0, 1, 20, 500, 980, 998, 999])
    expected = scheduler.add_noise(z, noise, t)
    for schedule in both(scheduler):
        torch.testing.assert_close(schedule.add_noise(z, t, noise), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "options", "shift"), FLOWS, ids=lambda value: str(value))
def test_flow_schedulers(name: str, options: dict[str, Any], shift: float) -> None:
    t = torch.tensor([0.0, 0.25, 1.0])
    for schedule in both(make(name, options)):
        assert schedule.continuous
        assert schedule.prediction == "flow"
        assert schedule.shift == shift
        assert schedule.num_steps == 1000
        assert torch.equal(schedule.alpha(t), 1 - t)
        assert torch.equal(schedule.sigma(t), t)
        assert torch.equal(schedule.teacher_time(t), 1000 * t)


def test_flow_sigmas_keep_the_prediction_type() -> None:
    for prediction in ("epsilon", "sample", "v_prediction"):
        for schedule in both(make("UniPCMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": prediction})):
            assert schedule.continuous
            assert schedule.prediction == prediction


def test_flow_add_noise_is_that_of_diffusers() -> None:
    scheduler = make("FlowMatchEulerDiscreteScheduler", {"shift": 3.0})
    z, noise = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
    at = scheduler.timesteps[[0, 10, 500, 900, 999]]
    expected = scheduler.scale_noise(z, at, noise)
    schedule = NoiseSchedule.from_diffusers(scheduler)
    torch.testing.assert_close(schedule.add_noise(z, at / 1000, noise), expected)


@pytest.mark.parametrize(("name", "options"), REFUSED, ids=lambda value: str(value))
def test_refused_schedulers(name: str, options: dict[str, Any]) -> None:
    sources: list[Any] = [{"_class_name": name, **options}]
    # diffusers puts a placeholder in place of some old schedulers where transformers is not installed.
    kind = getattr(diffusers, name, None)
    if kind is not None and "dummy" not in kind.__module__:
        scheduler = make(name, options)
        sources += [scheduler, json.loads(scheduler.to_json_string())]
    for source in sources:
        with pytest.raises(ValueError, match=name):
            NoiseSchedule.from_diffusers(source)


def test_stable_diffusions_config_without_diffusers() -> None:
    """The scheduler_config.json of Stable Diffusion 1.5, as it is on the hub."""
    config = {
        "_class_name": "PNDMScheduler",
        "_diffusers_version": "0.6.0",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "num_train_timesteps": 1000,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "trained_betas": None,
        "clip_sample": False,
    }
    schedule = NoiseSchedule.from_diffusers(config)
    direct = NoiseSchedule.scaled_linear()
    assert schedule.acp is not None
    assert direct.acp is not None
    assert torch.equal(schedule.acp, direct.acp)
    assert schedule.prediction == "epsilon"
    assert abs(float(schedule.acp[-1]) - 0.0046601) < 1e-6


def test_named_constructors_are_the_config_rules() -> None:
    for direct, kind, ends in (
        (NoiseSchedule.linear(50), "linear", (1e-4, 0.02)),
        (NoiseSchedule.scaled_linear(50), "scaled_linear", (0.00085, 0.012)),
        (NoiseSchedule.cosine(50), "squaredcos_cap_v2", (0.0, 0.0)),
    ):
        config = {"beta_schedule": kind, "beta_start": ends[0], "beta_end": ends[1], "num_train_timesteps": 50}
        assert torch.equal(direct.acp, NoiseSchedule.from_diffusers(config).acp)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"_class_name": "DDPMScheduler"}, "DDPMScheduler: beta_schedule is None"),
        ({"_class_name": "DDPMScheduler", "beta_schedule": "linear"}, "beta_start None"),
        ({"_class_name": "DDPMScheduler", "beta_schedule": "warmup", "beta_start": 0.1, "beta_end": 0.2}, "'warmup'"),
        ({"beta_schedule": None}, "a config without _class_name"),
        ({"trained_betas": [0.1], "prediction_type": "score"}, "'score'"),
    ],
)
def test_configs_that_say_too_little(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NoiseSchedule.from_diffusers(config)


def test_the_scheduler_is_left_as_it_was() -> None:
    scheduler = make("EulerDiscreteScheduler", {"rescale_betas_zero_snr": True})
    NoiseSchedule.from_diffusers(scheduler)
    assert float(scheduler.alphas_cumprod[-1]) == 2**-24


@pytest.mark.parametrize("t", [-1, 1000])
def test_t_out_of_range_is_refused(t: int) -> None:
    with pytest.raises(ValueError, match=r"0\.\.999"):
        NoiseSchedule.linear().alpha(torch.tensor([5, t]))


def test_t_that_is_not_an_integer_is_refused() -> None:
    with pytest.raises(ValueError, match="integer"):
        NoiseSchedule.linear().sigma(torch.tensor([0.5]))


def test_tables_that_are_no_schedules_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        NoiseSchedule("epsilon", 2, torch.tensor([0.5, 1.5]))
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        NoiseSchedule("epsilon", 2, torch.tensor([0.5, float("nan")]))
    with pytest.raises(ValueError, match="shape"):
        NoiseSchedule("epsilon", 3, torch.tensor([0.5, 0.4]))
    with pytest.raises((ValueError, TypeError), match="prediction"):  # TypeError where annotations are checked
        NoiseSchedule("noise", 2, torch.tensor([0.5, 0.4]))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="shift"):
        NoiseSchedule.flow(shift=0.0)
