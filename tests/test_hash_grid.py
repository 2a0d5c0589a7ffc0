"""The hash-grid field: its encoding, networks, background and regulariser."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch

from carv.rng import stream
from carv.tasks.sds import hash_encoding, hash_grid
from carv.tasks.sds.config import SDSConfig
from carv.tasks.sds.field import VoxelField
from carv.tasks.sds.hash_encoding import HashEncoding
from carv.tasks.sds.hash_grid import PAPER, HashGridConfig, HashGridField
from carv.world.cameras import Cameras, held_out_cameras
from carv.world.render import BACKGROUND, render_object

SMALL = HashGridConfig(levels=3, log2_entries=6, coarsest=3, finest=7, width=5, open_levels=3)
"""Levels of 3, 4 and 7 cells: the first has an entry for each of its 64 vertices, the others share 64."""


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def encoding(**sizes: int) -> HashEncoding:
    """In float64, with entries of order 1."""
    given = {"levels": 3, "features": 2, "log2_entries": 6, "coarsest": 3, "finest": 7} | sizes
    made = HashEncoding(**given, rng=rng()).double()
    made.table.data = torch.randn(made.table.shape, generator=rng(1), dtype=torch.float64)
    return made


def random_field(config: HashGridConfig = SMALL, samples: int = 6) -> HashGridField:
    """In float64 with all numbers random; a soft density, so that finite differences see all of a ray."""
    field = HashGridField(config, samples, stream(0), density_scale=1.0).double()
    for i, parameter in enumerate(field.parameters()):
        parameter.data = torch.randn(parameter.shape, generator=rng(i), dtype=torch.float64)
    if field.background_net is not None:
        for parameter in field.background_net.parameters():
            parameter.data *= 0.3  # no saturated colours
    return field


def cameras(count: int) -> Cameras:
    ring = held_out_cameras(count)
    return Cameras(*(part.double() for part in (ring.azimuth, ring.elevation, ring.distance, ring.fov)))


# The encoding


def by_the_paper(made: HashEncoding, point: list[float]) -> list[float]:
    """One point by the formulas, in Python's integers."""
    found = []
    for level in made.levels:
        n, total = level.cells, [0.0] * made.features
        low = [min(int(x * n), n - 1) for x in point]
        for corner in range(8):
            bits = [(corner >> axis) & 1 for axis in range(3)]
            i, j, k = (a + b for a, b in zip(low, bits, strict=True))
            if (n + 1) ** 3 <= level.entries:
                entry = i + (n + 1) * j + (n + 1) ** 2 * k
            else:
                entry = (i ^ (2654435761 * j % 2**32) ^ (805459861 * k % 2**32)) % level.entries
            shares = [x * n - a if b else 1 - (x * n - a) for x, a, b in zip(point, low, bits, strict=True)]
            for f in range(made.features):
                total[f] += math.prod(shares) * made.table[f, level.first + entry].item()
        found += total
    return found


@pytest.mark.parametrize("sizes", [{}, {"features": 1}, {"levels": 1}, {"log2_entries": 19, "finest": 4096}])
def test_features_are_those_of_the_papers_formulas(sizes):
    made = encoding(**sizes)
    points = torch.rand(20, 3, generator=rng(2), dtype=torch.float64)
    points[0], points[1] = 0.0, 1.0  # the cube's corners belong to it
    expected = torch.tensor([by_the_paper(made, point) for point in points.tolist()], dtype=torch.float64)
    torch.testing.assert_close(made(points), expected)


def test_entries_whose_products_need_64_bits_are_hashed_alike():
    """2^19 entries and 8191 cells: i times a prime's remainder exceeds 32 bits."""
    made = encoding(levels=1, log2_entries=19, coarsest=8191, finest=8191)
    points = torch.rand(20, 3, generator=rng(2), dtype=torch.float64)
    expected = torch.tensor([by_the_paper(made, point) for point in points.tolist()], dtype=torch.float64)
    torch.testing.assert_close(made(points), expected)


def test_levels_grow_geometrically_and_only_large_ones_share_entries():
    levels = HashEncoding(16, 2, 19, 16, 4096, rng()).levels
    assert (levels[0].cells, levels[-1].cells) == (16, 4096)
    ratios = [after.cells / before.cells for before, after in itertools.pairwise(levels)]
    assert all(abs(ratio - 256 ** (1 / 15)) < 0.06 for ratio in ratios)
    assert [level.hashed for level in levels] == [(level.cells + 1) ** 3 > 2**19 for level in levels]
    assert all(after.first == before.first + before.entries for before, after in itertools.pairwise(levels))
    assert levels[0].entries == 17**3


