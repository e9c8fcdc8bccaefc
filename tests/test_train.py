"""Training: what it computes, step by step; what it prints, saves and draws."""

import csv
import io
import itertools
import math
import re

import pytest
import torch
import torch.nn.functional as F
from benchmark import own_loop
from conftest import (
    SMALL,
    TINY,
    expect_same_run,
    files,
    flatten,
    judge,
    load,
    network,
    options,
    picture_dir,
    printed_rows,
    run_dir,
)

import train
import utils
from model import LeNet

# --- What it computes -----------------------------------------------------------------------------


def plain_training(train_set, val_set, epochs, lr, decay, mirror, shift, smoothing, batch, seed):
    """Train in the plainest PyTorch; yield after each epoch its row of the history and the weights.

    What is here is the algorithm; the random numbers alone are drawn as `utils.batches` does.
    """
    (images, labels), (val_images, val_labels) = train_set, val_set
    pixels = images.double() / 255
    mean, std = pixels.mean().item(), pixels.std(correction=0).item()
    count, step = len(labels), 0
    steps = epochs * math.ceil(count / batch)
    torch.manual_seed(seed)
    model = LeNet()
    hidden = {model.c1.weight, model.c3.weight, model.c5.weight, model.f6.weight}
    momentum = {weight: torch.zeros_like(weight) for weight in hidden}
    adamw = torch.optim.AdamW(set(model.parameters()) - hidden)
    for epoch in itertools.count(1):
        order, mirrored = torch.randperm(count), torch.rand(count) < 0.5
        top, left = torch.randint(2 * shift + 1, (2, count))
        if not mirror:  # digits: their strokes are made thicker (above 0) or thinner by this share
            thicker = torch.randint(-1, 2, (count,)) * torch.rand(count)
        total_loss = total_right = 0
        for first in range(0, count, batch):
            share, past = 0.04 + 0.48 * (1 - math.cos(math.pi * step / steps / 0.3)), step / steps
            if past >= 0.3:
                share = 0.5 * (1 + math.cos(math.pi * (past - 0.3) / 0.7))
            x = torch.full([min(batch, count - first), 1, 32, 32], -mean / std)
            for i, at in enumerate(range(first, first + len(x))):
                image = images[order[at]]
                image = image.flip(1) if mirror and mirrored[at] else image
                image = F.pad(image, [2 + shift] * 4)[top[at] :, left[at] :][:32, :32]
                x[i, 0] = (image / 255 - mean) / std
                if not mirror:
                    sign = 1 if thicker[at] > 0 else -1
                    extreme = sign * F.max_pool2d(sign * x[i], 3, stride=1, padding=1)
                    x[i] += thicker[at].abs() * (extreme - x[i])
            y = labels[order[first : first + batch]]
            logits = model(x)
            model.zero_grad()
            F.cross_entropy(logits, y, label_smoothing=smoothing).backward()
            total_loss += F.cross_entropy(logits, y, reduction="sum").item()
            total_right += (logits.argmax(1) == y).sum().item()
            with torch.no_grad():
                for w in hidden:
                    momentum[w] = 0.95 * momentum[w] + 0.05 * w.grad
                    u = (0.95 * momentum[w] + 0.05 * w.grad).flatten(1)
                    u = u / u.norm()
                    for _ in range(3):
                        a = u @ u.T
                        u = 3.4445 * u + (-4.7750 * a + 2.0315 * a @ a) @ u
                    u = u * math.sqrt(max(1, len(u) / u.shape[1]))
                    w.copy_((1 - share * lr * decay) * w - share * lr * u.view_as(w))
            adamw.param_groups[0].update(lr=share * lr / 2, weight_decay=2 * decay)
            adamw.step()
            step += 1
        row = {"epoch": epoch, "lr": share * lr}
        row |= {"train_loss": total_loss / count, "train_accuracy": total_right / count}
        if val_set[0] is not None:
            with torch.no_grad():
                logits = model((F.pad(val_images, [2] * 4)[:, None] / 255 - mean) / std)
            row["val_loss"] = F.cross_entropy(logits, val_labels).item()
            row["val_accuracy"] = (logits.argmax(1) == val_labels).double().mean().item()
        yield row, model.state_dict()


