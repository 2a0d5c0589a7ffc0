"""The findings as JSON, for `--json`: the same numbers as on the page, each with its error and interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from carv.report.checks import checks
from carv.report.findings import Findings, Gain, StudyFindings
from carv.report.methods import Entry, Method
from carv.strict_json import plain
from carv.variance.advice import Advice
from carv.variance.figures import as_json


def summary(findings: Findings) -> dict[str, Any]:
    """All findings. A number that is not finite is null."""
    found: dict[str, Any] = plain(
        {
            "kind": "report",
            "format": 1,
            "folders": [str(folder) for folder in findings.folders],
            "experiments": [{"folder": str(one.folder), **asdict(one.experiment)} for one in findings.experiments],
            "studies": [_study(study) for study in findings.studies],
            "notes": list(findings.notes),
        }
    )
    return found


def _study(found: StudyFindings) -> dict[str, Any]:
    return {
        "problem": dict(found.study.problem),
        "fingerprint": dict(found.study.fingerprint),
        "cost_unit": found.costing.unit,
        "cost_assumed": found.costing.assumed,
        "cost_ratio": None if found.ratio is None else as_json(found.ratio),
        "advice": None if found.advice is None else _advice(found.advice),
        "predicted": _cells(found.predicted),
        "measured": _cells(found.measured),
        "gains": _gains(found.gains),
        "measured_gains": _gains(found.measured_gains),
        "coverage": {
            "cells": len(found.coverage),
            "covered": sum(one.covered for one in found.coverage),
            "ratios": [
                asdict(one.measured.design)
                | {"seed": one.measured.seed, "measured_over_predicted": as_json(one.ratio, one.interval)}
                | {"covered": one.covered}
                for one in found.coverage
            ],
        },
        "checks": [asdict(check) for check in checks(found)],
    }


def _advice(advice: Advice) -> dict[str, Any]:
    gain = advice.gain
    return {
        "design": asdict(advice.best.design),
        "variance": as_json(advice.best.prediction.variance),
        "cost": as_json(advice.best.cost),
        "gain": as_json(gain.value, gain.interval)
        | {"anchor": gain.anchor, "baseline": gain.baseline, "cost": gain.cost, "extrapolated": gain.extrapolated},
        "best_renoise": as_json(advice.best_renoise),
        "binds": advice.binds,
        "binds_clearly": advice.binds_clearly,
        "bound": {"oracle": as_json(advice.bound.oracle), "infinite": as_json(advice.bound.infinite)},
        "reason": advice.reason,
        "tied": [asdict(cell.design) for cell in advice.tied],
    }


def _cells(cells: Mapping[Method, Sequence[Entry]]) -> list[dict[str, Any]]:
    return [
        {"method": method.name, **asdict(entry.design), "seed": entry.seed}
        | {"variance": as_json(entry.variance, entry.interval), "cost": as_json(entry.cost)}
        for method, entries in cells.items()
        for entry in entries
    ]


def _gains(gains: Mapping[Method, Sequence[Gain]]) -> list[dict[str, Any]]:
    return [
        {"method": method.name, **asdict(gain.entry.design), "seed": gain.entry.seed}
        | {"ecm": None if gain.ecm is None else as_json(gain.ecm.value, gain.ecm.interval)}
        | {"extrapolated": gain.ecm is not None and gain.ecm.extrapolated}
        | {"re": None if gain.efficiency is None else as_json(gain.efficiency)}
        for method, several in gains.items()
        for gain in several
    ]
