"""Checkpoints: atomic writes, damaged and foreign files, resuming, kills, full disks, locks."""

import errno
import functools
import importlib.util
import os
import pickle
import random
import shlex
import shutil
import signal
import sys

import pytest
import torch
from conftest import (
    ROOT,
    SMALL_RUN,
    assert_same_run,
    checkpoint,
    comparable,
    evaluate,
    files,
    posix,
)

import train
import utils

TINY_RUN = ["--dataset=Glyphs", "--limit=300", "--epochs=3", "--batch-size=100"]
OTHER_RUN = [*SMALL_RUN, "--epochs=2", "--seed=1"]
pytestmark = pytest.mark.usefixtures("no_plots")


@pytest.fixture(scope="module")
def other_run(tmp_path_factory, options):
    directory = tmp_path_factory.mktemp("other")
    train.main([*OTHER_RUN, *options(directory)])
    return directory


@pytest.fixture
def run(tmp_path, finished_run):
    """A copy of the finished run, which may be changed."""
    return shutil.copytree(finished_run, tmp_path / "run")


def resume(directory, options, *argv):
    train.main(["--resume", *options(directory), *argv])


def change(path, **changes):
    utils.save(utils.load(path) | changes, path)


def fail_at(number, code, function, calls):
    """Count the calls, and let one of them fail."""

    def replacement(*args):
        calls.append(args)
        if len(calls) == number:
            raise OSError(code, os.strerror(code))
        return function(*args)

    return replacement


# --- Files ----------------------------------------------------------------------------------------


def test_file_is_written_completely_before_it_replaces_the_old_one(tmp_path, monkeypatch):
    path, seen = tmp_path / "file", []

    def fsync(descriptor):
        (temporary,) = tmp_path.glob("*.tmp")
        seen.append((temporary.name, os.fstat(descriptor).st_size, path.read_bytes()))
        if len(seen) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")

    path.write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", fsync)
    for content in (b"first", b"second"):
        random.seed(0)
        utils.write_file(path, content)
    with pytest.raises(utils.Error, match=r"^cannot write .*file: No space left on device$"):
        utils.write_file(path, b"third")
    assert [(size, old) for _, size, old in seen] == [(5, b"old"), (6, b"first"), (5, b"second")]
    assert files(tmp_path) == {path.relative_to(tmp_path): b"second"}
    assert len({name for name, _, _ in seen}) == 3  # containers may share a directory and a pid


@posix
def test_link_stays_a_link(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "target")
    utils.write_file(tmp_path / "link", b"content")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_bytes() == b"content"


def test_unwritable_directory_is_an_error(tmp_path, options, error_of):
    (tmp_path / "checkpoints").write_text("a file")
    error = error_of(train.main, *SMALL_RUN, *options(tmp_path))
    assert "cannot write to" in error
    assert "choose another --output-dir" in error


