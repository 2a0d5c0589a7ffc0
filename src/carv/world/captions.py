"""The teacher's language: `a {colour} {shape}`, then `, {front|side|back|overhead} view` if wanted."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from carv.world.cameras import VIEW_WORDS
from carv.world.shapes import COLOURS, SHAPES


@dataclass(frozen=True)
class Prompt:
    """What a prompt says; None where it says nothing. All None is the empty prompt, which describes everything.

    Attributes:
        colour: a key of `COLOURS`.
        shape: a key of `SHAPES`.
        view: one of `VIEW_WORDS`.
    """

    colour: str | None = None
    shape: str | None = None
    view: str | None = None

    def __str__(self) -> str:
        """The prompt as the grammar writes it.

        Example:
            >>> str(Prompt("orange", "cup", "side")), str(Prompt())
            ('an orange cup, side view', '')
        """
        if self.shape is None:
            return ""
        noun = self.shape if self.colour is None else f"{self.colour} {self.shape}"
        article = "an" if noun[0] in "aeiou" else "a"
        return f"{article} {noun}" + ("" if self.view is None else f", {self.view} view")


HELD_OUT = (
    ("torus", "red"), ("cup", "orange"), ("cube", "yellow"), ("rocket", "green"),
    ("house", "cyan"), ("mushroom", "blue"), ("duck", "purple"), ("car", "pink"),
)  # fmt: skip
"""Shape and colour of the objects that carv's small Stable Diffusion never sees in training, each at most once."""

_GRAMMAR = re.compile(
    rf"((a|an|the) )?((?P<colour>{'|'.join(COLOURS)}) )?(?P<shape>{'|'.join(SHAPES)})"
    rf"( (?P<view>{'|'.join(VIEW_WORDS)}) view)?"
)
_KNOWN = {"a", "an", "the", "view", *COLOURS, *SHAPES, *VIEW_WORDS}


def parse_prompt(text: str) -> Prompt:
    """Reads a prompt; case, commas, articles and extra spaces do not matter, and the colour may be left out.

    Args:
        text: such as "a red chair", "a chair, back view", or "" (unconditional).

    Raises:
        ValueError: a word is unknown, or the words are not in the grammar's order.

    Example:
        >>> parse_prompt("a red chair, front view")
        Prompt(colour='red', shape='chair', view='front')
    """
    words = text.lower().replace(",", " ").split()
    if not words:
        return Prompt()
    unknown = next((word for word in words if word not in _KNOWN), None)
    if unknown is not None:
        raise ValueError(
            f"the teacher does not know the word {unknown!r}: it knows the shapes {_list(SHAPES)}, "
            f"the colours {_list(COLOURS)} and the views {_list(VIEW_WORDS)}"
        )
    match = _GRAMMAR.fullmatch(" ".join(words))
    if match is None:
        raise ValueError(
            f"the prompt {text!r} is not of the form 'a COLOUR SHAPE' or 'a COLOUR SHAPE, VIEW view', "
            "such as 'a red chair, front view'"
        )
    return Prompt(match["colour"], match["shape"], match["view"])


def parse_object(text: str) -> Prompt | None:
    """The object that a prompt describes, without its view; None if it lacks a colour or a shape, or is of another
    language.

    Example:
        >>> parse_object("the red chair, side view"), parse_object("a wooden chair")
        (Prompt(colour='red', shape='chair', view=None), None)
    """
    try:
        prompt = parse_prompt(text)
    except ValueError:
        return None
    if prompt.colour is None or prompt.shape is None:
        return None
    return Prompt(prompt.colour, prompt.shape)


def object_captions() -> list[str]:
    """The caption of each of the world's objects, without a view: the candidates of R-precision.

    Example:
        >>> len(object_captions()), object_captions()[0]
        (128, 'a red sphere')
    """
    return [str(Prompt(colour, shape)) for shape in SHAPES for colour in COLOURS]


def _list(words: Iterable[str]) -> str:
    return ", ".join(words)