def test_the_encodings_gradients_of_first_and_second_order_agree_with_finite_differences():
    made, points = encoding(), torch.rand(7, 3, generator=rng(2), dtype=torch.float64)

    def encode(table):
        return torch.func.functional_call(made, {"table": table}, (points,)).square()

    assert torch.autograd.gradcheck(encode, made.table, fast_mode=True)
    assert torch.autograd.gradgradcheck(encode, made.table, fast_mode=True)


def test_points_at_a_time_change_nothing(monkeypatch):
    made, points = encoding(), torch.rand(10, 3, generator=rng(2), dtype=torch.float64)
    whole = made(points)
    gradient = torch.autograd.grad(whole.square().sum(), made.table)
    monkeypatch.setattr(hash_encoding, "_CHUNK", 4)
    torch.testing.assert_close(made(points), whole)
    torch.testing.assert_close(torch.autograd.grad(made(points).square().sum(), made.table), gradient)


def test_points_outside_the_cube_count_as_their_nearest_inside():
    made = encoding()
    outside = torch.tensor([[-0.5, 0.3, 1.7]], dtype=torch.float64)
    assert torch.equal(made(outside), made(outside.clamp(0, 1)))


def test_closed_levels_give_zeros_and_get_no_gradient():
    made, points = encoding(), torch.rand(10, 3, generator=rng(2), dtype=torch.float64)
    everything = made(points)
    made.open_levels = 2
    some = made(points)
    assert torch.equal(some[:, :4], everything[:, :4])
    assert not some[:, 4:].any()
    (gradient,) = torch.autograd.grad(some.sum(), made.table)
    last = made.levels[2].first
    assert gradient[:, :last].any()
    assert not gradient[:, last:].any()


def test_levels_open_one_by_one_as_a_function_of_the_step_alone():
    config = HashGridConfig(levels=4, open_levels=2, open_after=10, open_every=5)
    assert [config.levels_at(step) for step in (0, 10, 14, 15, 19, 20, 25, 10_000)] == [2, 2, 2, 3, 3, 4, 4, 4]
    field = HashGridField(config, 2, stream(0))
    for step, levels in ((20, 4), (0, 2), (15, 3)):
        field.at_step(step)
        assert field.encoding.open_levels == levels


# The field


@pytest.mark.parametrize("jitter", [False, True])
def test_every_parameters_gradient_agrees_with_finite_differences(jitter):
    field = random_field()
    weights = torch.randn(1, 4, 3, 3, dtype=torch.float64, generator=rng(1))
    names = [name for name, _ in field.named_parameters()]

    def loss(*values):
        given = (cameras(1), 3, rng(7) if jitter else None)
        rgb, opacity = torch.func.functional_call(field, dict(zip(names, values, strict=True)), given)
        return (weights * torch.cat([rgb, opacity], dim=1)).sum()

    assert torch.autograd.gradcheck(loss, tuple(field.parameters()), fast_mode=True)


def test_the_seed_alone_decides_a_new_field():
    first = HashGridField(SMALL, 4, stream(5)).state_dict()
    before = torch.get_rng_state()
    again, other = (HashGridField(SMALL, 4, stream(seed)).state_dict() for seed in (5, 6))
    assert torch.equal(before, torch.get_rng_state()), "the global stream is not touched"
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["encoding.table"], other["encoding.table"])
    assert not torch.equal(first["density_net.0.weight"], other["density_net.0.weight"])


def test_a_new_field_is_the_voxel_fields_grey_blob_before_the_worlds_background():
    rgb, opacity = HashGridField(HashGridConfig(), 48, stream(0))(held_out_cameras(1), 33)
    blob, blob_opacity = VoxelField()(held_out_cameras(1), 33)
    assert (opacity - blob_opacity).abs().max() < 0.02
    assert (rgb - blob).abs().max() < 0.02
    assert torch.allclose(rgb[0, :, 0, 0], torch.tensor(BACKGROUND))


@pytest.mark.parametrize("learned", [True, False])
def test_rays_that_nothing_stops_see_the_background_of_their_direction(learned):
    field = random_field(dataclasses.replace(SMALL, learn_background=learned))
    field.density_scale = 0.0
    rgb, opacity = field(cameras(1), 8)
    assert not opacity.any()
    directions = cameras(1).rays(8)[1].reshape(-1, 3)
    assert torch.allclose(rgb[0].flatten(1).T, field.behind(directions))
    assert (rgb.std(dim=(2, 3)) > 1e-3).all() == learned
    assert learned or torch.allclose(rgb[0, :, 0, 0], torch.tensor(BACKGROUND, dtype=torch.float64))


