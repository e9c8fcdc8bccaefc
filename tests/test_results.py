"""The README, the single results behind it, and the shipped weights agree with each other."""

import re

import pytest
from benchmark import judge
from conftest import ROOT
from reproduce import read_results, summary

import train
import utils
from utils.plots import RECIPE_LABELS

README = (ROOT / "README.md").read_text()
RUNS = read_results()
COMMANDS = sorted({(row["dataset"], row["recipe"], row["epochs"]) for row in RUNS})


def test_every_recipe_has_results_and_a_label_in_the_picture():
    assert {recipe for _, recipe, _ in COMMANDS} == set(train.RECIPES) == set(RECIPE_LABELS)


@pytest.mark.parametrize("command", COMMANDS)
def test_readme_has_the_row_of_each_command(command):
    rows = [row for row in RUNS if (row["dataset"], row["recipe"], row["epochs"]) == command]
    assert summary(rows) in README
    assert [row["seed"] for row in rows] == list(range(len(rows)))


@pytest.mark.parametrize("dataset", ["FashionMNIST", "MNIST"])
def test_shipped_weights_have_the_accuracy_in_the_readme(real_data, dataset):
    path = ROOT / "checkpoints" / f"lenet5-{dataset.lower()}.pt"
    accuracy, _ = judge(utils.load_checkpoint(path), real_data)
    right = round(10_000 * accuracy)
    # Rounding differs from machine to machine: it may turn an image or two.
    row = rf"\| {dataset} \| `checkpoints/{path.name}` .*\((\d+)/10000\)"
    shown = re.search(row, README)
    assert abs(right - int(shown[1])) <= 3
