import pytest
import torch

from carv import weights
from carv.schedule import NoiseSchedule

SCHEDULE = NoiseSchedule.scaled_linear()
T = torch.tensor([0, 20, 500, 999])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("uniform", lambda acp: torch.ones_like(acp)),
        ("sds", lambda acp: 1 - acp),
        ("fantasia3d", lambda acp: acp.sqrt() * (1 - acp)),
        ("snr", lambda acp: acp / (1 - acp)),
        ("truncated-snr", lambda acp: (acp / (1 - acp)).clamp(min=1)),
        ("min-snr", lambda acp: (acp / (1 - acp)).clamp(max=5) / (acp / (1 - acp))),
        ("sds*alpha", lambda acp: (1 - acp) * acp.sqrt()),
        ("uniform*alpha", lambda acp: acp.sqrt()),
    ],
)
def test_each_named_weight_is_its_formula(name, expected):
    torch.testing.assert_close(weights.by_name(name, SCHEDULE)(T), expected(SCHEDULE.acp[T]))


def test_fantasia3d_is_the_papers_w_alpha_of_sds():
    both = weights.fantasia3d(SCHEDULE)(T), weights.sds(SCHEDULE).times_alpha(SCHEDULE)(T)
    torch.testing.assert_close(*both)


def test_min_snr_is_one_not_nan_at_zero_terminal_snr():
    schedule = NoiseSchedule("v_prediction", 3, torch.tensor([0.9, 0.5, 0.0], dtype=torch.float64))
    assert weights.min_snr(schedule)(torch.tensor([2])).item() == 1
    assert weights.min_snr(NoiseSchedule.flow())(torch.tensor([0.0, 1.0])).tolist() == [0, 1]


def test_flow_weights_use_alpha_and_sigma_of_the_straight_path():
    t = torch.tensor([0.25])
    assert weights.sds(NoiseSchedule.flow())(t).item() == pytest.approx(0.0625)


def test_a_users_callable_and_table_are_weights():
    assert weights.Weight("mine", "t^2", lambda t: t.double() ** 2)(T).tolist() == [0, 400, 250000, 998001]
    table = weights.from_table(torch.arange(5.0))
    assert table(torch.tensor([[4, 0]])).tolist() == [[4, 0]]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: weights.by_name("sdss", SCHEDULE), "unknown weight 'sdss'; known weights: sds, uniform"),
        (lambda: weights.from_table(torch.tensor([1.0, -2.0])), "-2 at t = 1"),
        (lambda: weights.from_table(torch.tensor([1.0, float("nan")])), "nan at t = 1"),
        (lambda: weights.from_table(torch.ones(2, 2)), r"shape \[T\]"),
        (lambda: weights.from_table(torch.ones(3))(torch.tensor([0.5])), "integer timesteps"),
        (lambda: weights.Weight("w", "1", lambda t: torch.ones(3))(T), "keep the shape"),
        (lambda: weights.snr(NoiseSchedule.flow())(torch.tensor([0.0])), "inf at t = 0"),
    ],
)
def test_a_bad_weight_gets_one_clear_sentence(make, message):
    with pytest.raises(ValueError, match=message):
        make()