def test_the_background_tells_all_directions_apart_and_opposite_ones():
    field = random_field()
    directions = torch.nn.functional.normalize(torch.randn(6, 3, generator=rng(), dtype=torch.float64), dim=-1)
    colours = field.behind(torch.cat([directions, -directions]))
    assert torch.pdist(colours).min() > 1e-4


@pytest.mark.parametrize("config", [SMALL, dataclasses.replace(SMALL, learn_background=False)])
def test_every_parameter_is_in_one_group_that_has_a_learning_rate(config):
    settings = SDSConfig("a red chair", hash_grid=config)
    for field in (HashGridField(config, 4, stream(0)), VoxelField(4, 4)):
        groups = field.parameter_groups()
        assert groups.keys() <= settings.rates.keys()
        grouped = [id(parameter) for group in groups.values() for parameter in group]
        assert sorted(grouped) == sorted(id(parameter) for parameter in field.parameters())


def test_colours_and_densities_for_meshing_are_those_of_the_pictures():
    field = random_field()
    density, colour = field.at(field.vertices(5).double().flatten(0, 1))
    grid = field.density_grid(5)
    assert grid[1, 2, 3] == density.view(5, 5, 5)[3, 2, 1]
    points = field.vertices(5).double().view(-1, 3)
    torch.testing.assert_close(field.colour_at(points), colour.flatten(1).T)


def test_smoothness_is_the_squared_gradient_in_cells_of_the_finest_grid():
    """With nothing learned d = -6 |x|, of slope 6, so d varies by 36 h^2, c not at all.

    For |x| < 5/6, that is 30 % of the cube; beyond, d is constant. Within 10 %, three standard errors of 2048 points.
    """
    field = HashGridField(dataclasses.replace(SMALL, finest=100), 4, stream(0)).double()
    field.encoding.table.data.zero_()
    variation = field.regulariser(1.0, 0.0, rng()).item()
    assert variation == pytest.approx(4 / 3 * math.pi * (5 / 6) ** 3 / 8 * 36 * (2 / 100) ** 2 / 4, rel=0.1)


def test_the_regulariser_is_unbiased_for_the_mean_over_the_cube():
    """60 estimates of the mean density within 4 standard errors (false alarm 6e-5), which are at most 1.5 % of it."""
    field = random_field()
    ticks = (torch.arange(40, dtype=torch.float64) + 0.5) / 20 - 1
    points = torch.stack(torch.meshgrid(ticks, ticks, ticks, indexing="ij"), -1).flatten(0, 1)
    with torch.no_grad():
        truth = field.at(points)[0].mean().item() / field.density_scale
        found = torch.stack([field.regulariser(0.0, 1.0, rng(seed)) for seed in range(60)])
    error = found.std().item() / math.sqrt(60)
    assert error < 0.015 * truth
    assert abs(found.mean().item() - truth) < 4 * error


def test_networks_in_chunks_change_nothing(monkeypatch):
    field = random_field()
    whole = field(cameras(1), 5)[0]
    monkeypatch.setattr(hash_grid, "_CHUNK", 7)
    torch.testing.assert_close(field(cameras(1), 5)[0], whole)


def test_the_papers_field_has_its_size_and_renders():
    field = HashGridField(PAPER, 4, stream(0))
    assert field.encoding.width == 32
    assert sum(p.numel() for p in field.density_net.parameters()) == 32 * 64 + 64
    assert field.encoding.levels[-1].entries == 2**19
    assert field.encoding.open_levels == 8
    rgb, _ = field(held_out_cameras(1), 4)
    assert torch.isfinite(rgb).all()


def test_a_field_learns_an_object_from_its_pictures():
    seen, held_out = held_out_cameras(12), held_out_cameras(24)[1::8]
    truth, expected = render_object("a red chair", seen, 16), render_object("a red chair", held_out, 16)
    config = HashGridConfig(levels=4, log2_entries=13, finest=32, width=16, open_levels=4)
    field, generator = HashGridField(config, 20, stream(0)), rng()
    optimiser = torch.optim.Adam(field.parameters(), lr=0.02, betas=(0.9, 0.99), eps=1e-15)
    for _ in range(50):
        which = torch.randperm(12, generator=generator)[:3]
        rgb, _ = field(seen[which], 16, generator)
        optimiser.zero_grad()
        (rgb - truth[which]).square().mean().backward()
        optimiser.step()
    with torch.no_grad():
        error = (field(held_out, 16)[0] - expected).square().mean()
    assert -10 * error.log10() > 20


def test_a_field_without_samples_is_refused():
    with pytest.raises(ValueError, match="samples >= 1"):
        HashGridField(SMALL, 0, stream(0))
