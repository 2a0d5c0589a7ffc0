import dataclasses
import math

import numpy as np
import pytest
import torch

from carv.density import uniform_steps
from carv.proposals import proportional
from carv.rng import stream
from carv.strata import iid, per_render
from carv.tasks.toy import GaussianToy
from carv.variance.pilot import pilot
from carv.variance.predict import gain, predict
from carv.variance.projection import Projection
from carv.variance.tables import Counts, Tables, describe, restore
from carv.variance.vjp import batched_task_pull_back

from laws import LAWS

BINS = 6
BASE = uniform_steps(20, 79)  # 10 atoms a bin; w(t) varies threefold
TOY = GaussianToy(dim=8, gain_std=0.15)
CLOSED = TOY.exact(BASE)
EXACT = Tables.exact(BASE, CLOSED.m2, CLOSED.within, CLOSED.across)
IW = proportional(BASE, TOY.weight)


def by_bin(table):
    return table.view(BINS, 10).mean(1) if table.ndim == 1 else table.view(BINS, 10, BINS, 10).mean((1, 3))


def upper(table):
    return table[torch.triu_indices(BINS, BINS).unbind()]


def z_scores(samples, truth):
    return (samples.mean(0) - truth) / (samples.std(0) / len(samples) ** 0.5)


@pytest.fixture(scope="module")
def repeated():
    """60 independent small pilots, with antithetic pairs."""
    return [pilot(TOY, BASE, stream(11, i), renders=5, bins=BINS, antithetic=True, vjp_batch=1000) for i in range(60)]


def test_every_entry_of_every_table_is_unbiased(repeated):
    # 54 entries, 60 repetitions each: |z| < 5 fails falsely about once in 2500 runs (Student's law).
    anti = 2 * CLOSED.within.diagonal() - CLOSED.m2
    for name, found, truth in (
        ("m2", [tables.m2 for tables in repeated], by_bin(CLOSED.m2)),
        ("antithetic", [tables.antithetic.mean(0) for tables in repeated], by_bin(anti)),
        ("Gw", [upper(tables.gram_within) for tables in repeated], upper(by_bin(CLOSED.within))),
        ("Gc", [upper(tables.gram_across) for tables in repeated], upper(by_bin(CLOSED.across))),
    ):
        z = z_scores(torch.stack(found), truth)
        assert z.abs().max() < 5, (name, z)


def test_iid_predictions_are_unbiased_though_bins_are_coarse_and_the_proposal_varies_within_them(repeated):
    for proposal in (None, IW):
        truth = predict(EXACT, 2, 3, proposal, iid).variance.value
        found = torch.tensor([predict(tables, 2, 3, proposal, iid).variance.value for tables in repeated])
        assert abs(z_scores(found, truth)) < 4


def test_inner_products_of_a_draw_with_itself_would_be_caught(repeated):
    # The mutant of Gw's diagonal, |A|^2 of the bin's mean: too large by half the noise.
    mutant = torch.stack([t.gram_within.diagonal() + (t.m2 - t.gram_within.diagonal()) / 2 for t in repeated])
    assert (z_scores(mutant, by_bin(CLOSED.within).diagonal()) > 6).all()


def test_two_noises_at_one_t_would_put_the_variance_within_a_bin_on_the_diagonal():
    # Why the draws of a bin have a t each: with the same t the diagonal is E|F_x(t)|^2, not |mean over the bin|^2.
    same_t = CLOSED.within.diagonal().view(BINS, 10).mean(1)
    assert (same_t > by_bin(CLOSED.within).diagonal() * 1.0005).all()


def test_95_percent_intervals_cover_the_truth():
    # 60 pilots: at a coverage of 93 to 97 %, fewer than 50 hits are a false alarm once in 500 runs or less.
    # `benchmarks/coverage.py` measures coverage.
    hits = np.zeros(4)
    truth = [predict(EXACT, 1, 4, None, iid), predict(EXACT, 2, 3, IW, per_render)]
    for i in range(60):
        tables = pilot(TOY, BASE, stream(12, i), renders=16, bins=BINS, vjp_batch=1000)
        found = [predict(tables, 1, 4, None, iid), predict(tables, 2, 3, IW, per_render)]
        figures = [(f.variance, t.variance) for f, t in zip(found, truth, strict=True)]
        figures += [(gain(*found), gain(*truth)), (found[0].split.noise, truth[0].split.noise)]
        for j, (figure, exact) in enumerate(figures):
            low, high = figure.interval()
            hits[j] += low <= exact.value <= high
    assert (hits >= 50).all(), hits


