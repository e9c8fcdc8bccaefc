"""The scripts as a user runs them: the first commands, odd machines, bad input; no traceback."""

import os
import re
import sys
from pathlib import Path

import pytest
from conftest import OFFLINE, TINY, files, finish, judge, options, posix, run_dir
from PIL import Image, ImageOps

import train
import utils

RUN = {"best.pt", "last.pt", "metrics.png", "metrics.csv"}  # what a run leaves behind
REPORT = {"predict.png", "confusion.png", "mistakes.png", "features.png", "lenet5.html"}
# No home, no display, ASCII.
ODD = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", "OMP_NUM_THREADS": "1"}
ODD |= {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}


@posix
def test_first_commands_without_a_network_write_into_the_named_folders_only(
    launch, checkout, glyphs_run, glyphs_dir, tmp_path
):
    out, before = tmp_path / "größer", set(tmp_path.rglob("*"))
    folders = options(out, glyphs_dir)
    line = ["--limit=2000", "--epochs=1", "--batch-size=50", *folders]
    status, text, err = finish(launch(checkout / "train.py", *line, env=ODD))
    assert status == 0, err
    assert "TRAINING ON GLYPHS INSTEAD" in err
    assert "Glyphs: 2,000 images to train on" in text
    status, text, err = finish(launch(checkout / "test.py", *folders, env=ODD))
    assert (status, err) == (0, "")
    assert "Test accuracy on Glyphs:" in text
    assert {path.name for path in files(out)} == RUN | REPORT
    assert {path for path in tmp_path.rglob("*") if out not in (path, *path.parents)} == before


@posix
def test_odd_surroundings(launch, checkout, glyphs_dir, tmp_path):
    """Also another current folder, and the default ones in a path with spaces and umlauts."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    names = [b"$_$.png", "ü\n.png".encode(), *([b"\xff.png"] if sys.platform == "linux" else [])]
    pictures = [tmp_path / os.fsdecode(name) for name in names]
    for path in pictures:
        ImageOps.expand(Image.new("L", (4, 24)), 8, fill=255).save(path)
    for script, line in (("train.py", TINY), ("test.py", ["--image", *pictures])):
        line = [f"--data-dir={glyphs_dir}", *line]
        status, _, err = finish(launch(checkout / script, *line, env=ODD, cwd=elsewhere))
        assert status == 0, err
    assert not list(elsewhere.iterdir())
    left = {path.name for name in ("checkpoints", "images") for path in files(checkout / name)}
    assert left == RUN | {"own.png", "lenet5.html"}  # the page that was there


def test_named_data_set_without_a_network_is_an_error(run_script, monkeypatch, tmp_path):
    for name, value in OFFLINE.items():
        monkeypatch.setenv(name, value)
    line = ["--dataset=FashionMNIST", *options(tmp_path, tmp_path / "data")]
    status, out, err = run_script(train.main, *line)
    assert (status, out) == (2, "")
    error = (
        r"train\.py: error: train-images-idx3-ubyte\.gz is missing and cannot be fetched .*github"
    )
    assert re.match(error, err.splitlines()[-1])
    assert not run_dir(tmp_path, "FashionMNIST").exists()


def test_help_states_the_defaults(capsys):
    with pytest.raises(SystemExit, match="0"):
        train.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "None" not in text
    for default in ("auto", utils.ROOT / "data", "all", "default", 20, 256, 0.05, 0.015, 0.0, 0):
        assert f"(default: {default})" in text
    for value in ("epochs: 150", "weight_decay: 0.01", "shift: 1", "label_smoothing: 0.05"):
        assert value in text


@pytest.mark.parametrize("option", ["--checkpoint", "--output-dir"])
def test_tilde_is_the_home(refused, tmp_path, monkeypatch, option):
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path))
    assert f"{tmp_path / 'mine'}" in refused(judge.main, option, "~/mine", "--name=none")


# --- Bad input ------------------------------------------------------------------------------------

BAD_OPTIONS = {  # the last word is in the message
    train.main: [
        *("--epochs 0", "--epochs 2.5", "--epochs 99999999999999999999", "--epoch 3"),
        *("--batch-size -8", "--batch-size 0", "--lr 0", "--lr nan", "--lr 1e999"),
        *("--weight-decay -1", "--seed 0x10", "--seed -1", "--limit 0", "--dataset mnist"),
        *("--recipe best", "--device tpu", "--resume now", "--image shoe.png", "FashionMNIST"),
        *("--shift -1", "--shift 29", "--label-smoothing 1.5", "--label-smoothing nan"),
        *("--name ../mine", "--name a/b", "--name .", "--name .hidden"),
    ],
    judge.main: [
        *("--seed 1.5", "--seed -1", "--dataset EMNIST", "--image", "--checkpoint", "--limit 3"),
    ],
}
BAD_LINES = [(main, line) for main, lines in BAD_OPTIONS.items() for line in lines]


@pytest.mark.parametrize(("main", "line"), BAD_LINES, ids=lambda value: str(value).split(" at ")[0])
def test_bad_options_are_refused(refused, tmp_path, main, line):
    line = [*options(tmp_path, tmp_path), *line.split()]
    assert line[-1] in refused(main, *line)
    assert not files(tmp_path)


MINE, LONG = Path("mine"), Path("x" * 300)  # the user's file, and a name that no folder can have
BEST = Path("run", "best.pt")
BAD_FILES = {
    "data is a file": (train.main, ["--data-dir", MINE], "is no folder"),
    "output is a file": (train.main, ["--output-dir", MINE], "is no folder"),
    "below a file": (train.main, ["--output-dir", MINE / "below"], "cannot write into"),
    "long folder": (train.main, ["--output-dir", LONG], "name another folder with --output-dir"),
    "long name": (train.main, ["--name", str(LONG)], "cannot write into"),
    "other set": (
        judge.main,
        ["--dataset=MNIST", "--checkpoint", BEST],
        "trained on Glyphs, not M",
    ),
    "no file": (judge.main, ["--checkpoint", Path("none.pt")], "none.pt: it does not exist"),
    "a folder": (judge.main, ["--checkpoint", Path()], "is no file"),
    "no checkpoint": (judge.main, ["--checkpoint", MINE], "mine is damaged, or no file of this"),
    "no run": (judge.main, [], "no run on Glyphs"),
}


@pytest.mark.parametrize(("main", "line", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_bad_folders_and_weights_are_refused(
    refused, glyphs_run, glyphs_dir, tmp_path, main, line, message
):
    (tmp_path / MINE).write_text("mine", encoding="utf-8")
    (tmp_path / BEST).parent.mkdir()
    (tmp_path / BEST).write_bytes((run_dir(glyphs_run) / "best.pt").read_bytes())
    before = files(tmp_path)
    line = [tmp_path / word if isinstance(word, Path) else word for word in line]
    assert message in refused(main, *options(tmp_path, glyphs_dir), "--dataset=Glyphs", *line)
    assert files(tmp_path) == before


def test_folder_without_write_permission_is_refused(start, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # real modes do not stop root
    with pytest.raises(
        utils.Error,
        match=r"cannot write into .*checkpoints.Glyphs: it is read-only; name .*--output-dir",
    ):
        start(tmp_path, *TINY)
