"""The small world: cameras, objects, pictures and captions."""

from __future__ import annotations

import itertools

import pytest
import torch

from carv.gradient import Renders
from carv.rng import stream
from carv.world.cameras import PAPER_RANGE, VIEW_WORDS, WORLD_RANGE, CameraRange, Cameras, held_out_cameras, view_word
from carv.world.captions import Prompt, parse_prompt
from carv.world.render import BACKGROUND, colourise, render_object, render_parts
from carv.world.shapes import COLOURS, RADIUS, SHAPES

FACING = ("chair", "house", "snowman", "cup", "car", "duck")


def camera(azimuth: float, elevation: float, distance: float = 3.0, fov: float = 40.0) -> Cameras:
    return Cameras(*(torch.tensor([value]) for value in (azimuth, elevation, distance, fov)))


def step_renders(step: int, first: int, count: int, total: int) -> Renders:
    streams = tuple(stream(0, "step", step, "render", first + i) for i in range(count))
    return Renders(streams, first, total)


# Cameras.


def test_rays_are_unit_and_start_at_the_camera() -> None:
    cameras = held_out_cameras(5)
    origins, directions = cameras.rays(7)
    assert torch.allclose(directions.norm(dim=-1), torch.ones(5, 7, 7))
    assert torch.allclose(origins.norm(dim=-1), cameras.distance)


@pytest.mark.parametrize("elevation", [-90.0, -10.0, 0.0, 45.0, 90.0])
def test_the_middle_ray_meets_the_origin(elevation: float) -> None:
    origins, directions = camera(123.0, elevation).rays(5)
    assert torch.allclose(origins[0] + 3.0 * directions[0, 2, 2], torch.zeros(3), atol=1e-5)


def test_the_field_of_view_spans_the_picture() -> None:
    size = 400
    _, directions = camera(10.0, 20.0, fov=50.0).rays(size)
    top, bottom = directions[0, 0, size // 2], directions[0, -1, size // 2]
    assert torch.rad2deg(torch.acos(top @ bottom)).item() == pytest.approx(50.0, abs=0.3)


def test_the_front_camera_is_on_plus_x_with_z_up_and_plus_y_to_the_right() -> None:
    origins, directions = camera(0.0, 0.0).rays(3)
    assert torch.allclose(origins[0], torch.tensor([3.0, 0.0, 0.0]), atol=1e-6)
    assert directions[0, 0, 1, 2] > 0.1
    assert directions[0, 1, 2, 1] > 0.1


def test_positive_elevation_is_above() -> None:
    assert camera(0.0, 30.0).rays(1)[0][0, 2] == pytest.approx(1.5)


def test_cameras_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="vectors of one length"):
        Cameras(torch.zeros(2), torch.zeros(3), torch.ones(2), torch.ones(2))


def test_the_world_range_frames_the_whole_ball() -> None:
    half_angle = torch.rad2deg(torch.asin(torch.tensor(RADIUS / WORLD_RANGE.distance))).item()
    assert half_angle < WORLD_RANGE.fov[0] / 2 < half_angle + 1


def test_samples_stay_in_the_range() -> None:
    cameras = PAPER_RANGE.sample(step_renders(0, 0, 200, 200), stratify_azimuth=False)
    for values, (low, high) in ((cameras.elevation, (-10, 45)), (cameras.fov, (15, 80)), (cameras.azimuth, (0, 360))):
        assert low <= values.min() < low + 0.1 * (high - low)
        assert high - 0.1 * (high - low) < values.max() <= high
    assert (cameras.distance == 2.0).all()


def test_azimuth_strata_cover_the_circle() -> None:
    cameras = WORLD_RANGE.sample(step_renders(3, 0, 16, 16), stratify_azimuth=True)
    assert torch.equal((cameras.azimuth / 22.5).long(), torch.arange(16))


@pytest.mark.parametrize("stratify_azimuth", [False, True])
def test_azimuths_are_marginally_uniform(stratify_azimuth: bool) -> None:
    steps = [WORLD_RANGE.sample(step_renders(step, 0, 4, 4), stratify_azimuth).azimuth for step in range(300)]
    azimuth = torch.cat(steps).sort().values / 360
    expected = (torch.arange(1200) + 0.5) / 1200
    # Kolmogorov-Smirnov, 0.1% level; the streams are fixed, so the outcome is as well.
    assert (azimuth - expected).abs().max() < 1.95 / 1200**0.5


