"""Prompts and classes of diffusers teachers: encoded once, alike in any company, and cut with a warning."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from carv.teachers.base import Condition
from carv.teachers.diffusers import DiffusersTeacher

from pipeline_families import CASES, PROMPTS, loaded_families, saved_families
from tiny_pipelines import TOKENS, sd3


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return saved_families(tmp_path_factory.mktemp("pipelines"))


@pytest.fixture(scope="module")
def teachers(folders: Callable[[str], Path]) -> Callable[[str], DiffusersTeacher]:
    return loaded_families(folders)


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux", "wan"])
def test_a_prompt_is_encoded_once_and_alike_in_any_company(name: str, folders: Callable[[str], Path]) -> None:
    teacher = DiffusersTeacher.from_pretrained(folders(name), **CASES[name].load)
    calls: list[int] = []
    for text in teacher._family.text:
        text.model.register_forward_hook(lambda *_: calls.append(1))
    together = teacher.encode_prompts([*PROMPTS, *PROMPTS])
    assert len(calls) == 2 * len(teacher._family.text)
    fresh = DiffusersTeacher.from_pretrained(folders(name), **CASES[name].load)
    alone = fresh.encode_prompts([PROMPTS[1]])
    for key, tensor in alone.tensors.items():
        assert torch.equal(tensor[0], together.tensors[key][1])
        assert torch.equal(tensor[0], together.tensors[key][3])


def test_released_text_encoders_leave_the_prompts_that_were_encoded(folders: Callable[[str], Path]) -> None:
    teacher = DiffusersTeacher.from_pretrained(folders("sd"))
    before = teacher.encode_prompts(PROMPTS)
    teacher.release_text_encoders()
    assert not teacher._family.text
    assert torch.equal(teacher.encode_prompts(PROMPTS).tensors["embeddings"], before.tensors["embeddings"])
    with pytest.raises(ValueError, match="'a new one' is new, and the text encoders were released"):
        teacher.encode_prompts(["a new one"])


def test_a_prompt_that_is_too_long_is_cut_with_a_warning(teachers: Callable[[str], DiffusersTeacher]) -> None:
    with pytest.warns(UserWarning, match="the teacher reads 16 tokens of a prompt, and 'abcdefghijklmnopqrs' has 21"):
        teachers("sd").encode_prompts(["abcdefghijklmnopqrs"])


def test_sdxl_is_told_the_size_of_the_picture(folders: Callable[[str], Path]) -> None:
    teacher = DiffusersTeacher.from_pretrained(folders("sdxl"), size=(32, 24))
    assert teacher.latent_shape == (4, 16, 12)
    assert teacher.encode_prompts(["a"]).tensors["sizes"].tolist() == [[32, 24, 0, 0, 32, 24]]


def test_sd3_without_t5_gets_zeros_in_its_place(tmp_path: Path) -> None:
    sd3(with_t5=False).save_pretrained(tmp_path)
    teacher = DiffusersTeacher.from_pretrained(tmp_path)
    embeddings = teacher.encode_prompts(["a"]).tensors["embeddings"]
    assert embeddings.shape == (1, TOKENS + 256, 40)
    assert bool((embeddings[:, TOKENS:] == 0).all())
    assert bool((embeddings[:, :TOKENS, :32] != 0).all())


def test_dit_knows_its_classes_by_number_and_name(teachers: Callable[[str], DiffusersTeacher]) -> None:
    teacher = teachers("dit")
    labels = teacher.encode_prompts(["0", "999", "Tench", "tinca tinca", ""]).tensors["label"]
    assert labels.tolist() == [0, 999, 7, 7, 1000]
    with pytest.raises(ValueError, match="'crane' names the classes 134, 517: give the number"):
        teacher.encode_prompts(["crane"])
    for unknown in ("1000", "-1", "a red chair"):
        with pytest.raises(ValueError, match=f"'{unknown}' is no class of this DiT: give a number in 0..999 or a name"):
            teacher.encode_prompts([unknown])


def test_the_condition_is_one_row_a_prompt(teachers: Callable[[str], DiffusersTeacher]) -> None:
    for name, case in CASES.items():
        condition = teachers(name).encode_prompts([*case.prompts, ""])
        assert isinstance(condition, Condition)
        assert len(condition) == 3
