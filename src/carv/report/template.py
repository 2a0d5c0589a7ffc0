"""From a template to a page: one HTML file in our style, in which all text but our own is escaped."""

from __future__ import annotations

import json
import re
from importlib.resources import files
from typing import Any

from carv.extras import require
from carv.report.style import COLOURS


def fill(name: str, /, **given: Any) -> str:
    """The page of a template, as text.

    Templates extend `base.html`, which has the head, the colours and the switch between light and dark. A name that a
    template uses and that is not given is an error.

    Args:
        name: of the template, a file beside this one.
        given: what it shows, with the `title`, and `has_pictures` where the page may hold some.

    Raises:
        ImportError: jinja2 is missing; the message says how to install it.
    """
    jinja2 = require("jinja2", "report")
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_ours),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["fine"] = _fine
    text: str = environment.get_template(name).render(css=_css(), **given)
    return text


def written(value: Any) -> str:
    """A setting as the page shows it: text as it is, all else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _css() -> str:
    light, dark = (" ".join(f"--{name}: {pair[i]};" for name, pair in COLOURS.items()) for i in (0, 1))
    return _ours("page.css").replace("/* LIGHT */", light).replace("/* DARK */", dark)


def _ours(name: str) -> str:
    return (files("carv.report") / name).read_text(encoding="utf-8")


def _fine(text: str) -> str:
    """Numbers stay with their units, and the two of (R, K) together, where lines break."""
    text = re.sub(r"(\d) (%)", "\\1\u00a0\\2", text)
    return re.sub(r"\((\w+), (\w+)\)", "(\\1,\u00a0\\2)", text)
