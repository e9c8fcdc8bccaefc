"""Runs with names: each has its own files, and one can say which is meant."""

import os
import re
import shutil

import pytest
from conftest import ROOT, files, flatten, judge, options, picture_dir, printed_rows, run_dir

import utils

NAMES = ("small", "large")


@pytest.fixture(scope="module")
def both(tmp_path_factory, few_glyphs, start):
    folder = tmp_path_factory.mktemp("both")
    for name, rate in zip(NAMES, (0.02, 0.05)):
        before = files(folder)
        line = ["--dataset=Glyphs", "--epochs=2", "--batch-size=50", f"--data-dir={few_glyphs}"]
        assert start(folder, *line, f"--name={name}", f"--lr={rate}") == 0
        assert before.items() <= files(folder).items()
    for age, name in enumerate(NAMES):
        for file in run_dir(folder, name).iterdir():
            os.utime(file, (1000 - age, 1000 - age))
    return folder


@pytest.fixture
def two(tmp_path, both):
    """The folder of two runs side by side, the first of which is the newest; it may be changed."""
    return shutil.copytree(both, tmp_path / "both")


def changed(folder, before):
    """The folders in which a file is new or another than `before`."""
    return {path.parent for path, content in files(folder).items() if before.get(path) != content}


def test_each_run_has_its_files_in_folders_of_its_name(two):
    for folder, expected in (
        (run_dir, {"best.pt", "last.pt"}),
        (picture_dir, {"metrics.csv", "metrics.png"}),
    ):
        parent = folder(two, NAMES[0]).parent
        assert {path.name for path in parent.iterdir()} == {*NAMES}
        for name in NAMES:
            assert {path.name for path in folder(two, name).iterdir()} == expected
    for name, rate in zip(NAMES, (0.02, 0.05)):
        for file in ("best.pt", "last.pt"):
            run = utils.load_checkpoint(run_dir(two, name) / file)
            assert (run["name"], run["dataset"], run["options"]["lr"]) == (name, "Glyphs", rate)


@pytest.mark.parametrize("name", [*NAMES, None])
def test_run_that_is_named_is_judged_and_else_the_newest(two, few_glyphs, capsys, name):
    before, which = files(two), name or "small"
    line = options(two, few_glyphs)
    assert judge.main([*line, f"--name={name}"] if name else line) == 0
    out, folder = capsys.readouterr().out, picture_dir(two, which)
    assert out.startswith(f"Weights: {run_dir(two, which) / 'best.pt'}, epoch ")
    assert f"Pictures: {folder}\n" in out
    assert changed(two, before) == {folder}
    assert {path.name for path in folder.glob("*.*")} == {
        *("metrics.csv", "metrics.png", "predict.png", "mistakes.png"),
        *("confusion.png", "features.png", "lenet5.html"),
    }
    assert f"Run {which} on Glyphs, epoch " in (folder / "lenet5.html").read_text(encoding="utf-8")


def test_weights_of_a_file_are_judged_under_the_name_that_is_given(two, few_glyphs):
    line = [*options(two, few_glyphs), f"--checkpoint={run_dir(two, 'large') / 'best.pt'}"]
    for name in ("large", "third"):
        before = files(two)
        assert judge.main([*line, f"--name={name}"] if name == "third" else line) == 0
        assert changed(two, before) == {picture_dir(two, name)}


@pytest.mark.parametrize("name", [*NAMES, None])
def test_run_that_is_named_is_resumed_and_else_the_newest(
    tmp_path, few_glyphs, start, capsys, name
):
    line = ["--dataset=Glyphs", "--epochs=2", "--batch-size=50", f"--data-dir={few_glyphs}"]
    for each in NAMES:
        assert start(tmp_path, *line, f"--name={each}", stop_at=13) == 130
        err = capsys.readouterr().err
        assert re.search(rf"go on with: .* --resume --name {each} ", err)
    os.utime(run_dir(tmp_path, "large") / "last.pt", (1000, 1000))
    before, which = files(tmp_path), name or "small"
    again = ["--resume", f"--data-dir={few_glyphs}", *([f"--name={name}"] if name else [])]
    assert start(tmp_path, *again) == 0
    assert changed(tmp_path, before) == {run_dir(tmp_path, which), picture_dir(tmp_path, which)}
    out = capsys.readouterr().out
    assert f"Run {which}: 1 of 2 epochs are done\n" in out
    assert len(printed_rows(out)) == 1
    assert re.search(rf"^Next: .* test.py --name {which} ", out, re.MULTILINE)
    assert start(tmp_path / "straight", *line) == 0  # its name is that of its data set
    runs = [
        utils.load_checkpoint(run_dir(folder, each) / "last.pt")
        for folder, each in ((tmp_path, which), (tmp_path / "straight", "Glyphs"))
    ]
    assert [run.pop("name") for run in runs] == [which, "Glyphs"]
    assert flatten(runs[0]) == flatten(runs[1])


def test_folder_that_was_renamed_is_a_run_of_that_name(two, few_glyphs, start):
    for folder in (run_dir, picture_dir):
        folder(two, "large").rename(folder(two, "kept"))
    before = files(two)
    assert judge.main([*options(two, few_glyphs), "--name=kept"]) == 0
    assert changed(two, before) == {picture_dir(two, "kept")}
    assert start(two, "--resume", "--name=kept", f"--data-dir={few_glyphs}") == 0
    assert not run_dir(two, "large").exists()


def test_name_without_a_run_is_refused_and_no_other_taken(two, few_glyphs, start):
    """Neither another run nor the weights that come along."""
    for path in (ROOT / "checkpoints").glob("*.pt"):
        shutil.copy(path, two / "checkpoints")
    before = files(two)
    for call in (
        lambda line: judge.main([*options(two, few_glyphs), *line]),
        lambda line: start(two, "--resume", *line),
    ):
        with pytest.raises(utils.Error, match=r"no run named mine in .*: start one"):
            call(["--name=mine"])
        with pytest.raises(utils.Error, match="no run named large on MNIST in "):
            call(["--name=large", "--dataset=MNIST"])
    assert files(two) == before


@pytest.mark.skipif(utils.fcntl is None, reason="needs locks")
def test_runs_of_different_names_can_be_at_work_at_the_same_time(tmp_path, few_glyphs, start):
    line = ["--dataset=Glyphs", "--epochs=1", f"--data-dir={few_glyphs}"]
    with utils.claim(run_dir(tmp_path, "one"), picture_dir(tmp_path, "one")):
        assert start(tmp_path, *line, "--name=other") == 0
        with pytest.raises(utils.Error, match=r"another run is at work in .*one: wait, or -"):
            start(tmp_path, *line, "--name=one")
