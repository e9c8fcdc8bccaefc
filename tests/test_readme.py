"""README.md and tests/README.md: commands, tables, links and examples."""

import re

import measure
import pytest
import torch
from conftest import ROOT, random_images

import train
import utils
from images.trace import table, trace
from model import LeNet

README = "README.md"
TESTS_README = "tests/README.md"
EXERCISES = {path.stem for path in ROOT.glob("tests/exercises/*.diff")}


def read(path):
    return (ROOT / path).read_text(encoding="utf-8")


def table_rows(text, columns):
    """Return the cells of all table rows with this number of columns."""
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return [row for row in rows if len(row) == columns]


def test_the_two_commands_create_a_virtual_environment():
    start = "python3 -m venv .venv && . .venv/bin/activate && pip install -r requirements.txt && "
    for end in ("python train.py && python test.py", "python -m pytest"):
        assert read(README).count(f"\n```\n{start}{end}\n```\n") == 1
    pattern = re.search("grep '(.*)' README.md", read(".ci/run"))[1]
    lines = [line for line in read(README).splitlines() if re.search(pattern, line)]
    assert lines == [f"{start}python -m pytest"]


def test_layer_table_is_that_of_the_network():
    rows = [
        [f"{cell:,}" if isinstance(cell, int) else cell for cell in row.values()]
        for row in table(trace(LeNet()))
    ]
    assert table_rows(read(README), 7)[-len(rows) :] == rows


def test_result_tables_agree_with_the_single_results():
    groups = {}
    for row in measure.read_results():
        groups.setdefault(tuple(row[key] for key in measure.KEYS[:-1]), []).append(row)
    summaries = [measure.summary(rows) for rows in groups.values()]
    for rows in groups.values():
        assert [row["seed"] for row in rows] == list(range(len(rows)))
    assert {row["recipe"] for rows in groups.values() for row in rows} == set(measure.LABELS)
    listed = [
        line for line in read(TESTS_README).splitlines() if re.match(r"\| \w*MNIST .*±", line)
    ]
    assert set(listed) == set(summaries)
    short = [line for line in read(README).splitlines() if re.match(r"\| \w*MNIST .*±", line)]
    without_validation = [re.sub(r"(\| \d+ \|) \S+ \|", r"\1", line) for line in summaries]
    assert len(short) == 4
    assert set(short) <= set(without_validation)


def test_exercise_tables_agree_with_the_patches_and_with_each_other():
    long_rows = {row[0]: row for row in table_rows(read(TESTS_README), 4) if row[0] in EXERCISES}
    assert long_rows.keys() == {name for name in EXERCISES if not name.startswith("ablation")}
    for name, (_, command, mean, single) in long_rows.items():
        options = " ".join(measure.patch_options(name))
        assert command == f"`{' '.join(['python train.py', options]).strip()}`"
        accuracies = [float(value) for value in single.split(", ")]
        assert float(mean[:-1]) == pytest.approx(sum(accuracies) / len(accuracies), abs=0.006)
        cell = f"`{options}`" if options else ""
        link = f"| [{name}](tests/exercises/{name}.diff) | {cell} | {mean} | ".replace(
            "|  |", "| |"
        )
        assert read(README).count(link) == 1
        assert name in measure.patch_file(name).read_text(encoding="utf-8").split("--name ")[1]


def test_example_for_your_own_code_works_as_printed(monkeypatch):
    images = random_images(20)
    monkeypatch.setattr(utils, "load_images", lambda *args: (images, torch.arange(20) % 10))
    monkeypatch.chdir(ROOT)
    [code] = re.findall(r"```python\n(.*?)```", read(README), re.DOTALL)
    names = {}
    exec(code, names)
    assert names["logits"].shape == (20, 10)


@pytest.mark.parametrize("document", [README, TESTS_README])
def test_links_pictures_and_named_tests_exist(document):
    links = re.findall(r"\]\((?!https?:)([^)]+)\)", read(document))
    assert len(links) > 2
    for link in links:
        assert ((ROOT / document).parent / link.partition("#")[0]).exists(), link
    for name in re.findall(r"tests/test_\w+\.py", read(document)):
        assert (ROOT / name).exists(), name


def test_both_transcripts_are_of_the_same_run():
    text = read(README)
    epoch, epochs = re.search(r"Best epoch: (\d+) of (\d+), ", text).groups()
    assert int(epochs) == train.parse_args([])[1]["epochs"]
    assert f"Weights: checkpoints/FashionMNIST/best.pt, epoch {epoch} of a run on Fashion" in text
