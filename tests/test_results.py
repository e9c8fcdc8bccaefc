"""The README, the single results behind it, and the shipped weights agree with each other."""

import re

import pytest
from benchmark import judge
from conftest import ROOT
from reproduce import KEYS, LABELS, STEPS, read_results, summary

import train
import utils

README = (ROOT / "README.md").read_text(encoding="utf-8")
RUNS = read_results()
COMMANDS = sorted({tuple(row[key] for key in KEYS[:-1]) for row in RUNS})


def test_every_recipe_and_every_step_of_the_ablation_has_results():
    assert {recipe for _, recipe, *_ in COMMANDS} == {*train.RECIPES, *STEPS} == {*LABELS}


@pytest.mark.parametrize("command", COMMANDS)
def test_readme_has_the_row_of_each_command(command):
    rows = [row for row in RUNS if tuple(row[key] for key in KEYS[:-1]) == command]
    assert summary(rows) in README
    assert [row["seed"] for row in rows] == list(range(len(rows)))


@pytest.mark.parametrize("dataset", ["FashionMNIST", "MNIST"])
def test_shipped_weights_have_the_accuracy_in_the_readme(real_data, dataset):
    path = ROOT / "checkpoints" / f"lenet5-{dataset.lower()}.pt"
    accuracy, _ = judge(utils.load_checkpoint(path), real_data)
    # Rounding differs from machine to machine: it may turn an image or two.
    shown = re.search(rf"\| {dataset} \| `checkpoints/{path.name}` .*\((\d+)/10000\)", README)
    assert abs(round(10_000 * accuracy) - int(shown[1])) <= 3
