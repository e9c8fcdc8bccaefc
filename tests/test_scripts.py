"""The scripts as a user runs them: signals, full disks, odd machines, bad input; no traceback."""

import functools
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
from conftest import ROOT, expect_same_run, files, judge, load, options
from PIL import Image, ImageOps

import train
import utils

try:
    import resource
except ImportError:  # Windows
    resource = None

posix = pytest.mark.skipif(os.name == "nt", reason="needs POSIX")
TINY = ["--dataset=Glyphs", "--limit=300", "--epochs=3"]
LEFT_BEHIND = {"best.pt", "last.pt", "metrics.png", "metrics.csv"}
LEFT_BEHIND |= {"predict.png", "confusion.png", "mistakes.png", "features.png", "lenet5.html"}
# A proxy that refuses connections cuts the scripts off on every machine.
OFFLINE = dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9") | {"no_proxy": ""}
OFFLINE |= {"PYTHONUNBUFFERED": "", "PYTHONDONTWRITEBYTECODE": "1"}


@pytest.fixture
def launch(tmp_path):
    """Start a script, in another folder than its own; what still runs is killed after the test."""
    processes = []

    def start(script, *line, env=os.environ, cwd=tmp_path, prepare=None):
        how = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE) | {"preexec_fn": prepare}
        line = [sys.executable, script, *line]
        processes.append(subprocess.Popen(line, text=True, env=env | OFFLINE, cwd=cwd, **how))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


@pytest.fixture
def checkout(tmp_path):
    """A copy of the scripts, in a path with spaces and umlauts."""
    folder = tmp_path / "Übung 1, größer" / "lenet"
    (folder / "images").mkdir(parents=True)
    for name in ("model.py", "train.py", "test.py", "utils.py", "images/lenet5.html"):
        shutil.copy(ROOT / name, folder / name)
    return folder


def finish(process):
    out, err = process.communicate(timeout=120)
    assert "Traceback" not in err
    return process.returncode, out, err


def test_first_commands_without_a_network_write_into_the_named_folders_only(
    launch, checkout, glyphs_run, glyphs_dir, tmp_path
):
    out, before = tmp_path / "out", set(tmp_path.rglob("*"))
    folders = options(out, glyphs_dir)
    line = ["--limit=2000", "--epochs=1", "--batch-size=50", *folders]
    status, text, err = finish(launch(checkout / "train.py", *line))
    assert status == 0, err
    assert "TRAINING ON GLYPHS INSTEAD" in err
    assert "Glyphs: 2,000 images to train on" in text
    status, text, err = finish(launch(checkout / "test.py", *folders))
    assert (status, err) == (0, "")
    assert "Test accuracy on Glyphs:" in text
    assert {path.name for path in files(out)} == LEFT_BEHIND
    assert {path for path in tmp_path.rglob("*") if out not in (path, *path.parents)} == before


def test_named_data_set_without_a_network_is_an_error(launch, tmp_path):
    line = ["--dataset=FashionMNIST", *options(tmp_path, tmp_path / "data")]
    status, out, err = finish(launch(ROOT / "train.py", *line))
    assert (status, out) == (2, "")
    error = (
        "train.py: error: train-images-idx3-ubyte.gz is missing and cannot be fetched .*github.com"
    )
    assert re.match(error, err.splitlines()[-1])
    assert not (tmp_path / "checkpoints").exists()


@posix
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_command_printed_after_a_signal_ends_with_the_same_run(
    launch, start, tmp_path, glyphs_dir, number
):
    line, stopped = ["--dataset=Glyphs", "--limit=1500", "--epochs=8"], tmp_path / "stopped here"
    # A background shell ignores Ctrl-C, and its children would inherit that.
    prepare = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = launch(ROOT / "train.py", *line, *options(stopped, glyphs_dir), prepare=prepare)
    assert any(re.match(" *1/8 ", text) for text in process.stdout)
    process.send_signal(number)
    status, _, err = finish(process)
    assert status == 130, err
    again = re.search(r"Stopped: epoch \d is saved in .*last.pt; go on with: (.* --resume .*)", err)
    assert f"--dataset Glyphs --data-dir {glyphs_dir} --checkpoint-dir 'stopped here/ch" in again[1]
    subprocess.run(again[1], shell=True, check=True, cwd=tmp_path, env=os.environ | OFFLINE)
    assert start(tmp_path / "straight", *line) == 0
    expect_same_run(stopped, tmp_path / "straight")


