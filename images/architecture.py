"""Draw architecture.png, beside this file, from the layers of the network itself.

python images/architecture.py
"""

import sys
from pathlib import Path

from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import utils  # noqa: E402 - the line above finds it
from model import RESHAPES, LeNet, trace  # noqa: E402

COLOURS = {"I": "white", "C": "#cfe3f7", "S": "#fde3c8", "F": "#d5efd9", "O": "#d5efd9"}
WORDS = {"conv2d": "convolution", "linear": "full\nconnection"}
WORDS |= {"avg_pool2d": "average pooling", "max_pool2d": "max-pooling"}
PIXEL, BAR, GAP = 0.1, 0.28, 1.0  # sizes of a pixel, of the bar of units, and between layers


def draw(layers, path):
    """Draw the layers as stacks of planes, in the manner of figure 2 of LeCun et al. (1998).

    Args:
        layers: those of `model.trace`; one without a stack of its own, such as dropout, is named
            in the text below.
    """
    stacks = [[layers[0]]]  # each is a layer that has a stack, and those without after it
    for layer in layers[1:]:
        if layer.kind in WORDS:
            stacks.append([layer])
        else:
            stacks[-1].append(layer)
    figure = Figure(figsize=(2.2 + 1.6 * len(stacks), 4.1), layout="constrained")
    ax = figure.add_subplot(aspect="equal", ylim=(-3.6, 3.1))
    ax.axis("off")

    def shape(xs, ys, colour="none", zorder=3):
        ax.fill(xs, ys, facecolor=colour, edgecolor="black", linewidth=0.8, zorder=zorder)

    def rectangle(x, y, width, height, *how):
        shape([x, x + width, x + width, x], [y, y, y + height, y + height], *how)

    def line(*points):
        ax.plot(*zip(*points), color="black", linewidth=0.7, zorder=4)

    left, placed = 0, []
    for first, *_ in stacks:
        colour = COLOURS[first.name[0]]
        count, height, across = (*first.output.shape, 1, 1)[:3]
        x = y = 0
        if height * across > 1:  # feature maps: a stack of planes, the last one in front
            step = min(0.2, 1.6 / count)
            spread = (count - 1) * step
            for i in range(count):
                x = left + i * step
                y = spread / 2 - i * step - height * PIXEL / 2
                rectangle(x, y, across * PIXEL, height * PIXEL, colour, 2)
            width, top = across * PIXEL + spread, (height * PIXEL + spread) / 2
            label = f"{count}@{height}x{across}"
        else:  # units: a bar, leaning as the stacks do
            top = 0.015 * min(count, 150) + 0.15
            right = left + 0.7 * top
            shape([left, left + BAR, right + BAR, right], [top, top, -top, -top], colour, 2)
            width, label = right + BAR - left, f"{count}"
        ax.text(left, top + 0.12, f"{first.name.upper()}\n{label}", va="bottom", fontsize=13)
        placed.append((left, width, top, x, y, across * PIXEL, height * PIXEL))
        left += width + GAP

    for (first, *others), source, target in zip(stacks[1:], placed, placed[1:]):
        left, width, top, x, y, across, height = source
        to_left, to_width, to_top, to_x, to_y, to_across, to_height = target
        text = WORDS[first.kind]
        if "kernel_size" in first.operations[0].numbers and height > PIXEL:
            # One window, and the pixel or the unit that sees it.
            rows, columns = first.operations[0].numbers["kernel_size"]
            text = f"{rows}x{columns}\n{text}"
            x += 0.75 * (across - columns * PIXEL)
            y += 0.2 * (height - rows * PIXEL)
            rectangle(x, y, columns * PIXEL, rows * PIXEL)
            end_x, end_y, end = to_left + 0.35 * to_top, 0, 0
            if to_height > PIXEL:
                end_x, end_y, end = to_x + 0.25 * to_across, to_y + 0.6 * to_height, PIXEL
                rectangle(end_x, end_y, PIXEL, PIXEL)
            line((x + columns * PIXEL, y), (end_x, end_y))
            line((x + columns * PIXEL, y + rows * PIXEL), (end_x, end_y + end))
        else:
            line((left + BAR, top), (to_left, to_top))
            line((left + width, -top), (to_left + to_width - BAR, -to_top))
        after = first.operations[1:] + [each for layer in others for each in layer.operations]
        for operation in after:
            if operation.kind not in RESHAPES:
                text += f"\n+ {operation.kind} {operation}".rstrip()
        middle = (left + width / 2 + to_left + to_width / 2) / 2
        ax.text(middle, -2.6, text, ha="center", va="top", fontsize=12, color=utils.GREY)
    ax.text(1.6, 0, "5", ha="center", va="center", fontsize=80, family="DejaVu Serif", zorder=2.5)
    utils.save_figure(figure, path, dpi=110)


def main(argv=None):
    utils.Parser("Draw images/architecture.png from the network in model.py.").parse_args(argv)
    traced = trace(LeNet())
    if traced.problem:
        raise utils.Error(f"the layers of this network cannot be drawn: {traced.problem}")
    draw(traced.layers, HERE / "architecture.png")


if __name__ == "__main__":
    utils.run_script(main)
