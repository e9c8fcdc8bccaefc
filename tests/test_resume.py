"""A run that was interrupted, by a signal, a full disk or a crash, goes on and ends the same."""

import math
import os
import re
import shlex
import shutil
import signal
import subprocess

import pytest
import torch
from conftest import (
    OFFLINE,
    ROOT,
    SMALL,
    TINY,
    expect_same_run,
    files,
    finish,
    load,
    options,
    picture_dir,
    posix,
    printed_rows,
    run_dir,
    with_ctrl_c,
)

import train
import utils

try:
    import resource
except ImportError:  # Windows
    resource = None

# --- Interrupts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("epoch", [1, 2, 4])
def test_resume_after_an_interrupt_ends_with_the_same_run(
    tmp_path, small_run, glyphs_dir, start, capsys, epoch
):
    assert start(tmp_path, *SMALL, stop_at=15 * epoch - 7) == 130  # amid the epoch's 15 steps
    err = capsys.readouterr().err
    if epoch == 1:
        assert "no epoch was saved yet" in err
        with pytest.raises(utils.Error, match="no run"):
            start(tmp_path, "--resume")
        return
    assert f"epoch {epoch - 1} is saved" in err
    assert re.search(f"--resume --name Glyphs --data-dir {glyphs_dir} .*--device cpu$", err)
    assert len(load(tmp_path, "last.pt")["history"]) == epoch - 1
    assert (picture_dir(tmp_path) / "metrics.png").exists()
    assert start(tmp_path, "--resume") == 0
    expect_same_run(tmp_path, small_run)


@pytest.mark.parametrize("option", [*(f"--recipe={name}" for name in train.RECIPES), "--full"])
def test_every_recipe_resumes_to_the_same_run(tmp_path, start, option):
    assert start(tmp_path / "straight", *TINY, option) == 0
    assert start(tmp_path / "stopped", *TINY, option, stop_at=5) == 130
    assert start(tmp_path / "stopped", "--resume") == 0
    expect_same_run(tmp_path / "straight", tmp_path / "stopped")


@posix
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
def test_command_printed_after_a_signal_ends_with_the_same_run(
    launch, start, small_run, tmp_path, glyphs_dir, monkeypatch, number
):
    stopped = tmp_path / "stopped here"
    line = [*SMALL, *options(stopped, glyphs_dir)]
    process = launch(ROOT / "train.py", *line, prepare=with_ctrl_c())
    assert any(re.match(" *1/4 ", text) for text in process.stdout)
    process.send_signal(number)
    status, _, err = finish(process)
    assert status == 130, err
    again = re.search(r"Stopped: epoch \d is saved in .*last.pt; go on with: (.* --resume .*)", err)
    words = shlex.split(again[1])
    assert words[2:7] == ["--resume", "--name", "Glyphs", "--data-dir", str(glyphs_dir)]
    monkeypatch.chdir(tmp_path)
    if number == signal.SIGINT:
        subprocess.run(again[1], shell=True, check=True, env=os.environ | OFFLINE)
    else:
        assert train.main(words[2:]) == 0
    expect_same_run(stopped, small_run)