def test_leave_one_out_values_are_those_of_a_pilot_without_the_render():
    whole = pilot(TOY, BASE, stream(3), renders=6, bins=BINS)
    fewer = pilot(TOY, BASE, stream(3), renders=5, bins=BINS)
    for proposal, coupling in ((None, iid), (IW, per_render)):
        without = predict(whole, 3, 4, proposal, coupling).variance.without
        assert without.shape == (6,)
        assert without[-1] == pytest.approx(predict(fewer, 3, 4, proposal, coupling).variance.value, rel=1e-12)


def test_tables_do_not_depend_on_batches_or_on_how_gradients_are_taken():
    plain = pilot(TOY, BASE, stream(4), renders=4, bins=BINS, noises=3, antithetic=True)

    def batched(state, f):
        return batched_task_pull_back(TOY, state, f[:, None]).matrix()

    for options in ({"micro_batch": 5}, {"vjp_batch": 1}, {"vjp_batch": 100}, {"per_draw": batched}):
        other = pilot(TOY, BASE, stream(4), renders=4, bins=BINS, noises=3, antithetic=True, **options)
        for name in ("position", "norm_sq", "within", "across", "antithetic"):
            assert torch.allclose(getattr(plain, name), getattr(other, name), rtol=1e-12, atol=1e-14), (options, name)


class Counting(GaussianToy):
    encoder_calls = 2

    def __init__(self):
        super().__init__()
        self.calls = {"upstream": 0, "teacher": 0, "backward": 0}

    def upstream(self, renders):
        self.calls["upstream"] += len(renders)
        return super().upstream(renders)

    def contribution(self, state, t, noise):
        assert not torch.is_grad_enabled()
        self.calls["teacher"] += t.numel()
        return super().contribution(state, t, noise)

    def pull_back(self, state, f, retain=False):
        self.calls["backward"] += 1
        return super().pull_back(state, f, retain)


@pytest.mark.parametrize("antithetic", [False, True])
def test_what_a_pilot_has_spent_is_counted(antithetic):
    task = Counting()
    tables = pilot(task, BASE, stream(5), renders=4, bins=5, noises=2, antithetic=antithetic)
    assert vars(tables.counts) == task.calls | {"encoder": 4 * task.encoder_calls}
    assert task.calls["backward"] == 4 * 5 * (3 if antithetic else 2)


def test_a_projection_is_unbiased_with_the_variance_it_states():
    rng = torch.Generator().manual_seed(0)
    a, b = torch.randn((2, 1, 300), generator=rng, dtype=torch.float64)
    b = b + a / 2
    inner, dim = (a * b).sum(), 32
    found = []
    for i in range(300):
        projection = Projection(dim, 4, stream(6, i))
        found.append((projection(a) * projection(b)).sum() / 4)
    found = torch.stack(found)
    assert abs(z_scores(found, inner)) < 4
    stated = (a.square().sum() * b.square().sum() + inner**2) / dim
    assert 0.7 < found.var() / stated < 1.3  # 8 % standard error
    with pytest.raises(ValueError, match="multiple of blocks"):
        Projection(30, 4, stream(0))


def test_projections_are_one_and_the_same_for_vectors_that_span_chunks(monkeypatch):
    projection = Projection(8, 2, stream(7))
    long = torch.zeros(2, (1 << 16) + 5)
    long[0, -1], long[1, -1] = 1.0, 1.0
    kept = projection(long)
    assert torch.equal(kept[0], kept[1])
    assert kept[0].square().sum(1).tolist() == [1.0, 1.0]
    monkeypatch.setattr("carv.variance.projection._KEPT_CHUNKS", 0)
    assert torch.equal(Projection(8, 2, stream(7))(long), kept)


def test_projected_tables_are_unbiased_and_their_intervals_hold_the_projection_s_error():
    toy = GaussianToy(dim=64, gain_std=0.15)
    closed = toy.exact(BASE)
    exact = predict(Tables.exact(BASE, closed.m2, closed.within, closed.across), 2, 4, None, per_render)
    values, errors, plain_errors = [], [], []
    for i in range(40):
        options = {"renders": 8, "bins": 4, "vjp_batch": 1000}
        found = predict(pilot(toy, BASE, stream(8, i), projection_dim=32, projection_blocks=8, **options), 2, 4)
        values.append(found.variance.value)
        errors.append(found.variance.error)
        plain_errors.append(dataclasses.replace(found.variance, without_block=np.empty(0)).error)
    values = torch.tensor(values)
    assert abs(z_scores(values, exact.variance.value)) < 4
    # The error as it is, from 40 pilots, has a standard error of 11 %. It may be overstated (by the interaction of
    # renders and projections, counted twice), not understated.
    honest = (torch.tensor(errors).square().mean() / values.var()).item()
    assert 0.7 < honest < 2.5
    assert np.square(plain_errors).mean() < np.square(errors).mean()


