"""Signals, closed pipes, full disks, a second run, odd machines: nothing is lost, no traceback."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import OFFLINE, ROOT, expect_same_run, interrupt_after, load, options

import train
import utils

resource = pytest.importorskip("resource")  # not on Windows
RUN = ["--dataset=Glyphs", "--limit=3000", "--epochs=8"]
SMALL = ["--dataset=Glyphs", "--limit=300", "--epochs=3"]


@pytest.fixture
def start():
    """Start a script in the background; what still runs is killed after the test."""
    processes = []

    def popen(script, *line, env=OFFLINE, limit=None, **how):
        def prepare():
            # A background shell ignores Ctrl-C, and its children would inherit that.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            if limit:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        process = subprocess.Popen(
            [sys.executable, ROOT / script, *line],
            **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | how,
            text=True,
            env=os.environ | env,
            preexec_fn=prepare,
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
    process = start("train.py", *RUN, *options(stopped, glyphs_dir))
    wait_for_epoch(process, 1)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert re.search(r"Stopped: epoch \d is saved in .*last.pt; go on with: python train.py", err)
    assert f" --resume --dataset Glyphs --data-dir {glyphs_dir} --checkpoint-dir " in err
    assert "Traceback" not in err
    assert train.main(["--resume", *options(stopped, glyphs_dir)]) == 0
    assert train.main([*RUN, *options(straight, glyphs_dir)]) == 0
    expect_same_run(stopped, straight)


SLOW_PLOT = """
import time
def plot_metrics(*_):
    print("drawing", flush=True)
    time.sleep(60)
import utils.plots
utils.plots.plot_metrics = plot_metrics
"""


def test_second_signal_ends_the_run_at_once(tmp_path, glyphs_dir, start):
    """The first one is about to draw what there is, which takes its time here."""
    (tmp_path / "sitecustomize.py").write_text(SLOW_PLOT)
    path = {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    line = [*RUN, *options(tmp_path, glyphs_dir)]
    process = start("train.py", *line, env=OFFLINE | path)
    for text in process.stdout:
        if text == "drawing\n":
            break
    process.send_signal(signal.SIGINT)
    for text in process.stdout:
        if text == "drawing\n":
            break
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == -signal.SIGINT
    assert "Traceback" not in err
    assert load(tmp_path, "last.pt")["epoch"] == 1


@pytest.mark.parametrize("script", ["train.py", "test.py"])
def test_signal_during_the_imports_is_quiet(tmp_path, start, script):
    (tmp_path / "torch.py").write_text(
        "print('importing', flush=True)\nimport time\ntime.sleep(60)"
    )
    process = start(script, env=OFFLINE | {"PYTHONPATH": str(tmp_path)})
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == -signal.SIGINT
    assert not err


@pytest.mark.parametrize("line", ["train.py", "test.py", "train.py --help", "train.py --lr nan"])
def test_closed_pipe_is_quiet(tmp_path, glyphs_dir, glyphs_run, start, line):
    script, *line = line.split()
    if script == "train.py" and not line:
        line = [*SMALL, *options(tmp_path, glyphs_dir)]
    elif script == "test.py":
        weights = glyphs_run / "checkpoints" / "Glyphs" / "best.pt"
        line = [f"--checkpoint={weights}", *options(tmp_path, glyphs_dir)]
    process = start(script, *line)
    process.stdout.close()
    err = process.stderr.read()
    status = process.wait(timeout=60)
    if line == ["--lr", "nan"]:
        assert status == 2
        assert len(err.splitlines()) == 1
    else:
        assert status == (0 if line == ["--help"] else 141)
        assert not err


def test_output_to_a_full_disk_is_one_line(tmp_path, glyphs_dir, start):
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    with Path("/dev/full").open("w") as full:
        line = [*SMALL, *options(tmp_path, glyphs_dir)]
        process = start("train.py", *line, stdout=full)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert err == "train.py: error: cannot write the output: No space left on device\n"


def test_second_run_in_the_same_folder_is_refused(tmp_path, glyphs_dir, start):
    straight = tmp_path / "straight"
    process = start("train.py", *RUN, *options(tmp_path, glyphs_dir))
    wait_for_epoch(process, 1)
    process.send_signal(signal.SIGSTOP)
    for line in (RUN, ["--resume"]):
        with pytest.raises(utils.Error, match=r"another run is at work in .*checkpoints/Glyphs"):
            train.main([*line, *options(tmp_path, glyphs_dir)])
    mine = [f"--checkpoint-dir={tmp_path / 'mine'}"]  # but its pictures in the same place
    with pytest.raises(utils.Error, match=r"another run is at work in .*images/Glyphs"):
        train.main([*RUN, *options(tmp_path, glyphs_dir), *mine])
    process.send_signal(signal.SIGCONT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert train.main([*RUN, *options(straight, glyphs_dir)]) == 0
    expect_same_run(tmp_path, straight)


def test_resume_takes_what_another_run_saved_in_the_meantime(tmp_path, glyphs_dir, monkeypatch):
    """The folder's own run goes on between the look at last.pt and the lock."""
    folders, real = options(tmp_path, glyphs_dir), train.load_splits

    with monkeypatch.context() as patch:
        patch.setattr(train, "print_epoch", interrupt_after(1))
        assert train.main([*SMALL, *folders]) == 130

    def meanwhile(line):
        def load_splits(*args):
            with monkeypatch.context() as patch:
                patch.setattr(train, "load_splits", real)
                assert train.main([*line, *folders]) == 0
            return real(*args)

        return load_splits

    monkeypatch.setattr(train, "load_splits", meanwhile(["--resume"]))
    assert train.main(["--resume", *folders]) == 0
    monkeypatch.setattr(train, "load_splits", real)
    assert train.main([*SMALL, *options(tmp_path / "straight", glyphs_dir)]) == 0
    expect_same_run(tmp_path, tmp_path / "straight")

    monkeypatch.setattr(train, "load_splits", meanwhile([*SMALL, "--seed=1"]))
    with pytest.raises(utils.Error, match="another run has begun meanwhile"):
        train.main(["--resume", *folders])
    assert load(tmp_path, "last.pt")["options"]["seed"] == 1