def test_interrupt_outside_the_training_is_one_line_too(run_script, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(utils, "load_images", interrupted)
    assert run_script(train.main, *options(tmp_path, tmp_path)) == (130, "", "\nStopped.\n")


# --- Full disks -----------------------------------------------------------------------------------


@pytest.mark.skipif(resource is None, reason="needs a limit on the size of files")
def test_full_disk_keeps_the_checkpoint_from_before(launch, small_run, glyphs_dir, tmp_path):
    """A limit lower than the size of a checkpoint stands for the full disk."""
    shutil.copytree(small_run, tmp_path, dirs_exist_ok=True)
    before = files(tmp_path)

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

    line = [*TINY, *options(tmp_path, glyphs_dir)]
    status, _, err = finish(launch(ROOT / "train.py", *line, prepare=limit))
    assert status == 2
    note, error = err.splitlines()
    assert note.startswith("Note: ")
    assert re.search(r"cannot write .*last.pt: File too large \(what was there .*; no epoch", error)
    assert files(tmp_path) == before


@pytest.mark.parametrize(("name", "saved"), [("last.pt", 1), ("best.pt", 2)])
def test_disk_that_fills_up_costs_one_epoch(start, tmp_path, monkeypatch, name, saved):
    """In the second epoch, which is a better one."""
    line = [*TINY, "--limit=1500", "--batch-size=50"]
    real = utils.save

    def save(checkpoint, path):
        if path.name == name and checkpoint["epoch"] == 2:
            raise utils.Error(f"cannot write {name}: No space left on device")
        real(checkpoint, path)

    with monkeypatch.context() as patch:
        patch.setattr(utils, "save", save)
        with pytest.raises(utils.Error, match=rf"write {name}: No.*; epoch {saved} is saved in"):
            start(tmp_path, *line)
    assert load(tmp_path, "last.pt")["epoch"] == saved
    assert load(tmp_path, "best.pt")["epoch"] == 1
    assert start(tmp_path, "--resume", stop_at=1) == 130
    assert load(tmp_path, "best.pt")["epoch"] == saved  # which is brought up to date first
    assert start(tmp_path, "--resume") == 0
    assert start(tmp_path / "straight", *line) == 0
    expect_same_run(tmp_path, tmp_path / "straight")


@posix
def test_checkpoint_that_is_a_folder_or_a_link(start, tmp_path):
    best = run_dir(tmp_path) / "best.pt"
    (best / "mine").mkdir(parents=True)
    with pytest.raises(utils.Error, match=r"cannot write .*best.pt: .*; epoch 1 is saved"):
        start(tmp_path, *TINY)
    assert (best / "mine").exists()
    shutil.rmtree(best)
    best.symlink_to(tmp_path / "elsewhere.pt")
    assert start(tmp_path, "--resume") == 0
    assert best.is_symlink()
    assert utils.load_checkpoint(tmp_path / "elsewhere.pt")["epoch"] >= 1


# --- What is there, and what is asked for ---------------------------------------------------------


def change_last(folder, change):
    last = load(folder, "last.pt")
    change(last)
    utils.save(last, run_dir(folder) / "last.pt")


def test_run_of_an_older_version_resumes_to_the_same_run(stopped, small_run, start):
    old = {"dataset": "Glyphs", "workers": 2} | load(stopped, "last.pt")["options"]
    del old["full"]
    change_last(stopped, lambda last: last.update(options=old))
    assert start(stopped, "--resume") == 0
    expect_same_run(stopped, small_run)


@pytest.mark.parametrize("best", [1, 2])
def test_deleted_best_comes_back_or_its_loss_is_said(stopped, start, capsys, best):
    change_last(stopped, lambda last: last["history"][best - 1].update(val_accuracy=1.0))
    path = run_dir(stopped) / "best.pt"
    path.unlink()
    assert start(stopped, "--resume") == 0
    out, err = capsys.readouterr()
    gone = best == 1  # the weights of the last epoch are in last.pt, too
    note = r"Note: .*best.pt is gone, and with it the weights of epoch 1;"
    assert bool(re.match(note, err)) == bool(err) == gone != path.exists()
    weights, which = (path.with_name("last.pt"), ", of the last epoch") if gone else (path, "")
    assert f"Weights:    {weights}{which}\n" in out
    assert (f"test.py --checkpoint {weights} " in out) == gone


def test_resume_of_a_complete_run_changes_nothing(small_run, start, capsys):
    before = files(small_run)
    assert start(small_run, "--resume") == 0
    out = capsys.readouterr().out
    assert "4 of 4 epochs are done: it is already complete" in out
    assert "learning rate" not in out  # the table's header
    assert not printed_rows(out)
    assert "Best epoch: " in out
    assert start(small_run, "--resume", *SMALL) == 0  # the same options again
    assert files(small_run) == before
    with pytest.raises(utils.Error, match="no run on MNIST"):
        start(small_run, "--resume", "--dataset=MNIST")


CONTRADICTIONS = [
    *(("--epochs=5", "4"), ("--epochs=3", "4"), ("--batch-size=7", "100"), ("--lr=0.5", "0.05")),
    *(("--weight-decay=0", "0.015"), ("--recipe=long", "default"), ("--seed=3", "0")),
    *(("--limit=77", "1500"), ("--limit=77", "no --limit"), ("--full", "no --full")),
]


@pytest.mark.parametrize(("option", "then"), CONTRADICTIONS)
def test_resume_refuses_options_that_contradict_the_run(stopped, start, option, then):
    if then == "no --limit":
        change_last(stopped, lambda last: last["options"].update(limit=None))
    before = files(stopped)
    then = then if then.startswith("no ") else f"{option.partition('=')[0]}={then}"
    match = f"^{option}.* contradicts .*last.pt, whose run has {then}:"
    with pytest.raises(utils.Error, match=match):
        start(stopped, "--resume", option)
    assert files(stopped) == before


HUGE = torch.zeros(1).double().expand(10**6, 10**6)  # 8 bytes that would be 8 TB if copied
LOST = "cannot be resumed"


def state(last, optimizer):
    return last["optimizers"][optimizer]["state"]


FORGED = {
    "no state": (lambda last: [last.pop("optimizers"), last.pop("random")], LOST),
    "unknown parameter": (lambda last: state(last, 1).update({99: {}}), LOST),
    "no moments": (lambda last: state(last, 1)[0].pop("exp_avg"), LOST),
    "huge moments": (lambda last: state(last, 0)[0].update(momentum=HUGE), LOST),
    "short random state": (lambda last: last.update(random=torch.zeros(3).byte()), LOST),
    "nan weight": (lambda last: last["model"]["f7.bias"].fill_(math.nan), "f7.bias has values"),
    "wrong epoch": (lambda last: last.update(epoch=1), "not a checkpoint"),
    "lr is a word": (
        lambda last: last["options"].update(lr="fast"),
        "--lr: 'fast' is not a number",
    ),
    "epochs below 0": (
        lambda last: last["options"].update(epochs=-3),
        "--epochs: '-3' is not a whole",
    ),
    "recipe is a list": (
        lambda last: last["options"].update(recipe=[]),
        "by this version: .*recipe",
    ),
    "unknown recipe": (
        lambda last: last["options"].update(recipe="best"),
        "by this version: .*recipe: .*best",
    ),
    "newer format": (lambda last: last.update(format=utils.FORMAT + 1), "update the project"),
}


@pytest.mark.parametrize(("change", "match"), FORGED.values(), ids=FORGED)
def test_resume_refuses_what_train_py_cannot_have_written(stopped, start, change, match):
    change_last(stopped, change)
    before = files(stopped)
    with pytest.raises(utils.Error, match=match) as caught:
        start(stopped, "--resume")
    assert "last.pt" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert files(stopped) == before


# --- Two runs in one folder -----------------------------------------------------------------------


@pytest.mark.skipif(utils.fcntl is None, reason="needs locks")
@pytest.mark.parametrize("place", [run_dir, picture_dir], ids=["checkpoints", "pictures"])
def test_second_run_in_the_same_folder_is_refused(start, stopped, place):
    before = files(stopped)
    with utils.claim(place(stopped)):
        for line in (TINY, ["--resume"]):
            with pytest.raises(utils.Error, match=r"another run is at work in .*Glyphs: wait"):
                start(stopped, *line)
    assert files(stopped) == before


@pytest.mark.skipif(utils.fcntl is None, reason="needs locks")
@pytest.mark.parametrize("how", ["no locks on this file system", "no locks on this system"])
def test_run_without_locks_works(start, tmp_path, monkeypatch, how):
    def refuse(*_):
        raise OSError(37, "No locks available")

    if "file" in how:
        monkeypatch.setattr(utils.fcntl, "flock", refuse)
    else:
        monkeypatch.setattr(utils, "fcntl", None)
    assert start(tmp_path, *TINY) == 0
