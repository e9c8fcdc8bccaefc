"""Checkpoints: damaged and foreign files, selection, resuming, kills, full disks and locks."""

import contextlib
import errno
import importlib
import itertools
import os
import random
import re
import shutil
import signal
import sys
from functools import partial

import pytest
import torch
from conftest import ROOT, SMALL_RUN, assert_same_run, comparable, evaluate, files

import train
import utils
from model import LeNet

TINY_RUN = ["--dataset=Glyphs", "--limit=100", "--epochs=9", "--batch-size=50"]  # 2 steps an epoch
BEST, LAST = "checkpoints/Glyphs/best.pt", "checkpoints/Glyphs/last.pt"
pytestmark = pytest.mark.usefixtures("no_plots")


@pytest.fixture
def run(tmp_path, finished_run):
    """The output directory of a finished run, which may be changed."""
    return shutil.copytree(finished_run, tmp_path / "run")


def test_file_is_on_disk_before_it_replaces_the_old_one(tmp_path, monkeypatch):
    path, link, seen = tmp_path / "file", tmp_path / "link", []

    def fsync(descriptor):
        names = [temporary.name for temporary in tmp_path.glob("*.tmp")]
        seen.append((os.fstat(descriptor).st_size, path.read_bytes(), names))

    path.write_bytes(b"old")
    link.symlink_to(path)
    monkeypatch.setattr(os, "fsync", fsync)
    for content in (b"first", b"second"):
        utils.write_file(link, content)
    assert [state[:2] for state in seen] == [(5, b"old"), (6, b"first")]
    assert seen[0][2] != seen[1][2]  # processes in two containers may have the same id
    assert (link.is_symlink(), path.read_bytes()) == (True, b"second")


class Attack:
    def __reduce__(self):
        return pytest.fail, ("code in the file was executed",)