def test_projected_tables_keep_norms_and_antithetic_products_exact():
    options = {"renders": 4, "bins": 4, "antithetic": True}
    whole, projected = (pilot(TOY, BASE, stream(9), projection_dim=d, **options) for d in (None, 32))
    assert torch.equal(whole.norm_sq, projected.norm_sq)
    assert torch.equal(whole.antithetic, projected.antithetic)
    assert whole.block_within is None
    assert torch.allclose(projected.block_within.mean(0), projected.gram_within)
    assert torch.allclose(projected.block_across.mean(0), projected.gram_across)


@pytest.mark.parametrize("law", [name for name in LAWS if "adaptive" not in name])
def test_tables_survive_the_disk_bit_for_bit(law, tmp_path):
    base = LAWS[law][0]
    edges = torch.linspace(0, 1, 4, dtype=torch.float64)
    rng = torch.Generator().manual_seed(0)
    parts = [torch.rand(shape, generator=rng).double() for shape in ((5, 3, 2), (5, 3, 2), (5, 3, 3), (5, 3, 3))]
    tables = Tables(base, edges, *parts, block_within=parts[2], counts=Counts(5, 30, 30))
    tables.save(tmp_path / "tables.safetensors")
    loaded = Tables.load(tmp_path / "tables.safetensors")
    for name in ("edges", "position", "norm_sq", "within", "across", "block_within"):
        assert torch.equal(getattr(loaded, name), getattr(tables, name))
    assert loaded.antithetic is None
    assert loaded.counts == tables.counts
    u = torch.rand(200, generator=rng, dtype=torch.float64)
    assert torch.equal(loaded.base.icdf(u), base.icdf(u))
    assert describe(restore(describe(base))) == describe(base)


def test_a_file_that_is_not_a_pilot_s_is_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="does not hold the tables of a pilot"):
        Tables.load(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="cannot be saved"):
        describe(object())


def test_continuous_t_is_drawn_in_float32_one_uniform_position_in_each_bin():
    seen = []

    class Flow(GaussianToy):
        def contribution(self, state, t, noise):
            seen.append(t)
            assert t.dtype == torch.float32
            return t[..., None].double() * (state[:, None] - self.target) + noise

    base = LAWS["logit-normal base"][0]
    tables = pilot(Flow(), base, stream(1), renders=4, bins=8)
    cell = (tables.position * 8).floor()
    assert torch.equal(cell, torch.arange(8.0).double()[None, :, None].expand(4, 8, 2))
    expected = base.icdf(tables.position[0].flatten()).to(torch.float32)
    assert torch.equal(seen[0][0], expected)
    assert predict(tables, 2, 4, LAWS["logit-normal base, weight"][1]).variance.value > 0


def test_a_base_with_few_atoms_gets_a_bin_for_each():
    tables = pilot(TOY, uniform_steps(30, 33), stream(1), renders=4, bins=32)
    assert tables.atoms
    assert tables.t.tolist() == [30, 31, 32, 33]
    assert not pilot(TOY, BASE, stream(1), renders=4, bins=BINS).atoms


def test_heavy_tails_show():
    tables = pilot(TOY, BASE, stream(1), renders=10, bins=BINS)
    assert 0.01 <= tables.top_share < 0.2
    heavy = tables.norm_sq.clone()
    heavy[3, 2, 0] = 1e6
    assert dataclasses.replace(tables, norm_sq=heavy).top_share > 0.99
    figure = predict(dataclasses.replace(tables, norm_sq=heavy), 1, 4).variance
    assert figure.largest_influence > 0.85  # of 10 renders one carries all: (n - 1) / n
    assert math.isnan(EXACT.top_share)


def test_a_pilot_refuses_what_cannot_work():
    for options, message in (
        ({"renders": 3}, "renders >= 4, got 3"),
        ({"noises": 1}, "noises >= 2, got 1"),
        ({"memory_limit": 100}, "pass projection_dim="),
        ({"projection_dim": 7, "projection_blocks": 2}, "multiple of blocks"),
    ):
        with pytest.raises(ValueError, match=message):
            pilot(TOY, BASE, stream(0), **options)

    class Broken(GaussianToy):
        def contribution(self, state, t, noise):
            return torch.where(t[..., None] == t.max(), math.nan, super().contribution(state, t, noise))

    with pytest.raises(ValueError, match=r"gradient of Broken is not finite at t = 7\d \(render 0"):
        pilot(Broken(), BASE, stream(0), bins=BINS)

    class Flat(GaussianToy):
        def contribution(self, state, t, noise):
            return super().contribution(state, t, noise).sum(-1)

    with pytest.raises(ValueError, match=r"returned shape \[1, 12\], expected \[1, 12, 8\]"):
        pilot(Flat(), BASE, stream(0), bins=BINS)
