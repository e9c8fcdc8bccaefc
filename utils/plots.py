"""The pictures in images/: each plot_ function draws one and writes it as a PNG file."""

import csv
import io
import re
import sys

from utils.checkpoint import HISTORY, best_epoch, write_file
from utils.cli import Error

GREEN, RED, GREY, BLUE, ORANGE = "#1a7f37", "#cf222e", "#57606a", "#0969da", "#bc4c00"
LAYER_COLOURS = {"Input": "white", "Conv2d": "#cfe3f7", "AvgPool2d": "#fde3c8", "Linear": "#d5efd9"}
RECIPE_LABELS = {
    "sgd": "sgd: SGD, constant rate",
    "adamw": "adamw: AdamW, one-cycle rate",
    "xavier": "xavier: + initialisation",
    "muon": "muon: + Muon",
    "default": "default: + mirror images",
    "long": "long: + shifts, smooth labels, 150 epochs",
}
LAYER_ACTIONS = {
    "Conv2d": "convolution",
    "AvgPool2d": "average pooling",
    "Linear": "full\nconnection",
}


def _figure(width, height, rows=1, columns=1, **options):
    """Return a figure (inches) and its axes; pyplot is for windows on a screen."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, **options)


def _write(figure, path, dpi=100):
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    write_file(path, buffer.getvalue())


def plot_metrics(history, dataset, path):
    """Draw loss and accuracy over the epochs.

    Args:
        history: list of dicts with epoch, train_loss, train_accuracy, val_loss and val_accuracy
            (accuracies from 0 to 1).
        dataset: name for the title.
    """
    from matplotlib.ticker import MaxNLocator

    best = best_epoch(history)
    figure, axes = _figure(11, 4.4, 1, 2)
    epochs = [row["epoch"] for row in history]
    start = len(history) // 20  # the first epochs are far from the rest, which one wants to see
    size = 4 if len(history) <= 40 else 0
    for ax, key, scale, unit in (
        (axes[0], "loss", 1, "Loss (cross-entropy)"),
        (axes[1], "accuracy", 100, "Accuracy (%)"),
    ):
        shown = []
        for split, colour, marker in (("train", ORANGE, "s"), ("val", BLUE, "o")):
            values = [scale * row[f"{split}_{key}"] for row in history]
            name = "validation" if split == "val" else split
            ax.plot(epochs, values, color=colour, marker=marker, markersize=size, label=name)
            shown += values[start:]
        margin = 0.06 * (max(shown) - min(shown)) or 0.01
        ax.set_ylim(min(shown) - margin, max(shown) + margin)
        ax.axvline(best["epoch"], color=GREY, linestyle=":", linewidth=1)
        ax.plot(
            best["epoch"],
            scale * best[f"val_{key}"],
            color=GREEN,
            marker="*",
            markersize=15,
            linestyle="none",
            label=f"best: epoch {best['epoch']}, "
            + (
                f"{100 * best['val_accuracy']:.2f} %" if scale == 100 else f"{best['val_loss']:.4f}"
            ),
        )
        ax.set(xlabel="Epoch", ylabel=unit)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        ax.grid(alpha=0.3)
        ax.legend()
    figure.suptitle(f"LeNet-5 on {dataset}: training and validation")
    _write(figure, path)


def write_metrics(history, dataset, image_dir, draw):
    """Write metrics.csv, one line per epoch, and, with `draw`, metrics.png; or warn and go on."""
    text = io.StringIO()
    table = csv.DictWriter(text, HISTORY, lineterminator="\n")
    table.writeheader()
    table.writerows(history)
    try:
        write_file(image_dir / "metrics.csv", text.getvalue().encode())
        if draw:
            plot_metrics(history, dataset, image_dir / "metrics.png")
    except Error as error:
        print(f"Warning: {error}", file=sys.stderr)


def plot_grid(images, captions, title, path, right=None):
    """Draw images in rows of eight, each with its caption.

    Args:
        images: tensor, N x H x W, any dtype, N > 0.
        captions: N strings of one or two lines.
        right: N bools; captions are green where True, red with a red frame where False.
    """
    columns = min(8, len(images))
    rows = -(-len(images) // columns)
    figure, axes = _figure(max(1.6 * columns, 4.8), 1.9 * rows + 0.5, rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.axis("off")
    for i, (ax, image, caption) in enumerate(zip(axes.flat, images, captions)):
        ax.axis("on")
        ax.set(xticks=[], yticks=[])
        ax.imshow(image.numpy(), cmap="gray")
        colour = "black" if right is None else GREEN if right[i] else RED
        ax.set_xlabel(caption, color=colour, fontsize=9.5, labelpad=3, parse_math=False)
        ax.spines[:].set(color=colour, linewidth=3 if colour == RED else 1)
    figure.suptitle(title, fontsize=16 if columns == 8 else 12)
    _write(figure, path)


def plot_confusion(confusion, classes, title, path):
    """Draw a confusion matrix: counts, each row coloured by its share of the true class.

    Args:
        confusion: int64, classes x classes; rows are true, columns predicted.
    """
    share = confusion / confusion.sum(dim=1, keepdim=True).clamp(min=1)
    figure, ax = _figure(8.5, 7.6)
    picture = ax.imshow(share.numpy(), cmap="Blues", vmin=0, vmax=1)
    for i, row in enumerate(confusion.tolist()):
        for j, count in enumerate(row):
            colour = "white" if share[i, j] > 0.5 else "black" if count else "#b0b0b0"
            ax.text(j, i, count, ha="center", va="center", color=colour, fontsize=10)
    ticks = range(len(classes))
    ax.set_xticks(ticks, classes, rotation=40 if max(map(len, classes)) > 2 else 0)
    ax.set_yticks(ticks, classes)
    ax.set(xlabel="Predicted class", ylabel="True class")
    figure.colorbar(picture, label="Share of the true class", shrink=0.85)
    ax.set_title(title)
    _write(figure, path)


def plot_ablation(results, path):
    """Draw the test accuracy of each recipe: every run a dot, their mean a line.

    Args:
        results: list of dicts with recipe, epochs and test_accuracy (0 to 1) of one run each.
    """
    recipes = [name for name in RECIPE_LABELS if any(row["recipe"] == name for row in results)]
    figure, ax = _figure(8.5, 0.6 * len(recipes) + 1.3)
    for y, name in enumerate(recipes):
        accuracies = [100 * row["test_accuracy"] for row in results if row["recipe"] == name]
        mean = sum(accuracies) / len(accuracies)
        ax.plot(accuracies, [y] * len(accuracies), "o", color=BLUE, alpha=0.5, markersize=6)
        ax.plot([mean, mean], [y - 0.3, y + 0.3], color=ORANGE, linewidth=2.5)
        ax.text(mean, y - 0.36, f"{mean:.2f} %", ha="center", fontsize=9, color=ORANGE)
    ax.set_yticks(range(len(recipes)), [RECIPE_LABELS[name] for name in recipes])
    ax.set(ylim=(len(recipes) - 0.5, -0.75), xlabel="Test accuracy (%)")
    ax.grid(axis="x", alpha=0.3)
    ax.set_title("LeNet-5 on FashionMNIST: what each ingredient is worth")
    _write(figure, path)


def plot_architecture(rows, path):
    """Draw the layers as stacks of planes, in the manner of figure 2 of LeCun et al. (1998).

    Args:
        rows: what `model.layer_table` returns.
    """
    from matplotlib.patches import Polygon

    pixel, bar_width, gap = 0.1, 0.28, 1.0
    figure, ax = _figure(13.4, 4.1)
    ax.set(aspect="equal", ylim=(-3.6, 3.1))
    ax.axis("off")

    def outline(corners, colour, zorder=2):
        ax.add_patch(Polygon(corners, facecolor=colour, edgecolor="black", lw=0.8, zorder=zorder))

    def rectangle(x, y, size, colour="none", zorder=3):
        outline([(x, y), (x + size, y), (x + size, y + size), (x, y + size)], colour, zorder)

    layers = [("INPUT", "Input", rows[0]["input"])]
    layers += [(row["layer"].upper(), row["type"], row["output"]) for row in rows]
    left, placed = 0, []
    for name, kind, shape in layers:
        count, side = [*map(int, shape.split("x")), 1][:2]
        if side > 1:  # feature maps: a stack of planes, the last one in front
            size, step = side * pixel, min(0.2, 1.6 / count)
            spread = (count - 1) * step
            for i in range(count):
                x, y = left + i * step, spread / 2 - i * step - size / 2
                rectangle(x, y, size, LAYER_COLOURS[kind], zorder=2)
            width, top, label, label_x = size + spread, (size + spread) / 2, f"@{side}x{side}", left
        else:  # units: a bar
            x = y = size = None
            top = 0.015 * count + 0.15
            lean = 0.7 * top
            width, label, label_x = bar_width + lean, "", left - 0.1
            corners = [(left, top), (left + bar_width, top)]
            corners += [(left + width, -top), (left + lean, -top)]
            outline(corners, LAYER_COLOURS[kind])
        ax.text(label_x, top + 0.12, f"{name}\n{count}{label}", va="bottom", fontsize=13)
        placed.append((left, width, top, x, y, size))
        left += width + gap

    lines = {"color": "black", "lw": 0.7, "zorder": 4}
    for row, source, target in zip(rows, placed, placed[1:]):
        (left, width, top, x, y, size), (to_left, to_width, to_top, to_x, to_y, to_size) = (
            source,
            target,
        )
        action = LAYER_ACTIONS[row["type"]]
        if size is None:
            ax.plot([left + bar_width, to_left], [top, to_top], **lines)
            ax.plot([left + width, to_left + to_width - bar_width], [-top, -to_top], **lines)
        else:  # one window and the pixel or the unit that sees it
            kernel = int(re.search(r"(\d+)x", row["configuration"])[1])
            action = f"{kernel}x{kernel}\n{action}"
            window = kernel * pixel
            x, y = x + 0.75 * (size - window), y + 0.2 * (size - window)
            rectangle(x, y, window)
            if to_size is None:
                ends = [(to_left + 0.35 * to_top, 0)] * 2
            else:
                ends = [(to_x + 0.25 * to_size, to_y + 0.6 * to_size + dy) for dy in (0, pixel)]
                rectangle(*ends[0], pixel)
            for (end_x, end_y), start_y in zip(ends, (y, y + window)):
                ax.plot([x + window, end_x], [start_y, end_y], **lines)
        if row["activation"] == "sigmoid":
            action += "\n+ sigmoid"
        middle = (left + width / 2 + to_left + to_width / 2) / 2
        ax.text(middle, -2.6, action, ha="center", va="top", fontsize=12, color=GREY)
    ax.text(1.6, 0, "5", ha="center", va="center", fontsize=80, family="DejaVu Serif", zorder=2.5)
    ax.autoscale_view(scaley=False)
    _write(figure, path, dpi=110)