DEFAULT = dict(epochs=20, lr=0.05, decay=0.015, shift=0, smoothing=0.0, batch=256, seed=0)
LONG = DEFAULT | dict(epochs=150, decay=0.01, shift=1, smoothing=0.05)
CLOTHES, DIGITS = dict(mirror=True), dict(mirror=False, shift=1)
VALUES = ("epochs", "lr", "decay", "batch", "seed")  # in the order of the options' names below
OWN = "--epochs=4 --lr=0.1 --weight-decay=0.2 --batch-size=170 --seed=7"
OWN_VALUES = dict(epochs=4, lr=0.1, decay=0.2, batch=170, seed=7)
RUNS = {  # the command line after --dataset, what it stands for, and how many epochs are looked at
    "clothes": ("FashionMNIST", DEFAULT | CLOTHES, 2),
    "clothes, long": ("FashionMNIST --recipe=long", LONG | CLOTHES, 2),
    "digits": ("MNIST", DEFAULT | DIGITS, 2),
    "digits, long, full": ("MNIST --recipe=long --full", LONG | DIGITS, 2),
    "clothes, own options": (f"FashionMNIST {OWN}", DEFAULT | CLOTHES | OWN_VALUES, 4),
    "glyphs, own options": (f"Glyphs {OWN}", DEFAULT | DIGITS | OWN_VALUES, 4),
}


