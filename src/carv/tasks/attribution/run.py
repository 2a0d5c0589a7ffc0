"""`carv attribute`: the training examples behind a teacher's behaviour on some queries, with errors, resumable."""

from __future__ import annotations

import shutil
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from carv.console import Report
from carv.devices import find_device
from carv.extras import require
from carv.provenance import provenance
from carv.rng import stream
from carv.tasks.attribution.collect import Collector
from carv.tasks.attribution.config import AttributionConfig
from carv.tasks.attribution.examples import Example, read_examples
from carv.tasks.attribution.projector import jl_error
from carv.tasks.attribution.results import RESULTS, SCORES, score_rows, write_media, write_results
from carv.tasks.attribution.scores import draw_cosines, draw_products, zero_draws
from carv.tasks.attribution.stability import Estimate, Ranking, estimate, ranking
from carv.teachers import small
from carv.teachers.diffusers import DiffusersTeacher

CLIPS = "clips"
_SMALL_WAN = {"size": 32, "frames": 17}


@dataclass(eq=False)
class _Query:
    """One query, the examples that it ranks, and what is known of their order so far."""

    example: Example
    candidates: list[int]
    excluded: list[str]
    terms: Tensor = field(default_factory=lambda: torch.empty(0, 0))
    found: Estimate | None = None
    ranked: Ranking | None = None
    stable_at: int | None = None
    curve: list[dict[str, Any]] = field(default_factory=list)


def run(config: AttributionConfig, out: Path, overwrite: bool = False, quiet: bool = False) -> dict[str, Any]:
    """Rank the training examples for every query, and write results.json, scores.csv and small pictures of both ends.

    Latents and projected gradients stay in OUT/cache: after a stop at any time, with a larger budget, more examples
    or other queries, the same folder goes on with what it has. It refuses another teacher, bank or projection.

    Args:
        config: the settings.
        out: the run's folder.
        overwrite: start again where the folder holds gradients of other settings.
        quiet: say nothing but errors.

    Returns:
        What results.json holds.

    Raises:
        RunFolderError: the folder holds a run with other settings, or the disk is full.
        ValueError: bad settings, files that cannot be read, examples without captions, a gradient that is not finite.
        ImportError: a package that the teacher or the files need is not installed.
    """
    config.masks_folder()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        train, queries = _examples(config, out)
    notes = [str(warning.message) for warning in caught]
    collectors = _collectors(config, out, overwrite)
    everyone = list({example.digest: example for example in [*train, *(query.example for query in queries)]}.values())
    with Report("carv attribute", config.budgets[-1] * len(everyone) * len(collectors), quiet) as report:
        for note in notes:
            report.say(note)
        zeros = torch.zeros(len(train), dtype=torch.long)
        made = budget = before = 0
        for budget in config.budgets:

            def done(draws: int, upto: int = budget) -> None:
                nonlocal made
                made += draws
                report.update(made, f"up to {upto} draws")

            for collector in collectors:
                collector.extend(everyone, before, budget, done)
            zeros += _extend_terms(collectors, train, queries, before, budget)
            for query in queries:
                _look(config, collectors[0], query, budget)
            before = budget
            report.update(made, _state(queries, config))
            if config.until_stable and all(query.stable_at is not None for query in queries):
                break
    notes += _notes(collectors[0], everyone, train, zeros, queries)
    results = _results(config, collectors[0], train, queries, budget, notes, out)
    write_results(out, results)
    return results


def load_teacher(config: AttributionConfig) -> DiffusersTeacher:
    """The teacher that the settings name.

    Raises:
        ValueError: not a pipeline that carv reads; no such device.
        ImportError: diffusers or transformers is not installed.
    """
    given = {name: getattr(config, name) for name in ("size", "frames", "max_tokens")}
    if config.teacher == "small":
        given = _SMALL_WAN | {name: value for name, value in given.items() if value is not None}
    folder: str | Path = config.teacher
    if folder in ("small", "small-dit"):
        folder = small.small_wan() if folder == "small" else small.small_dit()
    device, dtype = find_device(config.device), getattr(torch, config.teacher_dtype)
    return DiffusersTeacher.from_pretrained(folder, device=device, dtype=dtype, **given)


