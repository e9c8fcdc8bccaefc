"""Signals, closed pipes, full disks, a second run, odd machines: nothing is lost, no traceback."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import OFFLINE, ROOT, expect_same_run, load, options

import train
import utils

RUN = ["--dataset=Glyphs", "--limit=6000", "--epochs=3"]
SMALL = ["--dataset=Glyphs", "--limit=300", "--epochs=3"]


@pytest.fixture
def start():
    """Start train.py in the background; what still runs is killed after the test."""
    processes = []

    def popen(*line, **how):
        process = subprocess.Popen(
            [sys.executable, ROOT / "train.py", *line],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | OFFLINE,
            # A background shell ignores Ctrl-C, and its children would inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            **how,
        )
        processes.append(process)
        return process

    yield popen
    for process in processes:
        process.kill()
        process.communicate()


def wait_for_epoch(process, epoch):
    for line in process.stdout:
        if re.match(rf" *{epoch}/", line):
            return
    raise AssertionError(process.stderr.read())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_resume_after_a_signal_ends_with_the_same_run(tmp_path, glyphs_dir, start, number):
    stopped, straight = tmp_path / "stopped", tmp_path / "straight"
    process = start(*RUN, *options(stopped, glyphs_dir))
    wait_for_epoch(process, 1)
    while not (stopped / "images" / "Glyphs" / "metrics.png").exists():
        assert process.poll() is None
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "is saved" in err
    assert f"go on with: python train.py --resume --dataset Glyphs --data-dir {glyphs_dir}" in err
    assert "Traceback" not in err
    assert train.main(["--resume", *options(stopped, glyphs_dir)]) == 0
    assert train.main([*RUN, *options(straight, glyphs_dir)]) == 0
    expect_same_run(stopped, straight)


def test_second_signal_ends_the_run_at_once(tmp_path, glyphs_dir, start):
    process = start(*RUN, "--epochs=1000", *options(tmp_path, glyphs_dir))
    wait_for_epoch(process, 1)
    while process.poll() is None:
        process.send_signal(signal.SIGINT)
        time.sleep(0.05)
    assert "Traceback" not in process.stderr.read()
    assert load(tmp_path, "last.pt")["epoch"] >= 1


def test_signal_during_the_imports_is_quiet(tmp_path, glyphs_dir, start):
    process = start(*RUN, *options(tmp_path, glyphs_dir))
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode in (-signal.SIGINT, 130)
    assert "Traceback" not in err


def test_closed_pipe_is_quiet(tmp_path, glyphs_dir, start):
    process = start(*SMALL, *options(tmp_path, glyphs_dir))
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=60) == 141
    assert not process.stderr.read()
    assert train.main(["--resume", *options(tmp_path, glyphs_dir)]) == 0


def test_second_run_in_the_same_folder_is_refused(tmp_path, glyphs_dir, start):
    straight = tmp_path / "straight"
    process = start(*RUN, *options(tmp_path, glyphs_dir))
    wait_for_epoch(process, 1)
    for line in (RUN, ["--resume"]):
        with pytest.raises(utils.Error, match=r"another run is at work in .*checkpoints/Glyphs"):
            train.main([*line, *options(tmp_path, glyphs_dir)])
    mine = [f"--checkpoint-dir={tmp_path / 'mine'}"]  # but its pictures in the same place
    with pytest.raises(utils.Error, match=r"another run is at work in .*images/Glyphs"):
        train.main([*RUN, *options(tmp_path, glyphs_dir), *mine])
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert train.main([*RUN, *options(straight, glyphs_dir)]) == 0
    expect_same_run(tmp_path, straight)


def test_full_disk_keeps_the_checkpoint_from_before(tmp_path, glyphs_dir, start, monkeypatch):
    """A limit on the size of files, lower than a checkpoint's, stands for the full disk."""
    resource = pytest.importorskip("resource")
    with monkeypatch.context() as patch:
        patch.setattr(train, "print_epoch", lambda *_: os.kill(os.getpid(), signal.SIGINT))
        assert train.main([*SMALL, *options(tmp_path, glyphs_dir)]) == 130
    last = tmp_path / "checkpoints" / "Glyphs" / "last.pt"
    before = last.read_bytes()
    process = start("--resume", *options(tmp_path, glyphs_dir))
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (200_000, 200_000))
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert len(err.splitlines()) == 1
    assert re.search(r"cannot write .*last.pt: File too large \(what was there", err)
    assert last.read_bytes() == before
    assert not list(tmp_path.rglob("*.tmp"))

    assert train.main(["--resume", *options(tmp_path, glyphs_dir)]) == 0
    assert train.main([*SMALL, *options(tmp_path / "straight", glyphs_dir)]) == 0
    expect_same_run(tmp_path, tmp_path / "straight")