def test_full_disk_keeps_the_checkpoint_from_before(tmp_path, glyphs_dir, glyphs_run, start):
    """A limit on the size of files, lower than a checkpoint's, stands for the full disk."""
    shutil.copytree(glyphs_run / "checkpoints", tmp_path / "checkpoints")
    last = tmp_path / "checkpoints" / "Glyphs" / "last.pt"
    before = last.read_bytes()
    process = start("train.py", *SMALL, *options(tmp_path, glyphs_dir), limit=200_000)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert len(err.splitlines()) == 1
    assert re.search(
        r"stopped in epoch 1: cannot write .*last.pt: File too large \(what was there .*; no epoch",
        err,
    )
    assert last.read_bytes() == before
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize(("name", "saved"), [("last.pt", 1), ("best.pt", 2)])
def test_disk_that_fills_up_costs_one_epoch(tmp_path, glyphs_dir, monkeypatch, name, saved):
    folders, real = options(tmp_path, glyphs_dir), utils.save

    def save(checkpoint, path):
        if path.name == name and checkpoint["epoch"] == 2:
            raise utils.Error(f"cannot write {name}: No space left on device")
        real(checkpoint, path)

    monkeypatch.setattr("utils.checkpoint.best_epoch", lambda history: history[-1])
    with monkeypatch.context() as patch:
        patch.setattr(utils, "save", save)
        patch.setattr("utils.checkpoint.save", save)
        with pytest.raises(utils.Error, match=rf"epoch 2: .*{name}.*; epoch {saved} is saved in"):
            train.main([*SMALL, *folders])
    assert load(tmp_path, "last.pt")["epoch"] == saved
    assert load(tmp_path, "best.pt")["epoch"] == 1
    assert train.main(["--resume", *folders]) == 0
    assert train.main([*SMALL, *options(tmp_path / "straight", glyphs_dir)]) == 0
    expect_same_run(tmp_path, tmp_path / "straight")


@pytest.mark.parametrize("name", ["metrics.png", "metrics.csv"])
def test_picture_that_cannot_be_written_does_not_stop_it(tmp_path, glyphs_dir, capsys, name):
    (tmp_path / "images" / "Glyphs" / name / "mine").mkdir(parents=True)
    assert train.main([*SMALL, *options(tmp_path, glyphs_dir)]) == 0
    assert f"{name}: there is something else in its place" in capsys.readouterr().err
    assert load(tmp_path, "last.pt")["epoch"] == 3
    assert not list(tmp_path.rglob("*.tmp"))


def test_checkpoint_that_is_a_folder_or_a_link(tmp_path, glyphs_dir):
    run = tmp_path / "checkpoints" / "Glyphs"
    (run / "best.pt" / "mine").mkdir(parents=True)
    message = r"cannot write .*best.pt: there is something else in its place; epoch 1 is saved"
    with pytest.raises(utils.Error, match=message):
        train.main([*SMALL, *options(tmp_path, glyphs_dir)])
    assert (run / "best.pt" / "mine").exists()
    shutil.rmtree(run / "best.pt")
    os.mkfifo(run / "best.pt")
    with pytest.raises(utils.Error, match=r"cannot write .*best.pt: there is something else"):
        train.main(["--resume", *options(tmp_path, glyphs_dir)])
    assert (run / "best.pt").is_fifo()
    (run / "best.pt").unlink()
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