@pytest.mark.skipif(resource is None, reason="needs a limit on the size of files")
def test_full_disk_keeps_the_checkpoint_from_before(launch, glyphs_run, glyphs_dir, tmp_path):
    """A limit lower than the size of a checkpoint stands for the full disk."""
    shutil.copytree(glyphs_run, tmp_path, dirs_exist_ok=True)
    before, limit = files(tmp_path), (resource.RLIMIT_FSIZE, (200_000, 200_000))
    prepare = functools.partial(resource.setrlimit, *limit)
    line = [*TINY, *options(tmp_path, glyphs_dir)]
    status, _, err = finish(launch(ROOT / "train.py", *line, prepare=prepare))
    assert status == 2
    note, error = err.splitlines()
    assert note.startswith("Note: ")
    assert re.search(r"cannot write .*last.pt: File too large \(what was there .*; no epoch", error)
    assert files(tmp_path) == before


@posix
def test_odd_surroundings(launch, checkout, glyphs_dir, tmp_path):
    """No home, no display, ASCII, a path with spaces and umlauts, another current folder."""
    environment = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", "OMP_NUM_THREADS": "1"}
    environment |= {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    names = [b"$_$.png", "ü\n.png".encode(), *([b"\xff.png"] if sys.platform == "linux" else [])]
    pictures = [tmp_path / os.fsdecode(name) for name in names]
    for path in pictures:
        ImageOps.expand(Image.new("L", (4, 24)), 8, fill=255).save(path)
    for script, line in (("train.py", TINY), ("test.py", []), ("test.py", ["--image", *pictures])):
        line = [f"--data-dir={glyphs_dir}", *line]
        status, _, err = finish(launch(checkout / script, *line, env=environment, cwd=elsewhere))
        assert status == 0, err
    assert not list(elsewhere.iterdir())
    left = {path.name for name in ("checkpoints", "images") for path in files(checkout / name)}
    assert left == LEFT_BEHIND | {"own.png"}


def test_help_states_the_defaults(capsys):
    with pytest.raises(SystemExit, match="0"):
        train.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "None" not in text
    for default in ("auto", "data, beside the script", "all", "default", 256, 0):
        assert f"(default: {default})" in text
    for name, recipe in train.RECIPES.items():
        for option in ("epochs", "lr", "weight_decay"):
            assert f"{recipe[option]} ({name})" in text


@pytest.fixture
def refused(monkeypatch, capsys):
    """Run `main` as its script does, expect one line and status 2, and return that line."""

    def run(main, *line):
        monkeypatch.setattr(sys, "argv", [f"{main.__module__}.py", *map(str, line)])
        monkeypatch.setattr(signal, "signal", lambda *_: None)
        with pytest.raises(SystemExit) as caught:
            utils.run(main)
        out, err = capsys.readouterr()
        assert (caught.value.code, out) == (2, ""), err
        assert re.fullmatch(rf"{main.__module__}\.py: error: .*\n", err)
        return err

    return run


BAD_OPTIONS = {  # the last word is in the message
    train.main: [
        *("--epochs 0", "--epochs 2.5", "--epochs 99999999999999999999", "--epoch 3"),
        *("--batch-size -8", "--lr 0", "--lr nan", "--lr 1e999", "--weight-decay -1"),
        *("--seed 0x10", "--limit 0", "--dataset mnist", "--recipe best", "--device tpu"),
        *("--resume now", "--image shoe.png", "FashionMNIST"),
    ],
    judge.main: ["--seed 1.5", "--dataset EMNIST", "--image", "--checkpoint", "--limit 3"],
}


def test_bad_options_are_refused(refused):
    for main, lines in BAD_OPTIONS.items():
        for line in lines:
            assert line.split()[-1] in refused(main, *line.split())


def test_bad_folders_and_weights_are_refused(refused, glyphs_run, glyphs_dir, tmp_path):
    mine, best = tmp_path / "mine", glyphs_run / "checkpoints" / "Glyphs" / "best.pt"
    mine.write_text("mine", encoding="utf-8")
    for main, line, message in (
        *((train.main, [f"--{name}-dir={mine}"], "is no folder") for name in utils.FOLDERS),
        (train.main, [f"--image-dir={mine / 'below'}"], "cannot make the folder"),
        (train.main, [f"--image-dir={tmp_path / ('x' * 300)}"], "cannot make the folder"),
        (judge.main, [f"--checkpoint={best}", "--dataset=MNIST"], "trained on Glyphs, not MNIST"),
        (judge.main, [f"--checkpoint={tmp_path / 'none.pt'}"], "none.pt does not exist"),
        (judge.main, [f"--checkpoint={tmp_path}"], "is no file"),
        (judge.main, [f"--checkpoint={mine}"], "mine is damaged, or no file of this project"),
        (judge.main, [f"--checkpoint={best}", "--image", mine], "mine is no picture"),
        (judge.main, [], "no run on Glyphs"),
    ):
        line = [*options(tmp_path, glyphs_dir), "--dataset=Glyphs", *line]
        assert message in refused(main, *line)
    assert files(tmp_path) == {mine: b"mine"}


@pytest.mark.skipif(utils.fcntl is None, reason="needs locks")
def test_second_run_in_the_same_folder_is_refused(start, tmp_path):
    assert start(tmp_path, *TINY, f"--image-dir={tmp_path / 'checkpoints'}") == 0  # one run
    before = files(tmp_path)
    for name in ("checkpoints", "images"):
        with utils.claim(tmp_path / name / "Glyphs"):
            for line in (TINY, ["--resume"]):
                with pytest.raises(utils.Error, match=f"another run is at work in .*{name}/Glyphs"):
                    start(tmp_path, *line)
    assert files(tmp_path) == before


@pytest.mark.parametrize(("name", "saved"), [("last.pt", 1), ("best.pt", 2)])
def test_disk_that_fills_up_costs_one_epoch(start, tmp_path, monkeypatch, name, saved):
    real = utils.save

    def save(checkpoint, path):
        if path.name == name and checkpoint["epoch"] == 2:
            raise utils.Error(f"cannot write {name}: No space left on device")
        real(checkpoint, path)

    monkeypatch.setattr(utils, "best_epoch", lambda history: history[-1])
    with monkeypatch.context() as patch:
        patch.setattr(utils, "save", save)
        with pytest.raises(utils.Error, match=rf"write {name}: No.*; epoch {saved} is saved in"):
            start(tmp_path, *TINY)
    assert load(tmp_path, "last.pt")["epoch"] == saved
    assert load(tmp_path, "best.pt")["epoch"] == 1
    assert start(tmp_path, "--resume") == 0
    assert start(tmp_path / "straight", *TINY) == 0
    expect_same_run(tmp_path, tmp_path / "straight")


def test_picture_that_cannot_be_written_does_not_stop_it(start, tmp_path, capsys):
    for name in ("metrics.png", "metrics.csv"):
        mine = tmp_path / name / "images" / "Glyphs" / name / "mine"
        mine.mkdir(parents=True)
        assert start(tmp_path / name, *TINY) == 0
        assert re.search(f"Warning: cannot write .*{name}: ", capsys.readouterr().err)
        assert load(tmp_path / name, "last.pt")["epoch"] == 3
        assert mine.exists()
    assert not list(tmp_path.rglob("*.tmp"))


@posix
def test_checkpoint_that_is_a_folder_or_a_link(start, tmp_path):
    best = tmp_path / "checkpoints" / "Glyphs" / "best.pt"
    (best / "mine").mkdir(parents=True)
    with pytest.raises(utils.Error, match=r"cannot write .*best.pt: .*; epoch 1 is saved"):
        start(tmp_path, *TINY)
    assert (best / "mine").exists()
    shutil.rmtree(best)
    best.symlink_to(tmp_path / "elsewhere.pt")
    assert start(tmp_path, "--resume") == 0
    assert best.is_symlink()
    assert utils.load_checkpoint(tmp_path / "elsewhere.pt")["epoch"] >= 1


def test_folder_without_write_permission_is_refused(start, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # real modes do not stop root
    with pytest.raises(utils.Error, match=r"cannot write into the folder .*checkpoints.Glyphs"):
        start(tmp_path, *TINY)