@pytest.mark.parametrize("name", ["metrics.png", "metrics.csv"])
def test_picture_that_cannot_be_written_does_not_stop_it(tmp_path, glyphs_dir, capsys, name):
    (tmp_path / "images" / "Glyphs" / name / "mine").mkdir(parents=True)
    assert train.main([*SMALL, *options(tmp_path, glyphs_dir)]) == 0
    assert f"{name}: Is a directory" in capsys.readouterr().err
    assert load(tmp_path, "last.pt")["epoch"] == 3
    assert not list(tmp_path.rglob("*.tmp"))


def test_checkpoint_that_is_a_folder_or_a_link(tmp_path, glyphs_dir):
    run = tmp_path / "checkpoints" / "Glyphs"
    (run / "best.pt" / "mine").mkdir(parents=True)
    with pytest.raises(utils.Error, match=r"cannot write .*best.pt: Is a directory"):
        train.main([*SMALL, *options(tmp_path, glyphs_dir)])
    assert (run / "best.pt" / "mine").exists()
    shutil.rmtree(run / "best.pt")
    (tmp_path / "elsewhere.pt").write_bytes(b"old")
    (run / "best.pt").symlink_to(tmp_path / "elsewhere.pt")
    assert train.main(["--resume", *options(tmp_path, glyphs_dir)]) == 0
    assert (run / "best.pt").is_symlink()
    assert utils.load_checkpoint(tmp_path / "elsewhere.pt")["epoch"] >= 1


def test_folder_without_write_permission_is_refused(tmp_path, glyphs_dir, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # real modes do not stop root
    with pytest.raises(utils.Error, match=r"cannot write into the folder .*checkpoints/Glyphs"):
        train.main([*SMALL, *options(tmp_path, glyphs_dir)])


@pytest.mark.parametrize("threads", [1, 2])
def test_odd_surroundings(tmp_path, glyphs_dir, threads):
    """No home, no display, ASCII, a path with spaces and umlauts, another current folder."""
    home = tmp_path / "Übung 1, größer" / "lenet"
    for name in ("model.py", "train.py", "test.py"):
        home.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, home)
    shutil.copytree(ROOT / "utils", home / "utils")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    environment = {
        "PATH": os.environ["PATH"],
        "LC_ALL": "C",
        "PYTHONCOERCECLOCALE": "0",
        "PYTHONIOENCODING": "ascii",
        "PYTHONHASHSEED": "random",
        "HOME": "/nonexistent" if threads == 1 else "/proc",
        "OMP_NUM_THREADS": str(threads),
    }
    for script, line in (("train.py", SMALL), ("test.py", [])):
        result = subprocess.run(
            [sys.executable, home / script, f"--data-dir={glyphs_dir}", *line],
            cwd=elsewhere,
            env=environment | OFFLINE,
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr
        assert "Traceback" not in result.stderr
    assert not list(elsewhere.iterdir())
    names = {path.name for path in (home / "images" / "Glyphs").iterdir()}
    assert names >= {"metrics.csv", "metrics.png", "predict.png", "confusion.png", "mistakes.png"}
    assert {p.name for p in (home / "checkpoints" / "Glyphs").iterdir()} == {"best.pt", "last.pt"}