def test_a_camera_does_not_depend_on_the_rank_that_draws_it() -> None:
    whole = WORLD_RANGE.sample(step_renders(5, 0, 6, 6), stratify_azimuth=True)
    part = WORLD_RANGE.sample(step_renders(5, 4, 2, 6), stratify_azimuth=True)
    assert torch.equal(whole[4:].azimuth, part.azimuth)
    assert torch.equal(whole[4:].elevation, part.elevation)


def test_a_range_that_goes_down_is_refused() -> None:
    with pytest.raises(ValueError, match="elevation range must go upwards"):
        CameraRange(elevation=(10.0, -10.0), fov=(40.0, 40.0), distance=3.0)


def test_every_view_word_occurs_in_the_world_range() -> None:
    cameras = WORLD_RANGE.sample(step_renders(0, 0, 100, 100), stratify_azimuth=True)
    assert set(cameras.words()) == set(VIEW_WORDS)


@pytest.mark.parametrize(
    ("azimuth", "elevation", "word"),
    [(44, 0, "front"), (316, 0, "front"), (-44, 0, "front"), (46, 0, "side"), (270, 0, "side"), (134, 0, "side"),
     (136, 0, "back"), (224, 0, "back"), (180, 30, "back"), (180, 31, "overhead"), (0, 45, "overhead")],
)  # fmt: skip
def test_view_words_follow_the_angles(azimuth: float, elevation: float, word: str) -> None:
    assert view_word(azimuth, elevation) == word


# Shapes.


@pytest.mark.parametrize("name", SHAPES)
def test_distances_are_1_lipschitz(name: str) -> None:
    generator = stream(0, "lipschitz", name).generator()
    first = torch.rand(4000, 3, generator=generator) * 2.4 - 1.2
    second = first + 0.2 * torch.randn(4000, 3, generator=generator)
    change = SHAPES[name].sample(first)[0] - SHAPES[name].sample(second)[0]
    assert (change.abs() <= (first - second).norm(dim=-1) + 1e-5).all()


@pytest.mark.parametrize("name", SHAPES)
def test_objects_fill_the_ball_and_stay_inside_it(name: str) -> None:
    points = torch.rand(60000, 3, generator=stream(0, "inside", name).generator()) * 2 - 1
    distance, part = SHAPES[name].sample(points)
    reach = points[distance < 0].norm(dim=-1).max()
    assert 0.75 < reach < RADIUS
    assert set(part[distance < 0].tolist()) == set(range(len(SHAPES[name].parts)))
    assert (distance[points.norm(dim=-1) > RADIUS] > 0).all()


@pytest.mark.parametrize("name", SHAPES)
def test_the_distance_alone_is_the_distance_of_the_nearest_part(name: str) -> None:
    points = torch.rand(1000, 3, generator=stream(0, "parts", name).generator()) * 2 - 1
    assert torch.equal(SHAPES[name].distance(*points.T.contiguous()), SHAPES[name].sample(points)[0])


@pytest.mark.parametrize("name", SHAPES)
def test_the_first_part_takes_the_prompts_colour_and_is_seen_most(name: str) -> None:
    assert SHAPES[name].parts[0].colour is None
    parts = render_parts(SHAPES[name], held_out_cameras(4), 24)
    seen = torch.bincount(parts.part[parts.hit], minlength=len(SHAPES[name].parts))
    assert seen.argmax() == 0


# Pictures.


def test_the_traced_sphere_is_where_the_rays_meet_it() -> None:
    cameras = held_out_cameras(3)
    origins, directions = cameras.rays(33)
    start = origins[:, None, None].expand_as(directions)
    miss = (start - (start * directions).sum(-1, keepdim=True) * directions).norm(dim=-1)
    hit = render_parts(SHAPES["sphere"], cameras, 33).hit
    clear = (miss - 0.8).abs() > 0.01
    assert torch.equal(hit[clear], (miss < 0.8)[clear])


def test_the_cups_handle_is_on_the_right_of_the_front_and_on_the_left_of_the_back() -> None:
    hit = render_parts(SHAPES["cup"], Cameras(*torch.tensor([[0.0, 180], [5, 5], [3, 3], [40, 40]])), 32).hit
    width = hit.any(dim=1).float()
    right = (width @ torch.arange(32.0)) / width.sum(-1) - 15.5  # the middle of the silhouette, in pixels
    assert right[0] > 0.8
    assert right[1] < -0.8


