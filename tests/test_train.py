"""Training: it learns, it is repeatable, and it goes on where it was interrupted."""

import csv
import io
import math
import re

import pytest
import torch
from conftest import expect_same_run, flatten, interrupt_after, load, options

import train
import utils
from model import FastLeNet, LeNet

SMALL = ["--dataset=Glyphs", "--limit=1500", "--epochs=4", "--batch-size=100"]


@pytest.fixture(scope="module")
def small_run(tmp_path_factory, glyphs_dir):
    """The folder of a small run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("small")
    assert train.main([*SMALL, *options(folder, glyphs_dir)]) == 0
    return folder


def test_it_learns_glyphs_in_three_epochs(glyphs_run):
    history = load(glyphs_run, "last.pt")["history"]
    assert len(history) == 3
    assert history[-1]["val_accuracy"] > 0.9
    assert history[-1]["train_loss"] < history[0]["train_loss"] / 2


def test_two_epochs_on_real_data_reach_83_percent(real_data, tmp_path):
    folders = options(tmp_path, real_data)
    assert train.main(["--dataset=FashionMNIST", "--epochs=2", *folders]) == 0
    best = utils.load_checkpoint(tmp_path / "checkpoints" / "FashionMNIST" / "best.pt")
    assert best["history"][-1]["val_accuracy"] > 0.83


def test_checkpoints_say_what_they_are(small_run):
    best, last = load(small_run, "best.pt"), load(small_run, "last.pt")
    for checkpoint in (best, last):
        assert checkpoint["format"] == utils.FORMAT
        assert checkpoint["dataset"] == "Glyphs"
        assert checkpoint["classes"] == list("0123456789")
        assert checkpoint["options"]["limit"] == 1500
        assert checkpoint["torch"] == str(torch.__version__)
        assert len(checkpoint["history"]) == checkpoint["epoch"]
    assert last["epoch"] == 4
    assert {"optimizers", "random"} <= last.keys()
    assert not {"optimizers", "random"} & best.keys()
    accuracies = [row["val_accuracy"] for row in last["history"]]
    assert best["epoch"] == accuracies.index(max(accuracies)) + 1


def test_best_weights_have_the_accuracy_of_the_best_epoch(small_run, glyphs_dir):
    best = load(small_run, "best.pt")
    images, labels = utils.load_images("Glyphs", glyphs_dir, "train")
    _, (images, labels) = utils.split_train_validation(images, labels)
    model = LeNet()
    utils.restore(model, best, "best.pt")
    pixels = best["mean"], best["std"]
    alone = utils.Workers("cpu")
    loss, accuracy = train.evaluate(model, images[:1500], labels[:1500], *pixels, alone)
    assert accuracy == best["history"][-1]["val_accuracy"]
    assert loss == pytest.approx(best["history"][-1]["val_loss"], rel=1e-5)


def test_mean_and_std_are_those_of_the_train_split(small_run, glyphs_dir):
    images, labels = utils.load_images("Glyphs", glyphs_dir, "train")
    (images, _), _ = utils.split_train_validation(images, labels)
    best = load(small_run, "best.pt")
    assert (best["mean"], best["std"]) == utils.pixel_statistics(images)


def test_metrics_are_written_and_drawn(small_run):
    folder = small_run / "images" / "Glyphs"
    rows = list(csv.DictReader(io.StringIO((folder / "metrics.csv").read_text())))
    history = load(small_run, "last.pt")["history"]
    assert [{key: float(value) for key, value in row.items()} for row in rows] == history
    assert (folder / "metrics.png").read_bytes().startswith(b"\x89PNG")


def test_same_seed_same_weights_other_seed_other_weights(tmp_path, small_run, glyphs_dir):
    torch.rand(7)  # what happened before has no influence
    assert train.main([*SMALL, *options(tmp_path, glyphs_dir)]) == 0
    expect_same_run(tmp_path, small_run)
    assert train.main([*SMALL, "--seed=1", *options(tmp_path, glyphs_dir)]) == 0
    assert flatten(load(tmp_path, "last.pt")["model"]) != flatten(
        load(small_run, "last.pt")["model"]
    )


@pytest.mark.parametrize("epoch", [1, 2, 4])
def test_resume_after_an_interrupt_ends_with_the_same_run(
    tmp_path, small_run, glyphs_dir, monkeypatch, capsys, epoch
):
    real, calls = FastLeNet.forward, []

    def interrupted(self, x):
        calls.append(self.training)
        if sum(calls) == 15 * (epoch - 1) + 8:  # in the middle of the epoch's 15 batches
            raise KeyboardInterrupt
        return real(self, x)

    folders = options(tmp_path, glyphs_dir)
    with monkeypatch.context() as patch:
        patch.setattr(FastLeNet, "forward", interrupted)
        assert train.main([*SMALL, *folders]) == 130
    err = capsys.readouterr().err
    if epoch == 1:
        assert "no epoch was saved yet" in err
        with pytest.raises(utils.Error, match="no run"):
            train.main(["--resume", *folders])
        return
    assert f"epoch {epoch - 1} is saved" in err
    assert f"--resume --dataset Glyphs --data-dir {glyphs_dir}" in err
    assert len(load(tmp_path, "last.pt")["history"]) == epoch - 1
    assert train.main(["--resume", *folders]) == 0
    expect_same_run(tmp_path, small_run)


@pytest.mark.parametrize("recipe", train.RECIPES)
def test_every_recipe_resumes_to_the_same_run(tmp_path, glyphs_dir, monkeypatch, recipe):
    line = ["--dataset=Glyphs", "--limit=300", "--epochs=3", f"--recipe={recipe}"]
    assert train.main([*line, *options(tmp_path / "straight", glyphs_dir)]) == 0

    folders = options(tmp_path / "stopped", glyphs_dir)
    with monkeypatch.context() as patch:
        patch.setattr(train, "print_epoch", interrupt_after(2))
        assert train.main([*line, *folders]) == 130
    assert train.main(["--resume", *folders]) == 0
    expect_same_run(tmp_path / "straight", tmp_path / "stopped")


def test_learning_rate_goes_up_and_down_once():
    rates = [train.one_cycle(i / 100) for i in range(101)]
    assert rates[0] == pytest.approx(0.04)
    assert max(rates) == rates[30] == 1
    assert rates == sorted(rates[:31]) + sorted(rates[31:], reverse=True)
    assert rates[100] == pytest.approx(0)


def test_crash_between_last_and_best_is_mended(tmp_path, small_run, glyphs_dir, monkeypatch):
    """The first save of best.pt never happens; resuming makes up for it."""
    real = utils.save

    def crash(checkpoint, path):
        if path.name == "best.pt":
            raise MemoryError
        real(checkpoint, path)

    folders = options(tmp_path, glyphs_dir)
    with monkeypatch.context() as patch:
        patch.setattr("utils.checkpoint.save", crash)
        with pytest.raises(MemoryError):
            train.main([*SMALL, *folders])
    assert train.main(["--resume", *folders]) == 0
    expect_same_run(tmp_path, small_run)


def test_resume_of_a_complete_run_changes_nothing(tmp_path, glyphs_dir, capsys):
    folders = options(tmp_path, glyphs_dir)
    train.main([*SMALL, "--epochs=1", *folders])
    before = flatten(load(tmp_path, "last.pt"))
    assert train.main(["--resume", *folders]) == 0
    assert "Best epoch: 1 of 1" in capsys.readouterr().out
    assert flatten(load(tmp_path, "last.pt")) == before


@pytest.mark.parametrize(
    "option",
    [
        "--epochs=5",
        "--epochs=3",
        "--batch-size=7",
        "--lr=0.5",
        "--weight-decay=0",
        "--recipe=long",
        "--seed=3",
        "--limit=77",
    ],
)
def test_resume_refuses_options_that_contradict_the_run(small_run, glyphs_dir, option):
    before = flatten(load(small_run, "last.pt"))
    name, value = option.split("=")
    with pytest.raises(utils.Error, match=f"^{name} {value}.* contradicts .*last.pt"):
        train.main(["--resume", option, *options(small_run, glyphs_dir)])
    assert flatten(load(small_run, "last.pt")) == before


def test_resume_accepts_the_same_options_again(small_run, glyphs_dir):
    assert train.main(["--resume", *SMALL, *options(small_run, glyphs_dir)]) == 0


def test_resume_of_another_data_set_finds_no_run(small_run, glyphs_dir):
    with pytest.raises(utils.Error, match="no run on MNIST"):
        train.main(["--resume", "--dataset=MNIST", *options(small_run, glyphs_dir)])


def huge_state(last):
    """A state of 4 bytes that claims to be 4 TB, and would be if it were copied."""
    last["optimizers"][0]["state"][0]["momentum"] = torch.zeros(1).double().expand(10**6, 10**6)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda last: [last.pop("optimizers"), last.pop("random")], "cannot be resumed"),
        (lambda last: last["optimizers"].pop(), "cannot be resumed"),
        (lambda last: last["optimizers"][1]["state"].update({99: {}}), "cannot be resumed"),
        (lambda last: last["optimizers"][0]["state"].clear(), "cannot be resumed"),
        (lambda last: last["optimizers"][1]["state"][0].pop("exp_avg"), "cannot be resumed"),
        (huge_state, "cannot be resumed"),
        (lambda last: last.update(random=torch.zeros(3, dtype=torch.uint8)), "cannot be resumed"),
        (lambda last: last["model"]["f7.bias"].fill_(math.nan), "f7.bias has values"),
        (lambda last: last["model"].pop("c1.bias"), "c1.bias is missing"),
        (lambda last: last.update(dataset="MNIST"), "belongs to a run on MNIST"),
        (lambda last: last.update(epoch=2), "its epoch and history disagree"),
        (lambda last: last["history"].reverse(), "its history is"),
        (lambda last: last["history"][1].update(val_loss=math.nan), "its history is"),
        (lambda last: last["options"].update(epochs=-3), "cannot be resumed: .*epochs"),
        (lambda last: last["options"].update(lr="fast"), "cannot be resumed: .*lr"),
        (lambda last: last["options"].update(recipe="best"), "cannot be resumed: .*recipe"),
        (lambda last: last["options"].clear(), "older version"),
        (lambda last: last.update(format=utils.FORMAT + 1), "update the project"),
    ],
)
def test_resume_refuses_what_train_py_cannot_have_written(
    tmp_path, small_run, glyphs_dir, change, match
):
    last = load(small_run, "last.pt")
    change(last)
    path = tmp_path / "checkpoints" / "Glyphs" / "last.pt"
    utils.save(last, path)
    before = path.read_bytes()
    with pytest.raises(utils.Error, match=match) as caught:
        train.main(["--resume", *options(tmp_path, glyphs_dir)])
    assert "last.pt" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == before
    assert not list(tmp_path.rglob("best.pt"))


def test_new_run_says_that_it_overwrites_an_unfinished_one(tmp_path, glyphs_dir, capsys):
    folders = options(tmp_path, glyphs_dir)
    train.main([*SMALL, *folders])
    assert "unfinished" not in capsys.readouterr().err
    last = load(tmp_path, "last.pt")
    last["options"]["epochs"] = 9
    utils.save(last, tmp_path / "checkpoints" / "Glyphs" / "last.pt")
    train.main([*SMALL, "--epochs=1", *folders])
    assert "unfinished run" in capsys.readouterr().err


def test_loss_that_is_not_finite_stops_the_run_and_leaves_the_weights(
    tmp_path, glyphs_dir, monkeypatch
):
    folders = options(tmp_path, glyphs_dir)
    real, calls = train.F.cross_entropy, []

    def explode(logits, labels, **how):
        calls.append(logits.requires_grad)
        return real(logits, labels, **how) * (math.inf if sum(calls) == 20 else 1)

    monkeypatch.setattr(train.F, "cross_entropy", explode)
    with pytest.raises(
        utils.Error, match=r"stopped in epoch 2: the loss is no longer finite.*; epoch 1 is"
    ):
        train.main([*SMALL, *folders])
    assert sum(calls) == 30  # at the end of the epoch
    last = load(tmp_path, "last.pt")
    assert last["epoch"] == 1
    assert all(tensor.isfinite().all() for tensor in last["model"].values())


def test_absurd_learning_rate_ends_with_a_message(tmp_path, glyphs_dir):
    with pytest.raises(utils.Error, match="smaller --lr"):
        train.main([*SMALL, "--lr=1e30", *options(tmp_path, glyphs_dir)])
    assert not list(tmp_path.rglob("*.pt"))


def test_accuracy_at_chance_is_warned_of(tmp_path, glyphs_dir, capsys):
    train.main([*SMALL, "--lr=1e-9", "--epochs=2", *options(tmp_path, glyphs_dir)])
    assert "chance" in capsys.readouterr().err


@pytest.mark.parametrize(("limit", "batch", "epochs"), [(1, 1, 1), (1, 128, 2), (5, 2, 1)])
def test_very_short_runs_work(tmp_path, glyphs_dir, limit, batch, epochs):
    line = [f"--limit={limit}", f"--batch-size={batch}", f"--epochs={epochs}", "--dataset=Glyphs"]
    assert train.main([*line, *options(tmp_path, glyphs_dir)]) == 0


def test_output_without_a_terminal_is_plain(tmp_path, glyphs_dir, capsys):
    train.main([*SMALL, "--epochs=2", "--batch-size=25", *options(tmp_path, glyphs_dir)])
    out, err = capsys.readouterr()
    assert not err
    assert "\r" not in out
    assert "\x1b" not in out
    assert "Glyphs: 1,500 images to train on, 1,500 for validation" in out
    rows = [line for line in out.splitlines() if re.match(r" +[12]/2 ", line)]
    assert len(rows) == 2
    assert len({len(row.removesuffix("  best so far")) for row in rows}) == 1  # aligned
    assert re.search(r"Best epoch: \d of 2, validation accuracy on Glyphs .*/1500\)", out)
    assert "python test.py --dataset Glyphs" in out