@pytest.mark.parametrize(("line", "values", "epochs"), RUNS.values(), ids=RUNS)
def test_training_is_what_plain_pytorch_computes(
    tmp_path, start, glyphs_dir, monkeypatch, capsys, line, values, epochs
):
    """On 1,200 digits in place of each data set; the first epochs, or the whole run."""
    images, labels = utils.load_images("Glyphs", glyphs_dir, "train")
    images, labels = data = images[:1200], labels[:1200]
    monkeypatch.setattr(utils, "load_images", lambda *_: data)
    splits = (data, (None, None)) if "--full" in line else utils.split_train_validation(*data)
    steps = math.ceil(len(splits[0][1]) / values["batch"])
    stop_at = epochs * steps + 1 if epochs < values["epochs"] else None
    line = f"--dataset={line}".split()
    assert start(tmp_path, *line, stop_at=stop_at) == (130 if stop_at else 0)

    printed = printed_rows(capsys.readouterr().out)
    last = utils.load_checkpoint(run_dir(tmp_path, line[0][10:]) / "last.pt")
    names = dict(zip(("epochs", "lr", "weight_decay", "batch_size", "seed"), VALUES))
    assert {name: last["options"][name] for name in names} == {
        n: values[v] for n, v in names.items()
    }
    plain = itertools.islice(plain_training(*splits, **values), epochs)
    rows, weights = zip(*plain)
    for row, words, expected in zip(last["history"], printed, rows, strict=True):
        assert row == pytest.approx(expected, rel=2e-3, abs=4e-3)  # an image or two, on some CPUs
        assert row["lr"] == pytest.approx(expected["lr"])
        shown = [f"{row['epoch']}/{values['epochs']}", f"{row['lr']:.2e}"]
        for split in ("train", "val")[: len(row) // 2 - 1]:
            shown += [f"{row[f'{split}_loss']:.4f}", f"{row[f'{split}_accuracy']:.2%}"]
        assert words[: len(shown)] == shown
    for name, weight in weights[-1].items():
        limit = 1e-5 if stop_at else 2e-4  # what rounding makes of more and larger steps
        torch.testing.assert_close(last["model"][name], weight, rtol=0, atol=limit)


# --- That it learns -------------------------------------------------------------------------------


def test_two_epochs_on_real_data_reach_83_percent(real_data, tmp_path):
    line = ["--dataset=FashionMNIST", "--epochs=2", *options(tmp_path, real_data)]
    assert train.main(line) == 0
    best = utils.load_checkpoint(run_dir(tmp_path, "FashionMNIST") / "best.pt")
    assert best["history"][-1]["val_accuracy"] > 0.83


def test_run_learns_glyphs_in_three_epochs(glyphs_run):
    history = load(glyphs_run, "last.pt")["history"]
    assert len(history) == 3
    assert history[-1]["val_accuracy"] > 0.9
    assert history[-1]["train_loss"] < history[0]["train_loss"] / 2


def test_same_seed_same_weights_other_seed_other_weights(tmp_path, small_run, start):
    torch.rand(7)  # what happened before has no influence
    assert start(tmp_path, *SMALL) == 0
    expect_same_run(tmp_path, small_run)
    assert start(tmp_path, *SMALL, "--seed=1") == 0
    weights = [flatten(load(folder, "last.pt")["model"]) for folder in (tmp_path, small_run)]
    assert weights[0] != weights[1]


SHORT = ("--limit=1 --batch-size=1", "--limit=1 --epochs=2", "--limit=5 --batch-size=2")


@pytest.mark.parametrize("line", SHORT)
def test_very_short_runs_work(tmp_path, start, line):
    assert start(tmp_path, "--dataset=Glyphs", "--epochs=1", *line.split()) == 0
    limit, epochs = (int(line.split()[i][-1]) for i in (0, 1))
    best, last = load(tmp_path, "best.pt"), load(tmp_path, "last.pt")
    assert len(last["history"]) == (epochs if "epochs" in line else 1)
    for row in last["history"]:  # accuracies of so many images
        for share in (row["train_accuracy"], row["val_accuracy"]):
            assert (limit * share) % 1 == pytest.approx(0, abs=1e-5)
    fresh = LeNet().state_dict()
    assert all(w.isfinite().all() and w.shape == fresh[n].shape for n, w in best["model"].items())
    assert (picture_dir(tmp_path) / "metrics.png").exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_trains_as_the_cpu_does(small_run, tmp_path, start):
    assert start(tmp_path, *SMALL, "--device=cuda") == 0
    histories = (load(folder, "last.pt")["history"] for folder in (tmp_path, small_run))
    for row, expected in zip(*histories, strict=True):
        assert row == pytest.approx(expected, abs=2e-2)


# --- What it saves --------------------------------------------------------------------------------


def test_checkpoints_and_metrics_say_what_was_done(small_run):
    best, last = load(small_run, "best.pt"), load(small_run, "last.pt")
    for checkpoint in (best, last):
        assert checkpoint["format"] == utils.FORMAT
        assert checkpoint["dataset"] == "Glyphs"
        assert checkpoint["classes"] == list("0123456789")
        chosen = {"recipe": "default", "limit": 1500, "epochs": 4, "batch_size": 100, "full": False}
        assert chosen.items() <= checkpoint["options"].items()
        assert checkpoint["torch"] == str(torch.__version__)
        assert len(checkpoint["history"]) == checkpoint["epoch"]
    assert last["epoch"] == 4
    assert last.keys() - best.keys() == {"optimizers", "random"}
    accuracies = [row["val_accuracy"] for row in last["history"]]
    assert best["epoch"] == accuracies.index(max(accuracies)) + 1
    text = (picture_dir(small_run) / "metrics.csv").read_text(encoding="utf-8")
    rows = csv.DictReader(io.StringIO(text))
    assert [{key: float(value) for key, value in row.items()} for row in rows] == last["history"]


def test_small_copies_of_the_weights_are_kept_of_epoch_0_and_the_powers_of_2(small_run):
    last = load(small_run, "last.pt")
    assert [copy["epoch"] for copy in last["copies"]] == [0, 1, 2, 4]
    torch.manual_seed(0)
    first, *_, end = last["copies"]
    for copy, weights in ((first, LeNet().state_dict()), (end, last["model"])):
        assert copy["weights"].keys() == weights.keys()
        for name, small in copy["weights"].items():
            assert torch.equal(small, weights[name].half()), name


def test_best_weights_have_the_accuracy_of_the_best_epoch(small_run, glyphs_dir):
    best, data = load(small_run, "best.pt"), utils.load_images("Glyphs", glyphs_dir, "train")
    (train_images, _), (images, labels) = utils.split_train_validation(*data)
    pixels = best["mean"], best["std"]
    assert pixels == utils.pixel_statistics(train_images)
    logits, row = utils.predict(network(best), images[:1500], *pixels), best["history"][-1]
    right = (logits.argmax(dim=1) == labels[:1500]).float()
    assert right.mean() == row["val_accuracy"]
    assert F.cross_entropy(logits, labels[:1500]).item() == pytest.approx(row["val_loss"], rel=1e-5)


def test_first_of_equal_epochs_is_the_best(tmp_path, start, capsys):
    assert start(tmp_path, *TINY, "--lr=1e-30") == 0  # nothing changes
    out = capsys.readouterr().out
    assert [row[-1] == "far" for row in printed_rows(out)] == [True, False, False]
    assert "Best epoch: 1 of 3" in out
    assert (load(tmp_path, "best.pt")["epoch"], load(tmp_path, "last.pt")["epoch"]) == (1, 3)


def test_full_run_has_no_validation_and_keeps_the_last_epoch(tmp_path, start, glyphs_dir, capsys):
    assert start(tmp_path, *TINY, "--full") == 0
    out = capsys.readouterr().out
    assert "Glyphs: 300 images to train on, 0 for validation" in out
    assert [row[4:6] for row in printed_rows(out)] == [["-", "-"]] * 3
    assert [len(row) for row in printed_rows(out)] == [7] * 3  # none is called the best
    assert "Last epoch: 3; no image was held back" in out
    assert [tuple(row) for row in load(tmp_path, "best.pt")["history"]] == [utils.HISTORY[:4]] * 3
    assert (picture_dir(tmp_path) / "metrics.png").exists()
    assert judge.main(options(tmp_path, glyphs_dir)) == 0
    assert "epoch 3 of a run on Glyphs, validation images included" in capsys.readouterr().out


# --- What it prints and draws ---------------------------------------------------------------------


def test_output_without_a_terminal_is_plain(tmp_path, start, monkeypatch, capsys):
    clock, batches = [0.0], utils.batches

    def last_seven_seconds(*args):
        clock[0] += 7
        return batches(*args)

    monkeypatch.setattr(utils, "batches", last_seven_seconds)
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    start(tmp_path, *SMALL, "--epochs=2")
    out, err = capsys.readouterr()
    assert not err
    assert not {"\r", "\x1b"} & set(out)
    assert "LeNet-5 with 61,706 parameters on cpu\n" in out
    assert "Glyphs: 1,500 images to train on, 1,500 for validation" in out
    header = next(line for line in out.splitlines() if line.startswith("    epoch "))
    rows = re.findall(r"^ +[12]/2 .*\d", out, re.MULTILINE)
    assert [len(row) for row in rows] == [len(header)] * 2  # aligned
    assert [row.split()[6] for row in rows] == ["7.0"] * 2  # each epoch's own seconds
    best = load(tmp_path, "best.pt")["history"][-1]
    result = f"Best epoch: {best['epoch']} of 2, validation accuracy on Glyphs "
    result += f"{best['val_accuracy']:.2%} ({round(1500 * best['val_accuracy'])}/1500)"
    end = [result, f"Weights:    {run_dir(tmp_path) / 'best.pt'}"]
    end += [f"Plot:       {picture_dir(tmp_path) / 'metrics.png'}, its numbers in metrics.csv"]
    assert out.split("\n\n")[-1].splitlines()[:3] == end
    assert re.search(r"Next: .* test.py --name Glyphs .*--device cpu$", out, re.MULTILINE)


@pytest.mark.parametrize("full", [False, True], ids=["with validation", "full"])
def test_plot_shows_the_history_and_the_best_epoch(tmp_path, figures, full):
    rows = [(e, 0.1, 1 / e, 0.9 - 0.5 / e, 1.2 / e, (0.7, 0.9, 0.8)[e - 1]) for e in (1, 2, 3)]
    history = [dict(zip(utils.HISTORY[: 4 if full else 6], row)) for row in rows]
    utils.plot_metrics(history, "MNIST", tmp_path / "metrics.png")
    assert (tmp_path / "metrics.png").read_bytes().startswith(b"\x89PNG")
    figure = figures["metrics.png"]
    assert "LeNet-5 on MNIST" in figure.get_suptitle()
    for ax, name, scale in zip(figure.axes, ("loss", "accuracy"), (1, 100)):
        assert name in ax.get_ylabel().lower()
        assert ax.get_xlabel() == "Epoch"
        lines = {line.get_label(): line for line in ax.lines}
        assert len({line.get_color() for line in ax.lines}) == len(lines)
        for split, label in {"train": "train", "val": "validation"}.items():
            if not (full and split == "val"):
                values = [scale * row[f"{split}_{name}"] for row in history]
                assert [*lines[label].get_xdata()] == [1, 2, 3]
                assert [*lines[label].get_ydata()] == values
                assert ax.get_ylim()[0] < min(values) < max(values) < ax.get_ylim()[1]
        best = [label for label in lines if label.startswith("best")]
        assert best == ([] if full else [f"best: epoch 2, {scale * history[1]['val_' + name]:.4g}"])
        if best:
            [x], [y] = lines[best[0]].get_data()
            assert (x, y) == (2, scale * history[1][f"val_{name}"])
            assert {line.get_xdata()[0] for line in ax.lines if len(line.get_xdata()) == 2} == {2}


def test_plot_of_a_long_run_leaves_out_the_first_epochs(tmp_path, figures):
    history = [dict.fromkeys(utils.HISTORY, 1 / e) | {"epoch": e} for e in range(1, 21)]
    utils.plot_metrics(history, "MNIST", tmp_path / "metrics.png")
    low, high = figures["metrics.png"].axes[0].get_ylim()
    assert 0 < low < 1 / 20 < 1 / 4 < high < 1 / 3  # 3 of 20 are left out


def test_new_run_says_first_that_it_overwrites_another(stopped, start, capsys):
    for folder in (stopped / "new", stopped, stopped):  # the last time, a run that is complete
        start(folder, *TINY, stop_at=1)  # before anything is written
        note = re.match("Note: the run in .* is overwritten", capsys.readouterr().err)
        assert bool(note) == (folder == stopped)
        start(folder, *TINY, "--epochs=1")
        capsys.readouterr()


def test_loss_that_is_not_finite_stops_the_run_and_leaves_the_files(stopped, start, monkeypatch):
    batches, before, steps = utils.batches, files(stopped), []

    def with_a_spoilt_image(*args):
        for x, y in batches(*args):
            steps.append(len(y))
            yield (x * math.nan if len(steps) == 5 else x), y

    monkeypatch.setattr(utils, "batches", with_a_spoilt_image)
    match = "no longer finite in epoch 3: start anew with a smaller rate, such as --lr 0.0125$"
    with pytest.raises(utils.Error, match=match):
        start(stopped, "--resume")
    assert len(steps) == 15  # at the end of the epoch
    assert files(stopped) == before
    monkeypatch.undo()
    with pytest.raises(utils.Error, match="in epoch 1: start anew with a smaller rate"):
        start(stopped / "absurd", *SMALL, "--lr=1e18")
    assert not list((stopped / "absurd").rglob("*.pt"))


@pytest.mark.parametrize("epochs", [1, 2])
def test_accuracy_at_chance_is_warned_of_while_epochs_are_left(tmp_path, start, capsys, epochs):
    line = [*SMALL, "--lr=1e-9", f"--epochs={epochs}"]
    assert start(tmp_path, *line, "--limit=1000", "--batch-size=5") == 0
    warning = "Warning: after 1 epochs the accuracy is still at chance"
    assert (warning in capsys.readouterr().err) == (epochs == 2)
    assert start(tmp_path, *line) == 0
    assert "still at chance" not in capsys.readouterr().err  # 15 steps an epoch say nothing


def test_warning_comes_once_when_the_rate_has_passed_its_peak(tmp_path, start, capsys):
    """In the fourth of 12 epochs of 60 steps: the steps of all four count."""
    line = [*TINY, "--lr=1e-9", "--epochs=12", "--batch-size=5"]
    assert start(tmp_path, *line, stop_at=5 * 60 + 1) == 130
    assert re.findall(r"Warning: after (\d+) epochs", capsys.readouterr().err) == ["4"]


@pytest.mark.parametrize("name", ["metrics.png", "metrics.csv"])
def test_picture_that_cannot_be_written_does_not_stop_the_run(start, tmp_path, capsys, name):
    mine = picture_dir(tmp_path) / name / "mine"
    mine.mkdir(parents=True)
    assert start(tmp_path, *TINY) == 0
    assert re.search(f"Warning: cannot write .*{name}: ", capsys.readouterr().err)
    assert load(tmp_path, "last.pt")["epoch"] == 3
    assert mine.exists()
    assert not list(tmp_path.rglob("*.tmp"))


def test_gpu_without_kernels_is_refused(monkeypatch):
    def ones(size, device):
        if device == "cuda":
            raise RuntimeError("no kernel image is available\nfor this GPU")
        return torch.zeros(size, device=device)

    monkeypatch.setattr(torch, "ones", ones)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("auto", "cuda"):
        message = r"cuda does not work \(no kernel image is available\): use --device cpu"
        with pytest.raises(utils.Error, match=message):
            utils.choose_device(name)
    assert utils.choose_device("cpu") == torch.device("cpu")


def test_benchmark_trains_with_the_own_loop(tmp_path):
    images = torch.randint(256, (300, 28, 28), dtype=torch.uint8)
    epoch = own_loop(images, torch.arange(300) % 10, tmp_path)
    epoch()
    epoch()  # each time from the start
    run = utils.load(tmp_path / "checkpoints" / "benchmark" / "last.pt")
    assert run["epoch"] == len(run["history"]) == 1
