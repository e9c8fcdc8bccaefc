"""The README: its commands, and its results, which are those in images/results.csv."""

import re

import pytest
from conftest import ROOT
from reproduce import KEYS, LABELS, STEPS, read_results, summary

import train

README = (ROOT / "README.md").read_text(encoding="utf-8")
RUNS = read_results()
COMMANDS = sorted({tuple(row[key] for key in KEYS[:-1]) for row in RUNS})


def test_first_commands_bring_a_virtual_environment_and_need_no_command_called_python():
    """Where the system's pip refuses to install, and its Python is called python3 alone."""
    start = "python3 -m venv .venv && . .venv/bin/activate && pip install -r requirements.txt && "
    for script in ("python train.py && python test.py", "python -m pytest"):
        assert README.count(f"\n```\n{start}{script}\n```\n") == 1
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    [found] = re.findall(re.search("grep '(.*)' README.md", ci)[1], README, re.MULTILINE)
    assert f"{start}python -m pytest".endswith(found)


def test_every_recipe_and_every_step_of_the_ablation_has_results():
    assert {recipe for _, recipe, *_ in COMMANDS} == {*train.RECIPES, *STEPS} == {*LABELS}


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: "-".join(map(str, c)))
def test_readme_has_the_row_of_each_command(command):
    rows = [row for row in RUNS if tuple(row[key] for key in KEYS[:-1]) == command]
    assert summary(rows) in README
    assert [row["seed"] for row in rows] == list(range(len(rows)))


def test_every_promise_of_what_survives_names_a_test_that_is_there():
    promises = README.split("## What it survives")[1].split("\n## ")[0].split("\n* ")[1:]
    for promise in promises:
        names = re.findall(r"tests/(test_\w+\.py)", promise)
        assert names, promise
        assert all((ROOT / "tests" / name).exists() for name in names)