def test_code_in_a_file_is_never_executed(tmp_path):
    for zipped in (False, True):
        torch.save(Attack(), tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
        with pytest.raises(utils.Error, match="is damaged, or was not written by this project"):
            utils.load(tmp_path / "a.pt")


def test_damaged_and_foreign_files_are_rejected(run, options, error_of):
    path, rng = run / BEST, random.Random(0)
    data, good = path.read_bytes(), utils.load(path)
    argv = [evaluate.main, f"--checkpoint={path}", *options(run)]
    for content in (data[:-1], data[: len(data) // 2], b"", b"text\n"):
        path.write_bytes(content)
        assert "is damaged, or was not written by this project" in error_of(*argv)
    for content in ([1, 2], {}, good["model"], good | {"version": 3}, {"format": 3}):
        utils.save(content, path)
        assert "is not a checkpoint of this version of train.py: train again" in error_of(*argv)
    utils.save(good | {"dataset": "Letters"}, path)
    assert "was trained on Letters, which is not in DATASETS" in error_of(*argv)
    utils.save(good | {"name": "../../home"}, path)
    assert "has an invalid run name: '../../home'" in error_of(*argv)
    for _ in range(30):  # a flipped bit is noticed or has no effect
        damaged = bytearray(data)
        damaged[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        with contextlib.suppress(utils.Error):
            assert comparable(utils.load(path)) == comparable(good)
    path.unlink()
    assert "cannot read" in error_of(*argv)


def test_best_epoch_is_the_first_of_equal_ones_or_the_last_without_validation():
    history = [{"val_accuracy": 0.1}, {"val_accuracy": 0.3, "epoch": 2}, {"val_accuracy": 0.3}]
    assert utils.best_row(history) is history[1]
    assert utils.best_row([{"epoch": 1}, {"epoch": 2}]) == {"epoch": 2}


def test_newest_matching_run_is_selected(run, capsys):
    def select(*argv, resume=False):
        args = evaluate.parse_args([f"--output-dir={run}", *argv])
        return utils.newest_checkpoint(args, resume)[1]["name"]

    old, new = run / "checkpoints" / "old", run / "checkpoints" / "new"
    shutil.copytree(run / "checkpoints" / "Glyphs", old)
    (run / "checkpoints" / "Glyphs").rename(new)
    times = {old / "best.pt": 5, old / "last.pt": 1, new / "best.pt": 2, new / "last.pt": 9}
    for path, time in times.items():
        os.utime(path, (time, time))
    assert [select(), select(resume=True), select("--name=old")] == ["new", "new", "old"]
    with pytest.raises(utils.Unavailable, match=r"^there is no run named old on MNIST in "):
        select("--name=old", "--dataset=MNIST")
    (new / "best.pt").write_text("text")
    assert select() == "old"
    assert re.match(r"Warning: .*new/best.pt is damaged.*; skipping it\n", capsys.readouterr().err)
    for argv, resume in ((["--name=new"], False), ([], True)):
        with pytest.raises(utils.Error, match=r"new/best\.pt is damaged"):
            select(*argv, resume=resume)


def test_only_weights_of_the_same_network_are_loaded(tmp_path, run, monkeypatch):
    def edited(old, new):
        name = f"{tmp_path.name}_{len(list(tmp_path.glob('*.py')))}"
        text = (ROOT / "model.py").read_text("utf-8").replace("LeNet-5", "A net")  # docstrings
        (tmp_path / f"{name}.py").write_text(text.replace(old, new), "utf-8")
        importlib.invalidate_caches()
        return importlib.import_module(name).LeNet().to(memory_format=torch.channels_last)

    monkeypatch.syspath_prepend(tmp_path)
    saved = utils.load(run / BEST)
    activation = "`self.sig = nn.Sigmoid()` where model.py has `self.sig = nn.Tanh()`"
    for model, changes, reason in (
        (edited("nn.Sigmoid()", "nn.Tanh()"), {}, f"different network: its class has {activation}"),
        (edited("84", "80"), {}, "its class has `self.f6 = nn.Linear(120, 84) "),
        (LeNet(), {"code": "", "logits": saved["logits"] * torch.nan}, "its logits for a fixed"),
    ):
        with pytest.raises(utils.Error, match=re.escape(reason)):
            utils.load_weights(run / BEST, saved | changes, model)
    for model in (LeNet(), edited("  # N x 84", "")):
        utils.load_weights(run / BEST, saved, model)


@pytest.mark.parametrize("option", ["--recipe=default", "--recipe=long", "--full"])
@pytest.mark.parametrize("epoch", [1, 2, 4])
def test_resumed_run_is_bit_identical(tmp_path, options, stop_at, option, epoch):
    argv = [*TINY_RUN, "--epochs=4", option]
    hint = rf"Epoch {epoch - 1} is saved\. To continue: .*train\.py --resume"
    stop_at(2 * epoch)  # the last step of the epoch
    with pytest.raises(KeyboardInterrupt, match=hint if epoch > 1 else "No epoch has been saved"):
        train.main([*argv, *options(tmp_path / "stopped")])
    if epoch == 1:
        return  # there is nothing to resume
    train.main(["--resume", *options(tmp_path / "stopped")])
    train.main([*argv, *options(tmp_path / "straight")])
    assert_same_run(tmp_path / "straight", tmp_path / "stopped")


def test_resume_of_a_finished_run_changes_nothing_and_rejects_options(run, options, capsys):
    before = files(run)
    (run / f"{BEST}.0.tmp").touch()  # of a killed run
    train.main(["--resume", *SMALL_RUN, *options(run)])
    assert "already finished after 4 epochs" in capsys.readouterr().out
    changes = "--recipe=long --epochs=5 --batch-size=7 --lr=0.5 --weight-decay=0 --shift=2 "
    changes += "--label-smoothing=0.1 --seed=3 --limit=77 --full"
    for option in changes.split():
        with pytest.raises(utils.Error, match=f"^{option.split('=')[0]} differs from .*last.pt"):
            train.main(["--resume", option, *options(run)])
    assert files(run) == before


def test_layers_in_another_order_cannot_be_resumed(stopped_run, options):
    last = utils.load(stopped_run / LAST)
    utils.save(last | {"model": dict(reversed(last["model"].items()))}, stopped_run / LAST)
    with pytest.raises(utils.Error, match=r"the parameters in model\.py or their order changed"):
        train.main(["--resume", *options(stopped_run)])


def die_at(number):
    """Kill this process when it opens or renames a temporary file for the `number`th time."""
    operations = itertools.count(1)

    def audit(event, arguments):
        temporary = event in ("open", "os.rename") and str(arguments[0]).endswith(".tmp")
        if temporary and next(operations) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(audit)


def test_killed_run_is_bit_identical(tmp_path, run, start_process, options):
    train.main([*TINY_RUN, *options(tmp_path / "straight")])
    for number in (1, 2, 3, 2, 4, 6, 8, 5, 0):
        argv = ["--resume"] if utils.load(run / BEST)["options"]["limit"] == 100 else TINY_RUN
        die = partial(die_at, number)
        process, log = start_process("train.py", *argv, *options(run), prepare=die)
        process.join(120)
        assert process.exitcode == (-signal.SIGKILL if number else 0), log.read_text()
    assert_same_run(run, tmp_path / "straight")


@pytest.mark.parametrize(("write", "saved"), [(1, 0), (2, 1), (4, 1), (26, 9)])  # 3 an epoch
def test_full_disk_can_be_resumed(tmp_path, run, options, monkeypatch, finished_run, write, saved):
    fsync, writes = os.fsync, itertools.count(1)

    def full(descriptor):
        if next(writes) == write:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    train.main([*TINY_RUN, "--full", *options(tmp_path / "straight")])
    monkeypatch.setattr(os, "fsync", full)
    hint = f"Epoch {saved} is saved. To continue: .* --resume" if saved else "No epoch has been"
    with pytest.raises(utils.Error, match=rf"^cannot write .*: No space left on device\. {hint}"):
        train.main([*TINY_RUN, "--full", *options(run)])
    assert not list(run.rglob("*.tmp"))
    train.main(["--resume", *options(run)])
    assert_same_run(run, tmp_path / "straight" if saved else finished_run)


def test_second_run_in_the_same_directory_is_refused(run, options, error_of):
    before = files(run)
    assert "choose another --output-dir" in error_of(train.main, *TINY_RUN, *options(run / BEST))
    with utils.locked(evaluate.parse_args(options(run)), {"name": "Glyphs"}):
        for argv in (TINY_RUN, ["--resume"]):
            assert "another run is using" in error_of(train.main, *argv, *options(run))
        assert files(run) == before
        train.main([*TINY_RUN, "--name=other", *options(run)])


def test_file_system_without_locks_is_a_warning(tmp_path, options, monkeypatch, capsys):
    def flock(*args):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(pytest.importorskip("fcntl"), "flock", flock)
    train.main([*TINY_RUN, *options(tmp_path)])
    assert re.fullmatch("Warning: .*Glyphs cannot be locked\n", capsys.readouterr().err)
