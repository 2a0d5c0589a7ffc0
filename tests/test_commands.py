"""Every command that measures, run as users run it."""

import json
import re
import subprocess
import sys

import pytest

from carv.cli import COMMANDS, main
from command_line import carv

USERS = """
import torch
from carv import HierarchicalEstimator, TimestepSampler, per_render, proportional, uniform_steps
from carv.strata import iid
from carv.tasks.toy import GaussianToy

toy, base = GaussianToy(), uniform_steps(20, 980)
naive_draws = HierarchicalEstimator(TimestepSampler(base, coupling=iid), 1, 4)
weighted = HierarchicalEstimator(TimestepSampler(base, proportional(base, toy.weight), coupling=per_render), 1, 4)

def naive(at):
    return naive_draws.estimate(toy, at).gradient

def mine(at):
    return weighted.estimate(toy, at).gradient

def summed(at):
    "Forgets the 1/K of the mean over draws."
    return tuple(4 * part for part in mine(at))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pilot and a small sweep in one folder, made by the commands."""
    out = tmp_path_factory.mktemp("toy") / "out"
    made = carv("pilot", "toy", "--out", out, "--renders", 12, "--bins", 8, "--repetitions", 6)
    assert made.returncode == 0, made.stderr
    assert "ECM against uniform iid (1, 1)" in made.stdout
    swept = carv(*SWEEP, "--out", out)
    assert swept.returncode == 0, swept.stderr
    assert "6 cells measured" in swept.stdout
    return out


SWEEP = ("sweep", "toy", "--renders", 1, "--renoise", 1, 4, "--rule", "fixed", "--cap", 200)


@pytest.mark.parametrize("command", sorted(COMMANDS.keys() - {"distill", "teachers"}))
def test_options_have_no_prefix_but_for_those_of_a_distillations_three_terms(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert not re.findall(r"--[a-z-]+\.[a-z-]+", capsys.readouterr().out)


def test_advise_says_what_to_run_and_why(folder):
    said = carv("advise", folder)
    assert said.returncode == 0, said.stderr
    assert said.stdout.startswith("run (")
    assert "95 % interval" in said.stdout
    found = json.loads(carv("advise", folder, "--budget", 50, "--cost-ratio", 20, "--json").stdout)
    assert found["cost"]["value"] <= 50
    assert found["ecm"]["interval"][0] <= found["ecm"]["value"] <= found["ecm"]["interval"][1]


def test_advice_without_a_pilot_gets_one_sentence(tmp_path):
    command = [sys.executable, "-m", "carv.cli", "advise", str(tmp_path)]
    said = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert said.returncode == 2
    assert "holds no pilot.json" in said.stderr
    assert said.stderr.count("\n") == 1


def test_a_report_is_one_page_of_the_pilot_and_the_sweep(folder):
    said = carv("report", folder, "--json")
    assert said.returncode == 0, said.stderr
    [study] = json.loads(said.stdout)["studies"]
    assert study["coverage"]["cells"] == 6
    page = (folder / "report.html").read_text()
    assert "Where the variance comes from" in page
    assert "://" not in page.replace("http://www.w3.org", "")  # names of the SVG language, not addresses


def test_a_sweep_that_is_run_again_measures_nothing_again(folder):
    again = carv(*SWEEP, "--out", folder, "--json")
    assert json.loads(again.stdout) == {"out": str(folder), "done": 0, "skipped": 6, "failed": []}
    assert len((folder / "records.jsonl").read_text().splitlines()) == 6


def test_a_sweep_with_a_cell_that_fails_says_so_and_exits_with_1(tmp_path):
    said = carv(*SWEEP, "--out", tmp_path, "--proposals", "uniform", "best", "--couplings", "iid", "--executor", "here")
    assert said.returncode == 1
    assert "no proposal 'best'" in said.stderr
    assert "2 cells measured, 0 were there already, 2 failed" in said.stdout


def test_measure_compares_with_uniform_draws_and_keeps_its_records(tmp_path):
    args = ("measure", "toy", "--renoise", 4, "--proposal", "weight", "--rule", "fixed", "--cap", 450)
    said = carv(*args, "--reference", 300, "--out", tmp_path)
    assert said.returncode == 0, said.stderr
    for part in ("variance of one estimate, (1, 4) weight, per-render", "paired", "squared error", "cosine"):
        assert part in said.stdout
    again = carv(*args, "--out", tmp_path, "--json")
    assert "measuring" not in again.stderr
    found = json.loads(again.stdout)
    assert found["relative_efficiency"]["paired"]
    assert len((tmp_path / "records.jsonl").read_text().splitlines()) == 2


def test_users_own_estimators_are_measured_and_checked_by_name(tmp_path, monkeypatch):
    (tmp_path / "users.py").write_text(USERS)
    monkeypatch.chdir(tmp_path)
    measured = carv("measure", "users:mine", "--rule", "fixed", "--cap", 200, "--json")
    assert json.loads(measured.stdout)["replicates"] == 200
    passed = carv("check", "users:mine", "--naive", "users:naive", "--tolerance", 0.3)
    assert passed.returncode == 0, passed.stdout + passed.stderr
    failed = carv("check", "users:summed", "--naive", "users:naive", "--json")
    assert failed.returncode == 1, failed.stdout + failed.stderr
    assert json.loads(failed.stdout)["verdict"] == "fail"
    unsure = carv("check", "users:mine", "--naive", "users:naive", "--cap", 128, "--tolerance", 0.001)
    assert unsure.returncode == 3
    assert "more replicates" in unsure.stdout
    alone = carv("check", "users:mine")
    assert alone.returncode == 2
    assert "--naive module:object" in alone.stderr
