"""Training: it learns, it is repeatable, and it goes on where it was interrupted."""

import csv
import io
import math
import re
import shutil

import pytest
import torch
from conftest import expect_same_run, files, flatten, judge, load, options

import train
import utils
from model import LeNet

SMALL = ["--dataset=Glyphs", "--limit=1500", "--epochs=4", "--batch-size=100"]
TINY = ["--dataset=Glyphs", "--limit=300", "--epochs=3"]


@pytest.fixture(scope="module")
def small_run(tmp_path_factory, start):
    """The folder of a small run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("small")
    assert start(folder, *SMALL) == 0
    return folder


@pytest.fixture(scope="module")
def stopped_run(tmp_path_factory, start):
    folder = tmp_path_factory.mktemp("stopped")
    assert start(folder, *SMALL, stop_at=31) == 130
    return folder


@pytest.fixture
def stopped(tmp_path, stopped_run):
    """The folder of the same run, stopped after two of its four epochs; it may be changed."""
    return shutil.copytree(stopped_run, tmp_path / "stopped")


def change_last(folder, change):
    last = load(folder, "last.pt")
    change(last)
    utils.save(last, folder / "checkpoints" / "Glyphs" / "last.pt")


def test_two_epochs_on_real_data_reach_83_percent(real_data, tmp_path):
    line = ["--dataset=FashionMNIST", "--epochs=2", *options(tmp_path, real_data)]
    assert train.main(line) == 0
    best = utils.load_checkpoint(tmp_path / "checkpoints" / "FashionMNIST" / "best.pt")
    assert best["history"][-1]["val_accuracy"] > 0.83


def test_run_learns_glyphs_in_three_epochs(glyphs_run):
    history = load(glyphs_run, "last.pt")["history"]
    assert len(history) == 3
    assert history[-1]["val_accuracy"] > 0.9
    assert history[-1]["train_loss"] < history[0]["train_loss"] / 2


def test_checkpoints_and_metrics_say_what_was_done(small_run):
    best, last = load(small_run, "best.pt"), load(small_run, "last.pt")
    for checkpoint in (best, last):
        assert checkpoint["format"] == utils.FORMAT
        assert checkpoint["dataset"] == "Glyphs"
        assert checkpoint["classes"] == list("0123456789")
        assert checkpoint["options"].keys() == {*train.OPTIONS}
        assert checkpoint["options"]["limit"] == 1500
        assert checkpoint["torch"] == str(torch.__version__)
        assert len(checkpoint["history"]) == checkpoint["epoch"]
    assert last["epoch"] == 4
    assert last.keys() - best.keys() == {"optimizers", "random"}
    accuracies = [row["val_accuracy"] for row in last["history"]]
    assert best["epoch"] == accuracies.index(max(accuracies)) + 1
    folder = small_run / "images" / "Glyphs"
    rows = csv.DictReader(io.StringIO((folder / "metrics.csv").read_text(encoding="utf-8")))
    assert [{key: float(value) for key, value in row.items()} for row in rows] == last["history"]
    assert (folder / "metrics.png").read_bytes().startswith(b"\x89PNG")


def test_best_weights_have_the_accuracy_of_the_best_epoch(small_run, glyphs_dir):
    best, data = load(small_run, "best.pt"), utils.load_images("Glyphs", glyphs_dir, "train")
    (train_images, _), (images, labels) = utils.split_train_validation(*data)
    pixels = best["mean"], best["std"]
    assert pixels == utils.pixel_statistics(train_images)
    utils.restore(model := LeNet(), best, "best.pt")
    logits, row = utils.predict(model, images[:1500], *pixels), best["history"][-1]
    right = (logits.argmax(dim=1) == labels[:1500]).float()
    assert right.mean() == row["val_accuracy"]
    loss = torch.nn.functional.cross_entropy(logits, labels[:1500]).item()
    assert loss == pytest.approx(row["val_loss"], rel=1e-5)


def test_same_seed_same_weights_other_seed_other_weights(tmp_path, small_run, start):
    torch.rand(7)  # what happened before has no influence
    assert start(tmp_path, *SMALL) == 0
    expect_same_run(tmp_path, small_run)
    assert start(tmp_path, *SMALL, "--seed=1") == 0
    weights = [flatten(load(folder, "last.pt")["model"]) for folder in (tmp_path, small_run)]
    assert weights[0] != weights[1]


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
    assert f"--resume --dataset Glyphs --data-dir {glyphs_dir}" in err
    assert len(load(tmp_path, "last.pt")["history"]) == epoch - 1
    assert start(tmp_path, "--resume") == 0
    expect_same_run(tmp_path, small_run)


@pytest.mark.parametrize("option", [*(f"--recipe={name}" for name in train.RECIPES), "--full"])
def test_every_recipe_resumes_to_the_same_run(tmp_path, start, option):
    assert start(tmp_path / "straight", *TINY, option) == 0
    assert start(tmp_path / "stopped", *TINY, option, stop_at=5) == 130
    assert start(tmp_path / "stopped", "--resume") == 0
    expect_same_run(tmp_path / "straight", tmp_path / "stopped")


def test_run_of_an_older_version_resumes_to_the_same_run(stopped, small_run, start):
    old = {"dataset": "Glyphs"} | load(stopped, "last.pt")["options"]
    del old["full"]
    change_last(stopped, lambda last: last.update(options=old))
    assert start(stopped, "--resume") == 0
    expect_same_run(stopped, small_run)


def test_learning_rate_goes_up_and_down_once():
    rates = [train.one_cycle(i / 100) for i in range(101)]
    assert rates[0] == pytest.approx(0.04)
    assert max(rates) == rates[30] == 1
    assert rates == sorted(rates[:31]) + sorted(rates[31:], reverse=True)
    assert rates[100] == pytest.approx(0)


@pytest.mark.parametrize("best", [1, 2])
def test_deleted_best_comes_back_or_its_loss_is_said(stopped, start, capsys, best):
    change_last(stopped, lambda last: last["history"][best - 1].update(val_accuracy=1.0))
    path = stopped / "checkpoints" / "Glyphs" / "best.pt"
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
    assert "already complete" in out
    assert train.HEADER not in out
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
    match = f"^{option.replace('=', ' ')}.* contradicts .*last.pt, whose run has {then}:"
    with pytest.raises(utils.Error, match=match):
        start(stopped, "--resume", option)
    assert files(stopped) == before


HUGE = torch.zeros(1).double().expand(10**6, 10**6)  # 8 bytes that would be 8 TB if copied
FORGED = [
    (lambda last: [last.pop("optimizers"), last.pop("random")], "cannot be resumed"),
    (lambda last: last["optimizers"][1]["state"].update({99: {}}), "cannot be resumed"),
    (lambda last: last["optimizers"][1]["state"][0].pop("exp_avg"), "cannot be resumed"),
    (lambda last: last["optimizers"][0]["state"][0].update(momentum=HUGE), "cannot be resumed"),
    (lambda last: last.update(random=torch.zeros(3, dtype=torch.uint8)), "cannot be resumed"),
    (lambda last: last["model"]["f7.bias"].fill_(math.nan), "f7.bias has values"),
    (lambda last: last.update(dataset="MNIST"), "belongs to a run on MNIST"),
    (lambda last: last.update(epoch=1), "not a checkpoint"),
    (lambda last: last["options"].update(lr="fast"), "its lr 'fast' is not a number above 0"),
    (lambda last: last["options"].update(epochs=-3), "its epochs -3 is not a whole number from 1"),
    (lambda last: last["options"].update(recipe=[]), "of another version"),
    (lambda last: last["options"].update(recipe="best"), "the recipe best of another version"),
    (lambda last: last.update(format=utils.FORMAT + 1), "update the project"),
]


@pytest.mark.parametrize(("change", "match"), FORGED)
def test_resume_refuses_what_train_py_cannot_have_written(stopped, start, change, match):
    change_last(stopped, change)
    before = files(stopped)
    with pytest.raises(utils.Error, match=match) as caught:
        start(stopped, "--resume")
    assert "last.pt" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert files(stopped) == before


def test_new_run_says_first_that_it_overwrites_another(stopped, start, monkeypatch, capsys):
    said = []
    monkeypatch.setattr(train, "print_epoch", lambda *_: said.append(capsys.readouterr().err))
    for folder in (stopped / "new", stopped, stopped):  # the last time, a run that is complete
        start(folder, *TINY, "--epochs=1")
    assert [bool(re.match("Note: the run in .* is overwritten", err)) for err in said] == [0, 1, 1]


def test_loss_that_is_not_finite_stops_the_run_and_leaves_the_files(stopped, start, monkeypatch):
    real, calls, before = train.F.cross_entropy, [], files(stopped)

    def explode(logits, labels, **how):
        calls.append(logits.requires_grad)
        return real(logits, labels, **how) * (math.inf if sum(calls) == 5 else 1)

    monkeypatch.setattr(train.F, "cross_entropy", explode)
    match = "no longer finite in epoch 3: start anew with a smaller rate, such as --lr 0.0125$"
    with pytest.raises(utils.Error, match=match):
        start(stopped, "--resume")
    assert sum(calls) == 15  # at the end of the epoch
    assert files(stopped) == before
    monkeypatch.undo()
    with pytest.raises(utils.Error, match="in epoch 1: start anew with a smaller rate"):
        start(stopped / "absurd", *SMALL, "--lr=1e18")
    assert not list((stopped / "absurd").rglob("*.pt"))


@pytest.mark.parametrize("epochs", [2, 3])
def test_accuracy_at_chance_is_warned_of_while_epochs_are_left(tmp_path, start, capsys, epochs):
    assert start(tmp_path, *SMALL, "--lr=1e-9", f"--epochs={epochs}") == 0
    assert ("chance" in capsys.readouterr().err) == (epochs == 3)


def test_very_short_runs_work(tmp_path, start):
    for line in ("--limit=1 --batch-size=1", "--limit=1 --epochs=2", "--limit=5 --batch-size=2"):
        assert start(tmp_path, "--dataset=Glyphs", "--epochs=1", *line.split()) == 0


def test_output_without_a_terminal_is_plain(tmp_path, start, capsys):
    start(tmp_path, *SMALL, "--epochs=2")
    out, err = capsys.readouterr()
    assert not err
    assert not {"\r", "\x1b"} & set(out)
    assert "Glyphs: 1,500 images to train on, 1,500 for validation" in out
    rows = re.findall(r"^ +[12]/2 .*\d", out, re.MULTILINE)
    assert [len(row) for row in rows] == [len(train.HEADER)] * 2  # aligned
    assert re.search(r"Best epoch: \d of 2, validation accuracy on Glyphs .*/1500\)", out)
    assert re.search(r"test.py --dataset Glyphs", out)


def test_full_run_has_no_validation_and_keeps_the_last_epoch(tmp_path, start, glyphs_dir, capsys):
    assert start(tmp_path, *TINY, "--full") == 0
    out = capsys.readouterr().out
    assert "Glyphs: 300 images to train on, 0 for validation" in out
    assert len(re.findall(r"^ +\d/3 .*% +- +- +\S+$", out, re.MULTILINE)) == 3
    assert "Last epoch: 3; no image was held back" in out
    assert [tuple(row) for row in load(tmp_path, "best.pt")["history"]] == [utils.HISTORY[:4]] * 3
    assert (tmp_path / "images" / "Glyphs" / "metrics.png").exists()
    assert judge.main(options(tmp_path, glyphs_dir)) == 0
    assert "epoch 3 of a run on Glyphs, validation images included" in capsys.readouterr().out


def test_tilde_in_a_folder_is_the_home(tmp_path, monkeypatch):
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path))
    assert train.parse_args(["--checkpoint-dir=~/runs"]).checkpoint_dir == tmp_path / "runs"


def test_gpu_without_kernels_is_passed_over_or_refused_by_name(monkeypatch, capsys):
    def ones(size, device):
        if device == "cuda":
            raise RuntimeError("no kernel image is available\nfor this GPU")
        return torch.zeros(size, device=device)

    monkeypatch.setattr(torch, "ones", ones)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert utils.choose_device("auto") == utils.choose_device("cpu") == torch.device("cpu")
    assert "the GPU does not work (no kernel image is available)" in capsys.readouterr().err
    with pytest.raises(utils.Error, match=r"--device cuda does not work \(no kernel image"):
        utils.choose_device("cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_trains_as_the_cpu_does(small_run, tmp_path, start):
    assert start(tmp_path, *SMALL, "--device=cuda") == 0
    histories = (load(folder, "last.pt")["history"] for folder in (tmp_path, small_run))
    for row, expected in zip(*histories, strict=True):
        assert row == pytest.approx(expected, abs=2e-2)
