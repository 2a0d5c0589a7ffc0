"""The voxel field: rendering, gradients, regularisers and its look-ups for meshing."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

from carv.rng import stream
from carv.tasks.sds.field import VoxelField, opacity_entropy, opacity_sparsity
from carv.tasks.sds.volume import _absorb
from carv.world.cameras import Cameras, held_out_cameras
from carv.world.render import BACKGROUND, render_object


def random_field(resolution: int = 5, samples: int = 12) -> VoxelField:
    """A tiny field in float64 with all numbers random."""
    generator = stream(0, "field").generator()
    field = VoxelField(resolution, samples, density_scale=2.0).double()
    for parameter in field.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return field


def filled(value: float, scale: float = 1.0, samples: int = 16) -> VoxelField:
    """A field of one density in the whole ball."""
    field = VoxelField(4, samples, density_scale=scale).double()
    field.density.data.fill_(value)
    return field


def cameras(count: int) -> Cameras:
    ring = held_out_cameras(count)
    return Cameras(ring.azimuth.double(), ring.elevation.double(), ring.distance.double(), ring.fov.double())


def test_pictures_have_the_asked_shape_and_range() -> None:
    rgb, opacity = VoxelField(8, 8)(held_out_cameras(3), 10, torch.Generator())
    assert rgb.shape == (3, 3, 10, 10)
    assert opacity.shape == (3, 1, 10, 10)
    for values in (rgb, opacity):
        assert values.min() >= 0
        assert values.max() <= 1


@pytest.mark.parametrize("jitter", [False, True])
def test_gradients_agree_with_finite_differences(jitter: bool) -> None:
    field = random_field(resolution=3, samples=6)
    weights = torch.randn(2, 4, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def loss(density: Tensor, colour: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(7) if jitter else None
        rgb, opacity = torch.func.functional_call(
            field, {"density": density, "colour": colour}, (cameras(2), 4, generator)
        )
        return (weights * torch.cat([rgb, opacity], dim=1)).sum()

    assert torch.autograd.gradcheck(loss, (field.density, field.colour))


def test_compositing_weights_sum_to_the_opacity() -> None:
    # With colour 1 everywhere and a black background, rgb is the sum of the weights.
    field = random_field()
    field.colour.data.fill_(100.0)
    field.background.zero_()
    rgb, opacity = field(cameras(2), 9)
    assert torch.allclose(rgb, opacity.expand_as(rgb), atol=1e-12)
    assert opacity[:, :, 4, 4].min() > 0.3


def test_a_homogeneous_ball_absorbs_as_beer_and_lambert_say() -> None:
    size, density = 9, 0.7
    field = filled(torch.tensor(density).expm1().log().item())
    origins, directions = cameras(1).rays(size)
    start = origins[:, None, None].expand_as(directions)
    nearest = (start - (start * directions).sum(-1, keepdim=True) * directions).norm(dim=-1)
    chord = 2 * (1 - nearest**2).clamp(min=0).sqrt()
    for generator in (None, torch.Generator()):
        _, opacity = field(cameras(1), size, generator)
        assert torch.allclose(opacity[:, 0], 1 - torch.exp(-density * chord), atol=1e-6)


def test_rays_past_the_ball_see_the_background() -> None:
    rgb, opacity = filled(5.0, scale=100.0)(cameras(1), 32)
    assert torch.allclose(rgb[0, :, 0, 0], torch.tensor(BACKGROUND, dtype=torch.float64))
    assert opacity[0, 0, 0, 0] == 0
    assert opacity[0, 0, 16, 16] > 0.999


def test_an_empty_field_is_the_background() -> None:
    rgb, _ = filled(-50.0)(cameras(1), 8)
    assert torch.allclose(rgb, torch.tensor(BACKGROUND, dtype=torch.float64)[:, None, None].expand_as(rgb))


def test_what_is_in_front_hides_what_is_behind() -> None:
    field = VoxelField(9, 64).double()
    field.density.data.fill_(5.0)
    half = field.vertices(9)[..., 0] > 0  # the half in front is red, the half behind is blue
    field.colour.data[0, 0], field.colour.data[0, 2] = (torch.where(side, 9.0, -9.0) for side in (half, ~half))
    rgb, _ = field(cameras(2), 9)
    assert rgb[0, 0, 4, 4] > 0.9 > 0.1 > rgb[0, 2, 4, 4]
    assert rgb[1, 2, 4, 4] > 0.9 > 0.1 > rgb[1, 0, 4, 4]


def test_a_vertex_is_seen_at_its_place_in_the_world() -> None:
    field = VoxelField(17, 64).double()
    field.density.data.fill_(-30.0)
    field.density.data[0, 0, 8, 14, 8] = 30.0  # z = 0, y = 0.75, x = 0
    _, opacity = field(cameras(4), 33)
    columns = opacity[:, 0].sum(1).argmax(-1)
    assert columns[0] > 24  # to the right of the front
    assert columns[2] < 8  # to the left of the back
    assert columns[1] == columns[3] == 16


def test_jitter_is_reproducible_and_unbiased_about_the_middle() -> None:
    field = random_field()
    first, second = (field(cameras(1), 6, torch.Generator().manual_seed(3))[0] for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, field(cameras(1), 6, torch.Generator().manual_seed(4))[0])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        mean = torch.stack([field(cameras(1), 6, generator)[0] for _ in range(200)]).mean(0)
    assert (mean - field(cameras(1), 6)[0]).abs().max() < 0.02


def test_a_new_field_is_a_translucent_blob_in_the_middle() -> None:
    _, opacity = VoxelField()(held_out_cameras(1), 33)
    assert 0.8 < opacity[0, 0, 16, 16] < 0.9999
    assert opacity[0, 0, 16, 2] < 0.2


def test_every_voxel_in_view_gets_a_gradient() -> None:
    field = VoxelField(12, 24)
    rgb, _ = field(held_out_cameras(4), 24)
    density, colour = torch.autograd.grad(rgb.square().sum(), list(field.parameters()))
    inside = field.vertices(12).norm(dim=-1) < 0.8
    assert (density[0, 0][inside] != 0).all()
    assert (colour[0, :, inside] != 0).all()


def test_the_density_grid_is_indexed_x_y_z_and_empty_outside_the_ball() -> None:
    field = VoxelField(9).double()
    field.density.data.fill_(-30.0)
    field.density.data[0, 0, 4, 5, 6] = 2.0
    grid = field.density_grid(9)
    assert grid.argmax() == 6 * 81 + 5 * 9 + 4
    assert grid[6, 5, 4].item() == pytest.approx(field.density_scale * torch.nn.functional.softplus(torch.tensor(2.0)))
    assert filled(1.0).density_grid(5)[0, 0, 0] == 0


def test_colours_are_looked_up_at_points() -> None:
    field = VoxelField(9).double()
    field.colour.data[0, 1, 4, 5, 6] = 3.0
    vertex = field.vertices(9)[4, 5, 6].double()
    colours = field.colour_at(torch.stack([vertex, -vertex]))
    expected = torch.sigmoid(torch.tensor(3.0)).item()
    assert colours.tolist() == [[0.5, pytest.approx(expected), 0.5], [0.5, 0.5, 0.5]]


def test_total_variation_is_zero_for_a_constant_field_only() -> None:
    field = filled(1.0)
    assert field.total_variation() == 0
    assert random_field().total_variation() > 0.1


def test_sparsity_prefers_clear_and_entropy_prefers_clear_or_solid() -> None:
    clear, haze, solid = (torch.full((1, 1, 2, 2), value) for value in (0.0, 0.5, 1.0))
    assert opacity_sparsity(clear) < opacity_sparsity(haze) < opacity_sparsity(solid)
    assert opacity_entropy(haze).item() == pytest.approx(1.0)
    assert opacity_entropy(clear) < 0.02
    assert opacity_entropy(solid) < 0.02


@pytest.mark.parametrize(("resolution", "samples"), [(1, 8), (8, 0)])
def test_impossible_settings_are_refused(resolution: int, samples: int) -> None:
    with pytest.raises(ValueError, match="resolution >= 2 and samples >= 1"):
        VoxelField(resolution, samples)


def test_a_field_learns_an_object_from_its_pictures() -> None:
    seen, held_out = held_out_cameras(12), held_out_cameras(24)[1::8]
    truth, expected = render_object("a red chair", seen, 20), render_object("a red chair", held_out, 20)
    field, generator = VoxelField(20, 24), torch.Generator().manual_seed(0)
    optimiser = torch.optim.Adam(
        [{"params": [field.density], "lr": 0.3}, {"params": [field.colour], "lr": 0.1}], betas=(0.9, 0.99)
    )
    for _ in range(60):
        which = torch.randperm(12, generator=generator)[:3]
        rgb, _ = field(seen[which], 20, generator)
        optimiser.zero_grad()
        (rgb - truth[which]).square().mean().backward()
        optimiser.step()
    with torch.no_grad():
        error = (field(held_out, 20)[0] - expected).square().mean()
    assert -10 * error.log10() > 20


def test_compositing_is_that_of_nerfacc() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nerfacc's own, at import
        from nerfacc.volrend import render_weight_from_density
    generator = torch.Generator().manual_seed(0)
    step = 0.01 + 0.1 * torch.rand(50, generator=generator, dtype=torch.float64)
    density = 30 * torch.rand(50, 16, generator=generator, dtype=torch.float64)
    depth = torch.arange(17) * step[:, None]
    weights, passed = _absorb(step, density)
    theirs, _, _ = render_weight_from_density(depth[:, :-1], depth[:, 1:], density)
    torch.testing.assert_close(weights, theirs, rtol=0, atol=1e-12)
    torch.testing.assert_close(passed, 1 - theirs.sum(dim=1), rtol=0, atol=1e-12)
