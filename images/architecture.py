"""Draw architecture.png, beside this file, from the layers of the network itself.

python images/architecture.py
"""

import re
import sys
from pathlib import Path

from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import utils  # noqa: E402
from model import LeNet, layer_table  # noqa: E402

COLOURS = {"Input": "white", "Conv2d": "#cfe3f7", "AvgPool2d": "#fde3c8", "Linear": "#d5efd9"}
ACTIONS = {"Conv2d": "convolution", "AvgPool2d": "average pooling", "Linear": "full\nconnection"}
PIXEL, BAR, GAP = 0.1, 0.28, 1.0  # sizes of a pixel, of the bar of units, and between layers


def draw(rows, path):
    """Draw the layers as stacks of planes, in the manner of figure 2 of LeCun et al. (1998).

    Args:
        rows: what `model.layer_table` returns.
    """
    figure = Figure(figsize=(13.4, 4.1), layout="constrained")
    ax = figure.add_subplot(aspect="equal", ylim=(-3.6, 3.1))
    ax.axis("off")

    def shape(xs, ys, colour="none", zorder=3):
        ax.fill(xs, ys, facecolor=colour, edgecolor="black", linewidth=0.8, zorder=zorder)

    def square(x, y, size, *how):
        shape([x, x + size, x + size, x], [y, y, y + size, y + size], *how)

    def line(*points):
        ax.plot(*zip(*points), color="black", linewidth=0.7, zorder=4)

    layers = [("INPUT", "Input", rows[0]["input"])]
    layers += [(row["layer"].upper(), row["type"], row["output"]) for row in rows]
    left, placed = 0, []
    for name, kind, sizes in layers:
        count, side = [*map(int, sizes.split("x")), 1][:2]
        if side > 1:  # feature maps: a stack of planes, the last one in front
            size, step = side * PIXEL, min(0.2, 1.6 / count)
            spread = (count - 1) * step
            for i in range(count):
                x, y = left + i * step, spread / 2 - i * step - size / 2
                square(x, y, size, COLOURS[kind], 2)
            width, top, label = size + spread, (size + spread) / 2, f"@{side}x{side}"
        else:  # units: a bar, leaning as the stacks do
            top, size = 0.015 * count + 0.15, None
            right = left + 0.7 * top
            shape([left, left + BAR, right + BAR, right], [top, top, -top, -top], COLOURS[kind], 2)
            width, label = right + BAR - left, ""
        ax.text(left, top + 0.12, f"{name}\n{count}{label}", va="bottom", fontsize=13)
        placed.append((left, width, top, x, y, size))
        left += width + GAP

    for row, source, target in zip(rows, placed, placed[1:]):
        left, width, top, x, y, size = source
        to_left, to_width, to_top, to_x, to_y, to_size = target
        action = ACTIONS[row["type"]]
        if size is None:
            line((left + BAR, top), (to_left, to_top))
            line((left + width, -top), (to_left + to_width - BAR, -to_top))
        else:  # one window and the pixel or the unit that sees it
            kernel = int(re.search(r"(\d+)x", row["configuration"])[1])
            action = f"{kernel}x{kernel}\n{action}"
            window = kernel * PIXEL
            x, y = x + 0.75 * (size - window), y + 0.2 * (size - window)
            square(x, y, window)
            end_x, end_y, end = to_left + 0.35 * to_top, 0, 0
            if to_size:
                end_x, end_y, end = to_x + 0.25 * to_size, to_y + 0.6 * to_size, PIXEL
                square(end_x, end_y, end)
            line((x + window, y), (end_x, end_y))
            line((x + window, y + window), (end_x, end_y + end))
        if row["activation"] == "sigmoid":
            action += "\n+ sigmoid"
        middle = (left + width / 2 + to_left + to_width / 2) / 2
        ax.text(middle, -2.6, action, ha="center", va="top", fontsize=12, color=utils.GREY)
    ax.text(1.6, 0, "5", ha="center", va="center", fontsize=80, family="DejaVu Serif", zorder=2.5)
    ax.autoscale_view(scaley=False)
    utils.save_figure(figure, path, dpi=110)


if __name__ == "__main__":
    draw(layer_table(LeNet()), HERE / "architecture.png")
