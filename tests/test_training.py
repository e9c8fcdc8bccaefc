"""Training: what it computes, saves, prints and draws, and which networks it rejects."""

import contextlib
import csv
import inspect
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL_RUN, checkpoint, comparable, epoch_rows, files
from torch import nn

import train
import utils
from images import plots
from model import LeNet

SHORT_RUN = ["--dataset=Glyphs", "--limit=250", "--epochs=3"]  # one step per epoch


@pytest.fixture
def start(options):
    return lambda directory, *argv: train.main([*options(directory), *argv])


def plain_split(images, labels):
    """Split classes of less than 1,000 images: every second image is for validation."""
    members = [(labels == label).nonzero()[:, 0].tolist() for label in range(10)]
    val = sorted(i for indices in members for i in indices[::2][: len(indices) // 2])
    rest = [i for i in range(len(labels)) if i not in val]
    return (images[rest], labels[rest]), (images[val], labels[val])


def plain_inputs(images, mean, std, flip, shift):
    """Shuffle and augment all images. Only the random numbers are drawn as in `utils.batches`."""
    count = len(images)
    order = torch.randperm(count)
    flipped = torch.rand(count) < 0.5
    corners = torch.randint(2 * shift + 1, (2, count)).T
    # A third of the digits becomes thicker, and a third thinner.
    widths = [0] * count if flip else torch.randint(-1, 2, (count,)) * torch.rand(count)
    inputs = []
    for i, is_flipped, (top, left), width in zip(order, flipped, corners, widths):
        image = images[i].flip(1) if flip and is_flipped else images[i]
        x = F.pad(image, [2 + shift] * 4)[None, top : top + 32, left : left + 32]
        x = (x / 255 - mean) / std
        sign = 1 if width > 0 else -1
        extreme = sign * F.max_pool2d(sign * x, 3, stride=1, padding=1)
        inputs.append(x + abs(width) * (extreme - x))
    return torch.stack(inputs), order


def plain_metrics(split, logits, labels):
    accuracy = (logits.argmax(dim=1) == labels).double().mean().item()
    return {f"{split}_loss": F.cross_entropy(logits, labels).item(), f"{split}_accuracy": accuracy}


def plain_training(data, flip, options):
    """Train in plain PyTorch. After each epoch, yield its row of the history and the weights."""
    (images, labels), val_set = (data, None) if options["full"] else plain_split(*data)
    std, mean = torch.std_mean(images.double() / 255, correction=0)
    images, labels = images[: options["limit"]], labels[: options["limit"]]
    batch_size, decay = options["batch_size"], options["weight_decay"]
    steps = options["epochs"] * math.ceil(len(labels) / batch_size)
    torch.manual_seed(options["seed"])
    model = LeNet()
    averages = {getattr(model, layer).weight: 0 for layer in ("c1", "c3", "c5", "f6")}
    biases = [p for p in model.parameters() if p.ndim == 1]
    adamw = torch.optim.AdamW([*biases, model.f7.weight], weight_decay=2 * decay)
    step = itertools.count()
    for epoch in itertools.count(1):
        inputs, order = plain_inputs(images, mean, std, flip, options["shift"])
        outputs = []
        for x, y in zip(inputs.split(batch_size), labels[order].split(batch_size)):
            lr = options["lr"] * train.one_cycle(next(step) / steps)
            outputs.append(model(x))
            model.zero_grad()
            F.cross_entropy(outputs[-1], y, label_smoothing=options["label_smoothing"]).backward()
            adamw.param_groups[0]["lr"] = lr / 2
            adamw.step()
            for weight in averages:
                averages[weight] = average = 0.95 * averages[weight] + 0.05 * weight.grad
                update = train.newton_schulz((0.95 * average + 0.05 * weight.grad).flatten(1))
                update *= math.sqrt(max(1, len(update) / update.shape[1]))
                weight.data = (1 - lr * decay) * weight - lr * update.view_as(weight)
        row = {"epoch": epoch, "lr": lr} | plain_metrics("train", torch.cat(outputs), labels[order])
        if val_set:
            val_images, val_labels = [tensor[: options["limit"]] for tensor in val_set]
            x = (F.pad(val_images, [2] * 4)[:, None] / 255 - mean) / std
            row |= plain_metrics("val", model(x), val_labels)
        yield row, {name: w.clone() for name, w in model.state_dict().items()}


DEFAULTS = dict(epochs=20, batch_size=256, lr=0.05, weight_decay=0.015, shift=0)
DEFAULTS |= dict(label_smoothing=0.0, seed=0, full=False, limit=None)
LONG = dict(epochs=150, weight_decay=0.01, shift=1, label_smoothing=0.05, full=True)
OWN = dict(epochs=3, batch_size=200, weight_decay=0.2, label_smoothing=0.4, shift=1)
OWN |= dict(seed=7, limit=250)
RUNS = {
    "FashionMNIST": {},
    "FashionMNIST --recipe=long --full": LONG,
    "MNIST --epochs=3 --batch-size=200 --weight-decay=0.2 --label-smoothing=0.4 --limit=250 "
    "--seed=7": OWN,
}


@pytest.mark.parametrize("argv", RUNS)
def test_training_matches_plain_pytorch(tmp_path, start, stop_at, data_dir, monkeypatch, argv):
    """On 600 digits in place of each dataset: 6 steps, which are 2 or 3 epochs."""
    data = [tensor[:600] for tensor in utils.load_images("Glyphs", data_dir, "train")]
    monkeypatch.setattr(utils, "load_images", lambda _, __, split: {"train": data}[split])
    stop_at(7)
    with contextlib.suppress(KeyboardInterrupt):
        start(tmp_path, *f"--dataset={argv}".split())
    plain = plain_training(data, "Fashion" in argv, DEFAULTS | RUNS[argv])
    epochs = list(itertools.islice(plain, 2 if "--full" in argv else 3))
    for file in ("best.pt", "last.pt"):
        run = checkpoint(tmp_path, file, name=argv.split()[0])
        for row, (expected, _) in zip(run["history"], epochs):
            assert row == pytest.approx(expected, rel=2e-3, abs=4e-3)  # an image may differ
            assert row["lr"] == pytest.approx(expected["lr"])
        for name, weight in epochs[run["epoch"] - 1][1].items():
            torch.testing.assert_close(run["model"][name], weight, rtol=0, atol=1e-4)
    assert run["epoch"] == len(run["history"]) == len(epochs)


def test_reported_loss_is_exact():
    logits, labels = torch.randn(500, 10), torch.randint(10, (500,))
    losses = -logits.double().log_softmax(dim=1)[range(500), labels]
    expected = [losses.sum().item(), (logits.argmax(dim=1) == labels).sum().item()]
    assert train.loss_and_correct(logits, labels).tolist() == pytest.approx(expected)


def test_two_epochs_on_10_000_real_images_learn(tmp_path, real_data, start, capsys, no_plots):
    argv = ["--dataset=FashionMNIST", f"--data-dir={real_data}", "--limit=10000", "--epochs=2"]
    start(tmp_path, *argv)
    assert "10,000 images to train on, 5,000 for validation" in capsys.readouterr().out
    assert checkpoint(tmp_path, name="FashionMNIST")["history"][-1]["val_accuracy"] > 0.66


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_trains_like_the_cpu(tmp_path, start, finished_run, no_plots):
    start(tmp_path, *SMALL_RUN, "--device=cuda")
    for row, expected in zip(checkpoint(tmp_path)["history"], checkpoint(finished_run)["history"]):
        assert row == pytest.approx(expected, abs=2e-2)


def test_checkpoint_and_metrics_have_the_documented_contents(finished_run):
    run = checkpoint(finished_run)
    keys = "version name dataset options counts mean std history epoch model logits code snapshots"
    assert sorted(run) == sorted([*keys.split(), "optimizers", "rng_state"])
    assert run["options"] == train.parse_args(SMALL_RUN)[1]
    assert (run["epoch"], run["code"]) == (4, inspect.getsource(LeNet))
    assert all(weight.is_contiguous() for weight in run["model"].values())
    assert [snapshot["epoch"] for snapshot in run["snapshots"]] == [0, 1, 2, 4]
    torch.manual_seed(0)
    for i, weights in ((0, LeNet().state_dict()), (-1, run["model"])):
        half = {name: weight.half() for name, weight in weights.items()}
        assert comparable(run["snapshots"][i]["weights"]) == comparable(half)
    rows = csv.DictReader((finished_run / "images/Glyphs/metrics.csv").read_text().splitlines())
    assert [{name: float(row[name]) for name in row} for row in rows] == run["history"]


class Unusual(LeNet):  # a frozen layer, batch norm, and a buffer that exceeds float16
    def __init__(self, num_classes=10):
        super().__init__(num_classes)
        self.c1.requires_grad_(False)
        self.f6 = nn.Sequential(self.f6, nn.BatchNorm1d(84))
        self.register_buffer("large", torch.tensor([1e6]))


@pytest.mark.parametrize(("network", "limit"), [(LeNet, 1), (Unusual, 257)])
def test_last_batch_may_have_one_image(tmp_path, start, monkeypatch, no_plots, network, limit):
    monkeypatch.setattr(train, "LeNet", network)
    start(tmp_path, *SHORT_RUN, f"--limit={limit}", f"--batch-size={max(1, limit - 1)}")
    run = checkpoint(tmp_path)
    assert run["counts"] == [limit, limit]
    first, last = run["snapshots"][0]["weights"], run["snapshots"][-1]["weights"]
    for name, weight in last.items():
        assert weight.isfinite().all() and "num_batches" not in name  # an integer
        frozen = network is Unusual and name in ("c1.weight", "c1.bias", "large")
        assert torch.equal(weight, first[name]) == frozen, name


def test_equal_epochs_keep_the_first_and_warn(tmp_path, start, monkeypatch, capsys, no_plots):
    monkeypatch.setattr(train, "LeNet", lambda n: nn.Sequential(nn.Flatten(), nn.Linear(1024, n)))
    start(tmp_path, *"--dataset=Glyphs --epochs=4 --recipe=long --batch-size=10 --lr=1e-12".split())
    out, err = capsys.readouterr()
    assert [row[-1] == "far" for row in epoch_rows(out)] == [True, False, False, False]
    assert "Best epoch: 1 of 4, validation accuracy on Glyphs" in out
    assert [checkpoint(tmp_path, file)["epoch"] for file in ("best.pt", "last.pt")] == [1, 4]
    assert err == "Warning: accuracy is still at chance level with --lr 1e-12; try another value\n"


@pytest.mark.parametrize("full", [False, True], ids=["with validation", "full"])
def test_output_and_plot_show_the_history(tmp_path, start, capsys, monkeypatch, finished_run, full):
    figures = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: figures.append(figure))
    start(tmp_path, *SHORT_RUN, *["--full"] * full)
    out, err = capsys.readouterr()
    assert err == "" and not {"\r", "\x1b"} & set(out)
    run = checkpoint(tmp_path)
    assert full or run["mean"] == checkpoint(finished_run)["mean"]  # --limit does not change it
    history = run["history"]
    best = history[-1] if full else max(history, key=lambda row: row["val_accuracy"])
    assert checkpoint(tmp_path, "best.pt")["history"][-1] == best
    row_text = "{epoch}/3 {lr:.2e} {train_loss:.4f} {train_accuracy:.2%} "
    row_text += "- -" if full else "{val_loss:.4f} {val_accuracy:.2%}"
    for row, words in zip(history, epoch_rows(out), strict=True):
        assert words[:6] == row_text.format(**row).split()
    result = "Last epoch: 3, trained without validation"
    if not full:
        result = f"Best epoch: {best['epoch']} of 3, validation accuracy on Glyphs "
        result += f"{best['val_accuracy']:.2%} ({250 * best['val_accuracy']:.0f}/250)"
    result += f"\nWeights:    {tmp_path}/checkpoints/Glyphs/best.pt"
    result += f"\nPlot:       {tmp_path}/images/Glyphs/metrics.png, values in metrics.csv\nNext:  "
    assert f"\n\n{result}" in out
    assert f"Glyphs: 250 images to train on, {0 if full else 250} for validation\n\n  " in out
    for ax, metric in zip(figures[0].axes, ("loss", "accuracy")):
        curves = {line.get_label(): [*line.get_ydata()] for line in ax.lines}
        assert curves.pop("train") == [row[f"train_{metric}"] for row in history]
        assert full or curves["validation"] == [row[f"val_{metric}"] for row in history]
        assert full or [best[f"val_{metric}"]] in curves.values()
        assert bool(curves) != full


NETWORKS = {  # a change of the logits, and the message about it
    "softmax": (lambda m, x: x.softmax(dim=1), "forward in model.py ends in a softmax"),
    "log_softmax": (lambda m, x: x.log_softmax(dim=1), "forward in model.py ends in a softmax"),
    "dropout": (lambda m, x: F.dropout(x), "different logits for equal weights"),
    "random": (lambda m, x: x + vars(m).setdefault("noise", torch.rand(10)), "different logits"),
    "NaN": (lambda m, x: x * math.nan, "forward returns NaN"),
    "two outputs": (lambda m, x: (x, x), "must return one tensor of logits, N x 10"),
    "NaN gradient": (lambda m, x: x + (x - x.detach()).abs().sqrt(), "such as --lr 0.0125"),
    "NaN validation": (lambda m, x: x if m.training or len(x) < 9 else x * math.nan, "--lr 0.0125"),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_unsuitable_networks_are_one_line(stopped_run, options, run_script, monkeypatch, name):
    change, message = NETWORKS[name]
    forward = LeNet.forward
    monkeypatch.setattr(LeNet, "forward", lambda model, x: change(model, forward(model, x)))
    before = files(stopped_run)
    status, out, err = run_script(train.main, *SHORT_RUN, *options(stopped_run))
    assert message in err and err.count("\n") == 1
    assert status == (0 if "softmax" in message else 2)
    assert out == "" or "Note: this replaces the run in" in out
    assert (files(stopped_run) == before) == (status == 2)


def test_metrics_that_cannot_be_written_are_a_warning(tmp_path, start, capsys):
    (tmp_path / "images" / "Glyphs" / "metrics.csv").mkdir(parents=True)
    start(tmp_path, *SHORT_RUN)
    out, err = capsys.readouterr()
    assert "Warning: cannot write" in err and "Best epoch: " in out and "Plot: " not in out
