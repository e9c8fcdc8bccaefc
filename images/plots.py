"""Training curves, grids of images and confusion matrices."""

import contextlib
import io
import math
import os

# Notebooks set MPLBACKEND. If matplotlib does not know that backend, importing it fails: therefore,
# other files of the gallery do not import matplotlib, but use `plots.Figure`.
backend = os.environ.pop("MPLBACKEND", None)

import matplotlib
import matplotlib.style
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, PercentFormatter

import utils

if backend:
    os.environ["MPLBACKEND"] = backend
    with contextlib.suppress(ValueError):
        matplotlib.rcParams["backend"] = backend

GREEN, RED, GRAY, BLUE = "#1a7f37", "#cf222e", "#57606a", "#0969da"

default_style = matplotlib.style.context("default")  # a decorator: ignore the user's matplotlibrc


def save_figure(figure, path, dpi=100):
    """Write a matplotlib figure as a PNG file. Raise an `Error` if it cannot be written."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    utils.write_file(path, buffer.getbuffer())


@default_style
def plot_metrics(history, dataset, path):
    """Plot loss and accuracy over the epochs. `history` is a list of rows, see utils.METRICS."""
    best = utils.best_row(history)
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    for ax, metric in zip(figure.subplots(1, 2), ("loss", "accuracy")):
        curves = {"train": [row[f"train_{metric}"] for row in history]}
        if "val_loss" in best:
            curves["validation"] = [row[f"val_{metric}"] for row in history]
        plot_curves(ax, curves, metric)
        if "val_loss" in best:
            value = best[f"val_{metric}"]
            text = f"{value:.2%}" if metric == "accuracy" else f"{value:.4f}"
            label = f"best epoch: {best['epoch']}, {text}"
            ax.plot(best["epoch"], value, "*", color=GREEN, markersize=15, label=label)
            ax.axvline(best["epoch"], color=GRAY, linestyle=":", linewidth=1)
            ax.legend()
    splits = "training and validation" if "val_loss" in best else "training on all images"
    figure.suptitle(f"LeNet-5 on {dataset}: {splits}")
    save_figure(figure, path)


def plot_curves(ax, curves, metric):
    """Plot values by epoch. The y-limits ignore the first fifth, which is often far off.

    Args:
        curves: dict from labels to lists of values; metric: "loss" or "accuracy".
    """
    late_values = []
    for label, values in curves.items():
        ax.plot(range(1, len(values) + 1), values, ".-", label=label)
        late_values += values[len(values) // 5 :]
    low, high = min(late_values), max(late_values)
    margin = 0.06 * (high - low) or 0.01
    ax.set(ylim=(low - margin, high + margin), xlabel="Epoch")
    ax.set_ylabel("Accuracy" if metric == "accuracy" else "Loss (cross-entropy)")
    if metric == "accuracy":
        ax.yaxis.set_major_formatter(PercentFormatter(1))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    ax.grid(alpha=0.3)
    ax.legend()


@default_style
def draw_grid(images, captions, title, path, correct=None):
    """Draw up to eight images per row, each above its caption.

    Args:
        images: uint8, N x 28 x 28, N > 0; captions: N strings of one or two lines.
        correct: N bools: captions and frames are green where True, red where False.
    """
    columns = min(8, len(images))
    rows = math.ceil(len(images) / columns)
    height = 2 * rows + 0.7
    figure = Figure(figsize=(max(1.6 * columns, 4.8), height))
    ax = figure.add_axes((0, 0, 1, 1 - 0.7 / height))
    canvas = np.full((40 * rows, 32 * columns), 255, dtype=np.uint8)  # one imshow is faster than 64
    for i, (image, caption) in enumerate(zip(images.numpy(), captions)):
        row, column = divmod(i, columns)
        x, y = 32 * column + 2, 40 * row + 1
        canvas[y : y + 28, x : x + 28] = image
        color = GRAY
        if correct is not None:
            color = GREEN if correct[i] else RED
        frame = Rectangle((x - 0.75, y - 0.75), 28.5, 28.5, fill=False, color=color, linewidth=2.5)
        ax.add_patch(frame)
        style = {"color": color, "fontsize": 9.5, "ha": "center", "va": "top"}
        ax.text(x + 13.5, y + 29, caption, parse_math=False, **style)
    ax.imshow(canvas, cmap="gray", vmin=0, vmax=255)
    ax.axis("off")
    figure.suptitle(title, fontsize=16 if columns == 8 else 11, y=1 - 0.2 / height)
    save_figure(figure, path)


def draw_predictions(run, images, labels, logits, sample, directory):
    """Draw predict.png (the images in `sample`) and mistakes.png (the most confident errors).

    Args:
        images: uint8, N x 28 x 28; labels: int64, N; logits: float, N x classes; sample: indices.
    """
    classes = utils.DATASETS[run["dataset"]].classes
    confidence, predicted = utils.probabilities(logits).max(dim=1)
    correct = predicted == labels
    captions = []
    for guess, p, label in zip(predicted.tolist(), confidence.tolist(), labels.tolist()):
        truth = "" if guess == label else f"\ntrue: {classes[label]}"
        captions.append(f"{'✗' if truth else '✓'} {classes[guess]} ({p:.1%}){truth}")
    errors = (~correct).nonzero().squeeze(1)
    worst = errors[confidence[errors].argsort(descending=True)][:64]
    for name, indices, title in (
        ("predict", sample, f"{len(sample)} random test images, {correct[sample].sum()} correct"),
        ("mistakes", worst, f"{len(worst)} of {len(errors)} errors, the most confident first"),
    ):
        if len(indices):
            texts = [captions[i] for i in indices]
            title = f"LeNet-5 on {run['dataset']}: {title}"
            draw_grid(images[indices], texts, title, directory / f"{name}.png", correct[indices])


@default_style
def draw_confusion(run, confusion, path):
    """Draw a confusion matrix (int64, true x predicted). Color shows the fraction of each row."""
    classes = utils.DATASETS[run["dataset"]].classes
    num_correct, count = confusion.diagonal().sum().item(), confusion.sum().item()
    fractions = confusion / confusion.sum(dim=1, keepdim=True).clamp(min=1)
    figure = Figure(figsize=(8.5, 7.6), layout="constrained")
    ax = figure.add_subplot()
    picture = ax.imshow(fractions.numpy(), cmap="Blues", vmin=0, vmax=1)
    for i, row in enumerate(confusion.tolist()):
        for j, number in enumerate(row):
            color = "white" if fractions[i, j] > 0.5 else "black"
            ax.text(j, i, number, ha="center", va="center", color=color, fontsize=10)
    ticks = range(len(classes))
    ax.set_xticks(ticks, classes, rotation=40 if max(map(len, classes)) > 2 else 0)
    ax.set_yticks(ticks, classes)
    ax.set(xlabel="Predicted class", ylabel="True class")
    figure.colorbar(picture, label="Fraction of the true class", shrink=0.85)
    accuracy = f"{num_correct / count:.2%} of {count:,} test images correct"
    ax.set_title(f"LeNet-5 on {run['dataset']}: {accuracy}")
    save_figure(figure, path)