def test_the_rocket_points_up() -> None:
    hit = render_parts(SHAPES["rocket"], camera(0, 5), 32).hit[0]
    rows = hit.any(dim=1).nonzero()[:, 0]
    assert hit[rows[0]].sum() < hit[rows[-3]].sum()


@pytest.mark.parametrize("name", FACING)
def test_views_mean_something(name: str) -> None:
    parts = [render_parts(SHAPES[name], camera(azimuth, 10), 32) for azimuth in (0, 90, 180)]
    # By what is seen where, whatever the light.
    front, side, back = (torch.where(seen.hit, seen.part, -1) for seen in parts)
    assert (front != side).sum() > 10
    assert (front != back).sum() > 10


def test_every_shape_differs_from_every_other_in_its_pictures() -> None:
    pictures = {name: render_object(f"a red {name}", held_out_cameras(4)[1:3], 16) for name in SHAPES}
    for first, second in itertools.combinations(SHAPES, 2):
        assert (pictures[first] - pictures[second]).abs().mean() > 0.02, (first, second)


def test_colours_are_told_apart_in_sun_and_shade() -> None:
    assert len(COLOURS) >= 8
    shape = SHAPES["sphere"]
    parts = render_parts(shape, held_out_cameras(4), 16)
    means = {
        name: colourise(shape, parts, colour).movedim(1, -1)[parts.hit].mean(0) for name, colour in COLOURS.items()
    }
    for first, second in itertools.combinations(COLOURS, 2):
        # By hue alone, whatever the light.
        cosine = torch.nn.functional.cosine_similarity(means[first], means[second], dim=0)
        assert cosine < 0.98, (first, second)
        assert (means[first] - means[second]).norm() > 0.2, (first, second)


def test_pictures_are_in_range_on_the_background() -> None:
    picture = render_object("a yellow duck", held_out_cameras(3), 16)
    assert picture.shape == (3, 3, 16, 16)
    assert picture.min() >= 0
    assert picture.max() <= 1
    assert torch.allclose(picture[:, :, 0, 0], torch.tensor(BACKGROUND).expand(3, 3))


def test_a_picture_does_not_depend_on_the_other_cameras_of_the_batch() -> None:
    cameras = held_out_cameras(3)
    assert torch.equal(render_object("a red car", cameras, 16)[1:2], render_object("a red car", cameras[1:2], 16))


@pytest.mark.parametrize("caption", ["", "a chair"])
def test_only_a_whole_caption_can_be_drawn(caption: str) -> None:
    with pytest.raises(ValueError, match="colour and a shape"):
        render_object(caption, held_out_cameras(1), 8)


# Captions.


@pytest.mark.parametrize(
    ("text", "prompt"),
    [
        ("a red chair", Prompt("red", "chair")),
        ("an orange cup, side view", Prompt("orange", "cup", "side")),
        ("  A  Red   CHAIR ,overhead view ", Prompt("red", "chair", "overhead")),
        ("a chair", Prompt(None, "chair")),
        ("blue car back view", Prompt("blue", "car", "back")),
        ("", Prompt()),
        ("   ", Prompt()),
    ],
)
def test_prompts_are_read(text: str, prompt: Prompt) -> None:
    assert parse_prompt(text) == prompt


def test_every_prompt_is_read_back_from_its_text() -> None:
    for colour, shape, view in itertools.product((None, *COLOURS), SHAPES, (None, *VIEW_WORDS)):
        prompt = Prompt(colour, shape, view)
        assert parse_prompt(str(prompt)) == prompt
    assert parse_prompt(str(Prompt())) == Prompt()


def test_an_unknown_word_is_named_with_all_that_are_known() -> None:
    with pytest.raises(ValueError) as raised:
        parse_prompt("a red Hamburger, front view")
    message = str(raised.value)
    assert "'hamburger'" in message
    assert "\n" not in message
    assert all(word in message for word in (*SHAPES, *COLOURS, *VIEW_WORDS))


@pytest.mark.parametrize("text", ["a red", "a chair red", "front view", "a red chair view", "a red blue chair"])
def test_words_out_of_order_are_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match="'a red chair, front view'"):
        parse_prompt(text)