def test_damage_is_noticed_or_has_no_effect(run):
    path = run / "checkpoints" / "Glyphs" / "best.pt"
    content, rng = path.read_bytes(), random.Random(0)
    expected = comparable(utils.load_checkpoint(path))
    for end in range(0, len(content), len(content) // 10):
        path.write_bytes(content[:end])
        with pytest.raises(utils.Error, match=r"best\.pt is damaged, or was not written by"):
            utils.load_checkpoint(path)
    for _ in range(30):
        damaged = bytearray(content)
        damaged[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            assert comparable(utils.load_checkpoint(path)) == expected
        except utils.Error as error:
            assert "best.pt" in str(error)


class Attack(str):
    """The path of a file that is created when this is unpickled carelessly."""

    def __reduce__(self):
        return open, (str(self), "w")


def test_code_in_a_file_is_never_executed(tmp_path):
    path, trap = tmp_path / "best.pt", tmp_path / "trap"
    torch.save({"model": Attack(trap)}, path, _use_new_zipfile_serialization=False)
    contents = [path.read_bytes(), pickle.dumps(Attack(trap))]
    utils.save({"model": Attack(trap)}, path)
    for content in [*contents, path.read_bytes()]:
        path.write_bytes(content)
        with pytest.raises(utils.Error, match="is damaged, or was not written by this project"):
            utils.load_checkpoint(path)
    assert not trap.exists()
    torch.load(path, weights_only=False)
    assert trap.exists()  # the attack works


def test_files_that_are_not_checkpoints_are_rejected(tmp_path, run, options, error_of):
    def error(path):
        return error_of(evaluate.main, f"--checkpoint={path}", *options(tmp_path))

    path = run / "checkpoints" / "Glyphs" / "best.pt"
    good = utils.load(path)
    assert "cannot read" in error(tmp_path / "missing.pt")
    assert "cannot read" in error(tmp_path)
    for content in ([1, 2], {}, good["model"], good | {"version": 3}, {"format": 3}):
        utils.save(content, path)
        assert "not a checkpoint of this version of train.py: train again, or use" in error(path)
    utils.save(good | {"dataset": "Letters"}, path)
    assert "trained on Letters, which is not in DATASETS" in error(path)
    utils.save(good | {"name": "../../home"}, path)
    assert "has an invalid name" in error(path)
    path.write_text("text")
    assert "is damaged" in error(path)


# --- Selection ------------------------------------------------------------------------------------


def test_best_epoch_is_the_first_of_equal_ones_or_the_last_without_validation():
    history = [{"epoch": i, "val_accuracy": value} for i, value in enumerate([0.1, 0.3, 0.3, 0.2])]
    assert utils.best_row(history)["epoch"] == 1
    assert utils.best_row([{"epoch": 1}, {"epoch": 2}])["epoch"] == 2


def test_newest_matching_run_is_selected(run, capsys):
    def select(*argv, main=evaluate):
        args = main.parse_args([f"--output-dir={run}", *argv])
        args = args[0] if main is train else args
        path, found = utils.newest_checkpoint(args, resume=main is train)
        return path.relative_to(checkpoints), found["name"]

    checkpoints = run / "checkpoints"
    for name in ("old", "new", "mnist"):
        shutil.copytree(checkpoints / "Glyphs", checkpoints / name)  # as if renamed
    shutil.rmtree(checkpoints / "Glyphs")
    change(checkpoints / "mnist" / "best.pt", dataset="MNIST")
    times = {"old": (5, 1), "new": (2, 9), "mnist": (4, 4)}  # of best.pt and last.pt
    for name, (best, last) in times.items():
        os.utime(checkpoints / name / "best.pt", (best, best))
        os.utime(checkpoints / name / "last.pt", (last, last))
    best, last = [[checkpoints / name / file for name in times] for file in ("best.pt", "last.pt")]
    new = last[1].relative_to(checkpoints)
    assert select() == (new.with_name("best.pt"), "new")
    assert select(main=train) == (new, "new")
    assert select("--name=old")[1] == "old"
    assert select("--dataset=MNIST")[1] == "mnist"
    with pytest.raises(utils.Unavailable, match=r"^there is no run named old on MNIST in .*: start"):
        select("--name=old", "--dataset=MNIST")
    best[1].write_text("text")
    os.utime(best[1], (9, 9))
    assert select()[1] == "old"
    assert "new/best.pt is damaged" in capsys.readouterr().err
    for argv, main in ((["--name=new"], evaluate), ([], train)):
        with pytest.raises(utils.Error, match="new/best.pt is damaged"):
            select(*argv, main=main)


# --- Changed networks -----------------------------------------------------------------------------


@pytest.fixture
def edited(tmp_path, monkeypatch):
    """Return LeNet from a copy of model.py in which texts were replaced."""

    def edited(*replacements):
        path = tmp_path / f"edited{len(list(tmp_path.glob('edited*.py')))}.py"
        text = (ROOT / "model.py").read_text(encoding="utf-8")
        for old, new in replacements:
            assert old in text
            text = text.replace(old, new)
        path.write_text(text, encoding="utf-8")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, path.stem, module)
        spec.loader.exec_module(module)
        return module.LeNet

    return edited


def test_weights_of_another_network_are_rejected(run, edited):
    path = run / "checkpoints" / "Glyphs" / "best.pt"
    saved = utils.load(path)
    tanh, small = edited(("nn.Sigmoid()", "nn.Tanh()")), edited(("84", "80"))
    nan = saved | {"logits": saved["logits"] * float("nan")}
    for network, content, reason in (
        (tanh, saved, "`self.sig = nn.Sigmoid()` where model.py has `self.sig = nn.Tanh()`"),
        (tanh, saved | {"code": ""}, "its logits for a fixed image differ"),
        (small, saved, "`self.f6 = nn.Linear(120, 84) self.f7 = nn.Linear(84, num_classes)`"),
        (small, saved | {"code": ""}, "size mismatch for f6.weight"),
        (edited(), nan, "its logits for a fixed image differ"),
    ):
        with pytest.raises(utils.Error, match="was trained with a different network: ") as error:
            utils.load_weights(path, content, network())
        assert reason in str(error.value)
    same = edited(("LeNet-5 for", "Not LeNet-5 for"), ("  # N x 84\n", "  # a comment\n\n"))
    for layout in (torch.channels_last, torch.contiguous_format):
        utils.load_weights(path, saved, same().to(memory_format=layout))


# --- Resuming -------------------------------------------------------------------------------------


@pytest.mark.parametrize("epoch", [1, 2, 4])
def test_resumed_run_is_bit_identical(tmp_path, finished_run, options, stop_at, epoch):
    stop_at(15 * epoch - 7)  # in the middle of the epoch
    saved = f"Epoch {epoch - 1} is saved" if epoch > 1 else "No epoch has been saved yet"
    with pytest.raises(KeyboardInterrupt, match=saved):
        train.main([*SMALL_RUN, *options(tmp_path)])
    if epoch == 1:
        with pytest.raises(utils.Unavailable, match="there is no run in"):
            resume(tmp_path, options)
        return
    resume(tmp_path, options)
    assert_same_run(tmp_path, finished_run)


@pytest.mark.parametrize("option", ["--recipe=long", "--full"])
def test_every_recipe_can_be_resumed(tmp_path, options, stop_at, option):
    train.main([*TINY_RUN, option, *options(tmp_path / "straight")])
    stop_at(5)
    with pytest.raises(KeyboardInterrupt):
        train.main([*TINY_RUN, option, *options(tmp_path / "stopped")])
    resume(tmp_path / "stopped", options)
    assert_same_run(tmp_path / "straight", tmp_path / "stopped")


def test_resume_of_a_finished_run_changes_nothing_and_rejects_other_options(run, options, capsys):
    before = files(run)
    (run / "checkpoints" / "Glyphs" / "last.pt.0.tmp").touch()  # of a killed run
    (run / "images" / "Glyphs" / "metrics.csv.0.tmp").touch()
    resume(run, options, *SMALL_RUN)
    assert "already finished after 4 epochs" in capsys.readouterr().out
    changed = "--recipe=long --epochs=5 --batch-size=7 --lr=0.5 --weight-decay=0 --shift=2 "
    changed += "--label-smoothing=0.1 --seed=3 --limit=77 --full"
    for option in changed.split():
        with pytest.raises(utils.Error, match=f"^{option.split('=')[0]} differs from .*last.pt"):
            resume(run, options, option)
    assert files(run) == before


def test_what_cannot_continue_a_run_is_rejected(tmp_path, options, edited, stop_at, monkeypatch):
    a, b = "\n        self.a = nn.Linear(84, 84)", "\n        self.b = nn.Linear(84, 84)"
    flatten, f7 = "self.flatten = nn.Flatten()", ("self.f7(x)", "self.f7(self.a(x) - self.b(x))")
    monkeypatch.setattr(train, "LeNet", edited((flatten, flatten + a + b), f7))
    stop_at(5)
    with pytest.raises(KeyboardInterrupt):
        train.main([*TINY_RUN, *options(tmp_path)])
    monkeypatch.setattr(train, "LeNet", edited((flatten, flatten + b + a), f7))
    with pytest.raises(utils.Error, match="the parameters in model.py or their order changed"):
        resume(tmp_path, options)
    path = tmp_path / "checkpoints" / "Glyphs" / "last.pt"
    weights = utils.load(path)
    del weights["optimizers"]
    utils.save(weights, path)
    with pytest.raises(utils.Error, match="contains only weights and cannot be resumed"):
        resume(tmp_path, options)


# --- Kills and full disks -------------------------------------------------------------------------


def kill_at(directory, number):
    """Kill this process at a file operation in `directory`, counted from 1."""
    count = [0]

    def operation(event, arguments):
        if event == "os.fsync" or (
            event in ("open", "os.rename", "os.remove") and str(directory) in str(arguments[0])
        ):
            count[0] += 1
            if count[0] == number:
                os.kill(os.getpid(), signal.SIGKILL)

    fsync = os.fsync
    os.fsync = lambda descriptor: (fsync(descriptor), operation("os.fsync", ()))
    sys.addaudithook(operation)


def run_process(start_process, argv, prepare=None):
    process, log = start_process("train.py", *argv, prepare=prepare)
    process.join(120)
    assert process.exitcode in (0, -signal.SIGKILL), log.read_text(encoding="utf-8")
    return process.exitcode == 0


def test_run_that_is_killed_again_and_again_is_bit_identical(
    tmp_path, finished_run, start_process, options
):
    rng, kills = random.Random(0), 0
    best = tmp_path / "checkpoints" / "Glyphs" / "best.pt"
    while kills < 8:
        argv = ["--resume"] if best.exists() else SMALL_RUN
        prepare = functools.partial(kill_at, tmp_path / "checkpoints", rng.randint(3, 25))
        finished = run_process(start_process, [*argv, *options(tmp_path)], prepare)
        kills += not finished
        if finished:
            assert_same_run(tmp_path, finished_run)
            shutil.rmtree(tmp_path / "checkpoints")
    assert run_process(start_process, ["--resume", *options(tmp_path)])
    assert_same_run(tmp_path, finished_run)
    assert not list(tmp_path.rglob("*.tmp"))
