"""Draw architecture.png, beside this file, from the layers of the network itself.

python images/architecture.py
"""

import re
import sys
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import Polygon

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import utils  # noqa: E402
from model import LeNet, layer_table  # noqa: E402

COLOURS = {"Input": "white", "Conv2d": "#cfe3f7", "AvgPool2d": "#fde3c8", "Linear": "#d5efd9"}
ACTIONS = {"Conv2d": "convolution", "AvgPool2d": "average pooling", "Linear": "full\nconnection"}


def draw(rows, path):
    """Draw the layers as stacks of planes, in the manner of figure 2 of LeCun et al. (1998).

    Args:
        rows: what `model.layer_table` returns.
    """
    pixel, bar_width, gap = 0.1, 0.28, 1.0
    figure = Figure(figsize=(13.4, 4.1), layout="constrained")
    ax = figure.add_subplot()
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
                rectangle(x, y, size, COLOURS[kind], zorder=2)
            width, top, label, label_x = size + spread, (size + spread) / 2, f"@{side}x{side}", left
        else:  # units: a bar
            x = y = size = None
            top = 0.015 * count + 0.15
            lean = 0.7 * top
            width, label, label_x = bar_width + lean, "", left - 0.1
            corners = [(left, top), (left + bar_width, top)]
            corners += [(left + width, -top), (left + lean, -top)]
            outline(corners, COLOURS[kind])
        ax.text(label_x, top + 0.12, f"{name}\n{count}{label}", va="bottom", fontsize=13)
        placed.append((left, width, top, x, y, size))
        left += width + gap

    lines = {"color": "black", "lw": 0.7, "zorder": 4}
    for row, source, target in zip(rows, placed, placed[1:]):
        (left, width, top, x, y, size), (to_left, to_width, to_top, to_x, to_y, to_size) = (
            source,
            target,
        )
        action = ACTIONS[row["type"]]
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
        ax.text(middle, -2.6, action, ha="center", va="top", fontsize=12, color=utils.GREY)
    ax.text(1.6, 0, "5", ha="center", va="center", fontsize=80, family="DejaVu Serif", zorder=2.5)
    ax.autoscale_view(scaley=False)
    utils.save_figure(figure, path, dpi=110)


if __name__ == "__main__":
    draw(layer_table(LeNet()), HERE / "architecture.png")
