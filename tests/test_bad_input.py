"""Bad command lines and bad files: one line, status 2, no traceback, and nothing is written."""

import importlib
import os
import re
import signal
import sys
from signal import SIGINT, SIGTERM

import pytest
import torch
from conftest import options
from PIL import Image

import train
import utils

judge = importlib.import_module("test")  # a plain import is sorted among the standard library

# Refused by the scripts before torch is imported. The last word is in the message.
TRAIN = [
    *("--epochs 0", "--epochs -1", "--epochs 2.5", "--epochs many", "--epochs nan"),
    *("--epochs 99999999999999999999", "--epochs=", "--epoch 3", "--epochs 1 2"),
    *("--batch-size 0", "--batch-size -8", "--batch-size 1e3"),
    *("--lr 0", "--lr -0.1", "--lr nan", "--lr inf", "--lr 1e999", "--lr fast"),
    *("--weight-decay -1", "--weight-decay nan", "--weight-decay inf"),
    *("--seed -1", "--seed 18446744073709551616", "--seed 0x10"),
    *("--limit 0", "--limit -5", "--limit all"),
    *("--dataset CIFAR10", "--dataset mnist", "--recipe best", "--recipe=LONG", "--device tpu"),
    *("--resume now", "--image shoe.png", "--momentum 0.9", "FashionMNIST"),
]
TEST = [
    *("--seed -1", "--seed 1.5", "--seed now", "--dataset EMNIST", "--device gpu"),
    *("--image", "--checkpoint", "--limit 3", "--epochs 3", "--resume", "shoe.png"),
]


@pytest.mark.parametrize(
    ("script", "line"),
    [*(("train.py", line) for line in TRAIN), *(("test.py", line) for line in TEST)],
)
def test_bad_options_are_refused_by_the_scripts(run_script, tmp_path, script, line):
    result = run_script(script, *line.split())
    assert result.returncode == 2
    assert not result.stdout
    assert result.stderr.startswith(f"{script}: error: ")
    assert len(result.stderr.splitlines()) == 1
    assert line.replace("=", " ").split()[-1] in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.fixture
def refused(monkeypatch, capsys):
    """Run `main` as its script does, expect one line and status 2, and return that line."""

    def run(main, *line):
        monkeypatch.setattr(sys, "argv", [f"{main.__module__}.py", *map(str, line)])
        handlers = [(number, signal.getsignal(number)) for number in (SIGINT, SIGTERM)]
        with pytest.raises(SystemExit) as caught:
            utils.run(main)
        for number, handler in handlers:
            signal.signal(number, handler)
        err = capsys.readouterr().err
        assert caught.value.code == 2, err
        assert len(err.splitlines()) == 1, err
        assert err.startswith(f"{main.__module__}.py: error: ")
        return err

    return run


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_folders_that_are_none_are_refused(refused, tmp_path, glyphs_dir):
    mine = tmp_path / "mine"
    mine.write_text("mine")
    good = options(tmp_path, glyphs_dir)
    for bad in ("--data-dir", "--checkpoint-dir", "--image-dir"):
        line = [option for option in good if not option.startswith(bad)]
        for folder in (mine, mine / "below"):
            assert "mine" in refused(train.main, "--dataset=Glyphs", *line, f"{bad}={folder}")
    long = f"--checkpoint-dir={tmp_path / ('x' * 300)}"
    assert "xxx" in refused(train.main, "--dataset=Glyphs", *good, long)
    assert "no run on Glyphs" in refused(train.main, "--resume", "--dataset=Glyphs", *good, long)
    assert files(tmp_path) == {mine: b"mine"}


def test_weights_that_are_none_are_refused(refused, glyphs_run, glyphs_dir, tmp_path):
    best = glyphs_run / "checkpoints" / "Glyphs" / "best.pt"
    mine = tmp_path / "mine"
    mine.write_text("mine")
    folders = options(tmp_path, glyphs_dir)
    for line, message in (
        ([f"--checkpoint={best}", "--dataset=MNIST"], "trained on Glyphs, not MNIST"),
        ([f"--checkpoint={tmp_path / 'none.pt'}"], "none.pt does not exist"),
        ([f"--checkpoint={tmp_path}"], "no file"),
        ([f"--checkpoint={mine}"], "mine is damaged, or no file of this project"),
        (["--dataset=Glyphs"], "no run on Glyphs"),
    ):
        assert message in refused(judge.main, *folders, *line)
    assert files(tmp_path) == {mine: b"mine"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_device_that_is_not_there_is_refused(refused, glyphs_run, tmp_path, glyphs_dir):
    line = ["--dataset=Glyphs", *options(tmp_path, glyphs_dir), "--device=cuda"]
    assert "cuda is not available" in refused(train.main, *line)
    line += [f"--checkpoint-dir={glyphs_run / 'checkpoints'}"]
    assert "cuda is not available" in refused(judge.main, *line)
    assert not files(tmp_path)


@pytest.mark.filterwarnings("error")  # which would be lines on standard error
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.png", "does not exist"),
        ("page.pdf", "no picture that can be read"),
        ("code.eps", "no picture that can be read"),
        ("dot.png", "of one colour"),
        ("large.png", "too large: 12000x12000 pixels"),
        ("huge.png", "no picture that can be read"),
        ("film.gif", "is animated"),
        ("folder.png", "no picture that can be read"),
    ],
)
def test_pictures_that_are_none_are_refused(
    refused, glyphs_run, glyphs_dir, tmp_path, name, message
):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "page.pdf").write_bytes(b"%PDF-1.4\n")
    draw_code = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    (tmp_path / "code.eps").write_bytes(draw_code)  # a program, which Pillow hands to Ghostscript
    Image.new("L", (1, 1)).save(tmp_path / "dot.png")
    if name in ("large.png", "huge.png"):
        Image.new("1", (12_000 if name == "large.png" else 20_000,) * 2).save(tmp_path / name)
    frames = [Image.new("L", (20, 20), shade) for shade in (0, 255)]
    frames[0].save(tmp_path / "film.gif", save_all=True, append_images=frames[1:])
    best = glyphs_run / "checkpoints" / "Glyphs" / "best.pt"
    line = [f"--checkpoint={best}", *options(tmp_path / "out", glyphs_dir)]
    assert re.search(f"{name}.* {message}", refused(judge.main, *line, "--image", tmp_path / name))
    assert not (tmp_path / "out").exists()


def test_pictures_with_odd_names_are_classified(glyphs_run, glyphs_dir, tmp_path, run_script):
    best = glyphs_run / "checkpoints" / "Glyphs" / "best.pt"
    line = [f"--checkpoint={best}", *options(tmp_path, glyphs_dir), "--image"]
    for name in (b"$_$.png", b"\xff.png", "ü\n.png".encode()):
        path = tmp_path / os.fsdecode(name)
        picture = Image.new("L", (40, 40), 255)
        picture.paste(0, (18, 8, 22, 32))
        picture.save(path)
        result = run_script("test.py", *line, path)
        assert result.returncode == 0, result.stderr
        assert (tmp_path / "images" / "own.png").exists()