def summary(results: dict[str, Any], out: Path) -> str:
    """The results in a few lines: for each query its most influential examples, and how sure that is.

    Args:
        results: from `run`.
        out: the run's folder.
    """
    k = results["config"]["top_k"]
    lines = [f"{len(results['examples'])} examples, {results['draws']} draws each, {results['design']}"]
    for query in results["queries"]:
        best = query["scores"][0]
        lines.append(
            f"{query['name']}: most influential is {best['example']} with {best['score']:.3f} +- "
            f"{best['standard_error']:.3f}; the top {min(k, len(query['scores']))} are right with probability "
            f"{_percent(query['p_top_k'])}"
        )
    if results["config"]["until_stable"]:
        open_ = sum(query["stable_at"] is None for query in results["queries"])
        lines.append(f"{open_} of {len(results['queries'])} queries are not stable yet: give more draws" * bool(open_))
    lines += [f"note: {note}" for note in results["notes"]]
    lines.append(f"wrote {out}/{RESULTS} and {SCORES}")
    return "\n".join(line for line in lines if line)


def _percent(p: float) -> str:
    return "over 99.9 %" if p > 0.999 else f"{100 * p:.1f} %"


def _examples(config: AttributionConfig, out: Path) -> tuple[list[Example], list[_Query]]:
    paths = [str(_own_clips(config, out)) if path == CLIPS else path for path in config.train]
    train = read_examples(paths, config.prompt)
    queries = []
    for example in read_examples(list(config.query), config.prompt):
        same = {i for i, other in enumerate(train) if other.content == example.content and config.exclude_query}
        candidates = [i for i in range(len(train)) if i not in same]
        if not candidates:
            raise ValueError(f"there is nothing to rank for the query {example.name}: it is the only training example")
        queries.append(_Query(example, candidates, [train[i].name for i in sorted(same)]))
    return train, queries


def _own_clips(config: AttributionConfig, out: Path) -> Path:
    """carv's training set of the small Wan, as files; those that are there stay."""
    require("sklearn", "attribution")
    from carv.world.clips import make_clips, write_clips  # needs scikit-learn's digits

    folder = out / f"clips-{config.clips}"
    if not (folder / "labels.json").exists():  # which is written last
        write_clips(make_clips(config.clips, 0), folder)
    return folder


def _collectors(config: AttributionConfig, out: Path, overwrite: bool) -> list[Collector]:
    """The teacher's, and one for each checkpoint, each with a cache of its own."""
    made: list[Collector] = []
    asked = config
    for name in (config.teacher, *config.checkpoints):
        teacher = load_teacher(replace(asked, teacher=name))
        cache = out / (f"cache-{len(made)}" if made else "cache")
        if overwrite and (cache / "cache.json").exists():
            shutil.rmtree(cache)
        made.append(Collector(config, teacher, cache))
        if teacher.latent_shape != made[0].teacher.latent_shape:
            raise ValueError(
                f"checkpoints are states of one network, but the latents of {name} are {teacher.latent_shape} and "
                f"those of {config.teacher} {made[0].teacher.latent_shape}"
            )
        shape = teacher.picture_shape  # whatever the teacher's defaults are, its checkpoints see the same
        asked = replace(config, size=shape[-1], frames=shape[1] if len(shape) == 4 else config.frames)
    return made


def _extend_terms(
    collectors: list[Collector], train: list[Example], queries: list[_Query], first: int, last: int
) -> Tensor:
    """Add the terms of Eq. 11 of the draws first, ..., last - 1; returns how many of them were zero gradients."""
    new = torch.zeros(len(queries), len(train), last - first, dtype=torch.float64)
    zeros = torch.zeros(len(train), dtype=torch.long)
    for collector, share in zip(collectors, collectors[0].config.shares, strict=True):
        weight = collector.bank.timesteps(first, last)[1]
        terms = draw_cosines if collector.config.normalise else draw_products
        asked = torch.stack([collector.rows(query.example, first, last) for query in queries])
        for n, example in enumerate(train):  # one example's gradients at a time, however many there are
            rows = collector.rows(example, first, last)[None]
            new[:, n] += share * terms(asked, rows, weight)[:, 0]
            zeros[n] += zero_draws(rows)[0]
    for query, added in zip(queries, new, strict=True):
        added = added[query.candidates]
        query.terms = torch.cat([query.terms, added], 1) if first else added
    return zeros


