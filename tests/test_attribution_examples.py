"""Videos and pictures as examples: found, captioned, decoded and fitted, and each mistake in one sentence."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from carv.tasks.attribution.examples import Example, encode, fit, read_examples


def frames(count: int, height: int = 8, width: int = 8, seed: int = 0) -> np.ndarray:
    """Grey frames, which a GIF keeps exactly."""
    drawn = np.random.default_rng(seed).integers(0, 256, (count, height, width, 1), dtype=np.uint8)
    return np.repeat(drawn, 3, -1)


def write_gif(path: Path, pictures: np.ndarray) -> Path:
    images = [Image.fromarray(frame[..., 0], "L") for frame in pictures]
    images[0].save(path, save_all=True, append_images=images[1:], duration=100)
    return path


def write_png(path: Path, picture: np.ndarray) -> Path:
    Image.fromarray(picture).save(path)
    return path


def write_video(path: Path, pictures: np.ndarray, codec: str = "mpeg4") -> Path:
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=8)
        stream.height, stream.width = pictures.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for picture in pictures:
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


def caption(folder: Path, **captions: str) -> None:
    (folder / "captions.json").write_text(json.dumps({name.replace("_", "."): text for name, text in captions.items()}))


# Finding and captions


def test_examples_come_sorted_by_name_whatever_the_order_of_the_files(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name in ("b.gif", "a.gif", "deep/c.gif"):
        write_gif(tmp_path / name, frames(2, seed=len(name) + ord(name[0])))
    (tmp_path / ".hidden.gif").write_bytes(b"")
    (tmp_path / "labels.json").write_text("{}")
    whole = read_examples(tmp_path, prompt="x")
    assert [example.name for example in whole] == ["a.gif", "b.gif", "deep/c.gif"]
    files = [tmp_path / "deep" / "c.gif", tmp_path / "b.gif", tmp_path / "a.gif"]
    assert [example.digest for example in read_examples(files, prompt="x")] == [example.digest for example in whole]


def test_captions_come_from_the_json_then_the_text_then_the_prompt(tmp_path: Path) -> None:
    for i, name in enumerate(("a.gif", "b.gif", "c.gif")):
        write_gif(tmp_path / name, frames(2, seed=i))
    caption(tmp_path, a_gif="from json")
    (tmp_path / "a.txt").write_text("not this")
    (tmp_path / "b.txt").write_text("from text\n")
    found = {example.name: example.caption for example in read_examples(tmp_path, prompt="from prompt")}
    assert found == {"a.gif": "from json", "b.gif": "from text", "c.gif": "from prompt"}
    assert read_examples(tmp_path / "a.gif")[0].caption == "from json"
    with pytest.raises(ValueError, match=r"1 of 3 files have no caption, .*c\.gif among them: give them in"):
        read_examples(tmp_path)


def test_the_digest_is_of_bytes_and_caption(tmp_path: Path) -> None:
    one, two = write_gif(tmp_path / "a.gif", frames(2)), write_gif(tmp_path / "b.gif", frames(2, seed=1))
    assert Example.of(one, "x").digest == Example.of(one, "x", "other name").digest
    assert len({Example.of(path, text).digest for path in (one, two) for text in ("x", "y")}) == 4
    assert Example.of(one, "x").content == Example.of(one, "y").content != Example.of(two, "x").content


def test_files_of_one_name_in_two_folders_keep_apart(tmp_path: Path) -> None:
    for i, folder in enumerate(("one", "two")):
        (tmp_path / folder).mkdir()
        write_gif(tmp_path / folder / "a.gif", frames(2, seed=i))
    names = [example.name for example in read_examples([tmp_path / "one", tmp_path / "two"], prompt="")]
    assert len(set(names)) == 2
    assert all(name.endswith("a.gif") for name in names)


def test_duplicates_are_passed_over_with_a_warning_that_names_them(tmp_path: Path) -> None:
    for name in ("a.gif", "b.gif", "c.gif"):
        write_gif(tmp_path / name, frames(2))
    caption(tmp_path, a_gif="x", b_gif="x", c_gif="y")
    with pytest.warns(UserWarning, match=r"same file and caption: b\.gif \(as a\.gif\)$"):
        found = read_examples(tmp_path)
    assert [example.name for example in found] == ["a.gif", "c.gif"]
    again = read_examples([tmp_path / "c.gif", tmp_path / "c.gif"])  # named twice is not a copy
    assert len(again) == 1


def test_what_cannot_be_found_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match="is not there"):
        read_examples(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no videos or pictures"):
        read_examples(tmp_path)
    with pytest.raises(ValueError, match="neither a video nor a picture"):
        read_examples(tmp_path / "notes.txt")
    with pytest.raises(ValueError, match="at least one folder"):
        read_examples([])
    write_gif(tmp_path / "a.gif", frames(2))
    for text in ("{", "[1]", '{"a.gif": 3}'):
        (tmp_path / "captions.json").write_text(text)
        with pytest.raises(ValueError, match=r"captions\.json (is not valid JSON|must be a JSON object)"):
            read_examples(tmp_path)


# Decoding


def test_gifs_and_pictures_are_decoded_exactly(tmp_path: Path) -> None:
    clip, picture = frames(5), frames(1, 6, 9, seed=1)[0]
    found = Example.of(write_gif(tmp_path / "a.gif", clip), "x").pictures()
    assert found.shape == (3, 5, 8, 8)
    torch.testing.assert_close(found, torch.from_numpy(clip).movedim(-1, 0) / 255)
    found = Example.of(write_png(tmp_path / "a.png", picture), "x").pictures()
    assert found.shape == (3, 6, 9)
    torch.testing.assert_close(found, torch.from_numpy(picture).movedim(-1, 0) / 255)


@pytest.mark.parametrize("suffix", [".mp4", ".avi", ".mov", ".mkv"])
def test_videos_are_decoded(suffix: str, tmp_path: Path) -> None:
    ramp = np.linspace(20, 220, 32)[None, None, :, None] * np.ones((6, 16, 1, 3)) + np.arange(6)[:, None, None, None]
    example = Example.of(write_video(tmp_path / f"a{suffix}", ramp.astype(np.uint8)), "x")
    found = example.pictures()
    assert found.shape == (3, 6, 16, 32)
    assert (found - torch.from_numpy(ramp).movedim(-1, 0) / 255).abs().mean() < 0.03
    assert torch.equal(example.pictures(2), found[:, :2])


def test_a_video_of_one_frame_is_a_video_and_a_gif_of_one_frame_a_picture(tmp_path: Path) -> None:
    assert Example.of(write_video(tmp_path / "a.mp4", frames(1, 16, 16)), "x").pictures().ndim == 4
    assert Example.of(write_gif(tmp_path / "a.gif", frames(1)), "x").pictures().ndim == 3


def test_files_that_cannot_be_decoded_are_one_sentence(tmp_path: Path) -> None:
    empty, torn, text = tmp_path / "empty.gif", tmp_path / "torn.png", tmp_path / "text.gif"
    empty.write_bytes(b"")
    torn.write_bytes(write_png(tmp_path / "whole.png", frames(1, 64, 64)[0]).read_bytes()[:2000])
    text.write_text("not a picture")
    with pytest.raises(ValueError, match=r"empty\.gif is empty"):
        Example.of(empty, "x").pictures()
    for path in (torn, text):
        with pytest.raises(ValueError, match=rf"{path.name} cannot be decoded .*: it is damaged, or not what"):
            Example.of(path, "x").pictures()


def test_videos_that_cannot_be_decoded_are_one_sentence(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    whole = write_video(tmp_path / "whole.mp4", frames(8, 32, 32)).read_bytes()
    torn = tmp_path / "torn.mp4"
    torn.write_bytes(whole[: len(whole) // 2])  # without its table of contents, which is at the end
    sound = tmp_path / "sound.mkv"
    with av.open(str(sound), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        silence.sample_rate = 8000
        for packet in [*stream.encode(silence), *stream.encode()]:
            container.mux(packet)
    for path in (torn, sound):
        with pytest.raises(ValueError, match=rf"{path.name} cannot be decoded"):
            Example.of(path, "x").pictures()


def test_frames_of_several_sizes_are_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from carv.tasks.attribution import decode

    sizes = [frames(1, 8, 8)[0], frames(1, 8, 12)[0]]
    monkeypatch.setattr(decode, "_pictures", lambda _: iter(sizes))
    with pytest.raises(ValueError, match=r"a\.gif has frames of several sizes: 8 x 8 and 12 x 8"):
        Example.of(write_gif(tmp_path / "a.gif", frames(2)), "x").pictures()
    monkeypatch.setattr(decode, "_pictures", lambda _: iter(()))
    with pytest.raises(ValueError, match="has no frames"):
        Example.of(tmp_path / "a.gif", "x").pictures()


# Fitting


def test_frames_are_trimmed_to_one_and_a_multiple() -> None:
    for count, most, kept in ((1, 9, 1), (4, 9, 1), (5, 9, 5), (12, 9, 9), (17, None, 13), (30, 6, 5)):
        clip = torch.rand(3, count, 8, 8)
        assert torch.equal(fit(clip, (3, 13, 8, 8), most), clip[:, :kept])
    assert fit(torch.rand(3, 8, 8), (3, 13, 8, 8)).shape == (3, 1, 8, 8)


@pytest.mark.parametrize(("height", "width"), [(16, 48), (48, 16), (5, 7), (200, 64)])
def test_other_sizes_are_cropped_at_the_centre_and_resized_without_distortion(height: int, width: int) -> None:
    """The centre of a ramp stays where it is, and across a picture its slope is that of the cropped part."""
    across = (torch.arange(width) + 0.5) / width
    picture = across.expand(3, height, width)
    small = fit(picture, (3, 8, 16))
    assert small.shape == (3, 8, 16)
    torch.testing.assert_close(small.mean(), torch.tensor(0.5), atol=0.05, rtol=0)
    share = min(1.0, height * 2 / width)
    inner = small[0, 4, 3:-3].diff()
    torch.testing.assert_close(inner, torch.full_like(inner, share / 16), atol=0.25 * share / 16, rtol=0)
    clip = picture[:, None].expand(3, 5, height, width)
    torch.testing.assert_close(fit(clip, (3, 5, 8, 16)), small[:, None].expand(3, 5, 8, 16))


def test_what_does_not_fit_is_one_sentence() -> None:
    with pytest.raises(ValueError, match="takes pictures, got a video of 5 frames"):
        fit(torch.rand(3, 5, 8, 8), (3, 8, 8))
    with pytest.raises(ValueError, match="max_frames must be at least 1"):
        fit(torch.rand(3, 5, 8, 8), (3, 5, 8, 8), -1)


class Encoder:
    """As much of a teacher as `encode` asks for; a latent frame is the mean of its frames."""

    device = torch.device("cpu")
    frames_per_latent = 4

    def __init__(self, *picture_shape: int) -> None:
        self.picture_shape = picture_shape

    def with_frames(self, count: int) -> Encoder:
        return Encoder(3, count, *self.picture_shape[-2:])

    def encode(self, pictures: torch.Tensor) -> torch.Tensor:
        assert pictures.shape[1:] == self.picture_shape
        return pictures


def test_each_clip_is_encoded_at_its_own_length_and_mistakes_name_the_file(tmp_path: Path) -> None:
    long, short = frames(12), frames(6, seed=1)
    examples = [Example.of(write_gif(tmp_path / f"{len(c)}.gif", c), "x") for c in (long, short)]
    teacher = Encoder(3, 9, 8, 8)
    assert [encode(teacher, e).shape[1] for e in examples] == [9, 5]  # type: ignore[arg-type]
    assert [encode(teacher, e, 5).shape[1] for e in examples] == [5, 5]  # type: ignore[arg-type]
    torch.testing.assert_close(
        encode(teacher, examples[0]),  # type: ignore[arg-type]
        torch.from_numpy(long[:9]).movedim(-1, 0) / 255,
    )
    with pytest.raises(ValueError, match=r"12\.gif: this teacher takes pictures, got a video"):
        encode(Encoder(3, 8, 8), examples[0])  # type: ignore[arg-type]
    picture = Example.of(write_png(tmp_path / "a.png", frames(1)[0]), "x")
    assert encode(Encoder(3, 8, 8), picture).shape == (3, 8, 8)  # type: ignore[arg-type]