def _look(config: AttributionConfig, collector: Collector, query: _Query, budget: int) -> None:
    """Rank the examples of a query at this budget, and say whether its top-k is stable."""
    position = collector.bank.uniforms(0, budget)
    found = estimate(query.terms, config.design, position, antithetic=config.antithetic)
    address = stream(config.seed, "attribution", "resample", query.example.digest, budget)
    ranked = ranking(found, config.top_k, address, level=config.level)
    query.found, query.ranked = found, ranked
    counts = config.until_stable or budget == config.budgets[-1]  # a look that was not planned for must not count
    if query.stable_at is None and counts and config.stop_rule.stable(ranked):
        query.stable_at = budget
    query.curve.append(
        {
            "draws": budget,
            "p_top_k": ranked.p_top,
            "p_error": ranked.p_error,
            "standard_error": float(found.standard_errors.square().mean().sqrt()),
        }
    )


def _state(queries: list[_Query], config: AttributionConfig) -> str:
    stable = sum(query.stable_at is not None for query in queries)
    return f"top {config.top_k} stable for {stable} of {len(queries)} queries"


def _notes(
    collector: Collector, everyone: list[Example], train: list[Example], zeros: Tensor, queries: list[_Query]
) -> list[str]:
    notes = [
        f"{query.example.name} is also a training example and is left out of its own ranking"
        for query in queries
        if query.excluded
    ]
    still = [example.name for example in everyone if collector.stands_still(example)]
    if still:
        notes.append(f"no motion was seen in {_few(still)}: all of their content counts instead")
    if bool(zeros.any()):
        names = [train[i].name for i in zeros.nonzero()[:, 0].tolist()]
        notes.append(f"some gradients of {_few(names)} are zero: they count as cosine 0")
    return notes


def _few(names: list[str], most: int = 5) -> str:
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def _results(
    config: AttributionConfig,
    collector: Collector,
    train: list[Example],
    queries: list[_Query],
    draws: int,
    notes: list[str],
    out: Path,
) -> dict[str, Any]:
    tables: list[dict[str, Any]] = []
    for query in queries:
        assert query.found is not None
        assert query.ranked is not None
        names = [train[i].name for i in query.candidates]
        rows = score_rows(names, query.found, query.ranked, config.level)
        tables.append(
            {
                "name": query.example.name,
                "caption": query.example.caption,
                "media": _media(collector, query.example, out),
                "excluded": query.excluded,
                "p_top_k": query.ranked.p_top,
                "p_error": query.ranked.p_error,
                "stable_at": query.stable_at,
                "curve": query.curve,
                "scores": rows,
            }
        )
    ends = {row["example"] for one in tables for row in _ends(one["scores"], config.top_k)}
    return {
        "kind": "attribution",
        "config": config.to_dict(),
        "draws": draws,
        "design": config.design,
        "budgets": list(config.budgets),
        "threshold": config.stop_rule.threshold,
        "parameters": collector.gradients.size,
        "projection_error": 0.0 if config.projector == "identity" else jl_error(config.dimensions),
        "examples": [
            {
                "name": example.name,
                "caption": example.caption,
                "digest": example.digest,
                "media": _media(collector, example, out) if example.name in ends else None,
            }
            for example in train
        ],
        "queries": tables,
        "notes": notes,
        **provenance(collector.teacher.device),
    }


def _ends(rows: list[dict[str, Any]], top_k: int) -> list[dict[str, Any]]:
    return rows if len(rows) <= 2 * top_k else [*rows[:top_k], *rows[-top_k:]]


def _media(collector: Collector, example: Example, out: Path) -> str:
    return write_media(out, example.content[:16], collector.pictures(example))
