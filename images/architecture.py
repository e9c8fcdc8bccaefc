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


def outline(ax, x, y, width, height, colour="none", zorder=3, lean=0):
    """Draw a rectangle from its lower left corner; `lean` moves its lower edge to the right."""
    foot, top = x + lean, y + height
    xs, ys = [x, x + width, foot + width, foot], [top, top, y, y]
    ax.fill(xs, ys, facecolor=colour, edgecolor="black", linewidth=0.8, zorder=zorder)


def draw_stack(ax, layer, left):
    """Draw a layer; return where it ends (left, right, top), and its front map: x, y, w, h."""
    colour = COLOURS[layer.name[0]]
    count, rows, columns = (*layer.output.shape, 1, 1)[:3]
    across, height = columns * PIXEL, rows * PIXEL
    if rows * columns > 1:  # feature maps: a stack of planes, the last one in front
        step = min(0.2, 1.6 / count)
        spread = (count - 1) * step
        for i in range(count):
            x, y = left + i * step, spread / 2 - i * step - height / 2
            outline(ax, x, y, across, height, colour, 2)
        right, top = left + across + spread, (height + spread) / 2
        label = f"{count}@{rows}x{columns}"
    else:  # units: a bar, leaning as the stacks do
        top = 0.015 * min(count, 150) + 0.15
        x, y, lean = left, -top, 0.7 * top
        outline(ax, x, y, BAR, 2 * top, colour, 2, lean)
        right, label = left + lean + BAR, f"{count}"
    ax.text(left, top + 0.12, f"{layer.name.upper()}\n{label}", va="bottom", fontsize=13)
    return (left, right, top), (x, y, across, height)


def draw_step(ax, stack, source, target):
    """Draw what leads from one stack of planes or bar of units, `source`, to the next."""
    first, *others = [operation for layer in stack for operation in layer.operations]
    (left, right, top), (x, y, across, height) = source
    (to_left, to_right, to_top), (to_x, to_y, to_across, to_height) = target
    text = WORDS[first.kind]
    if "kernel_size" in first.numbers and height > PIXEL:
        # One window, and the pixel or the unit that sees it.
        rows, columns = first.numbers["kernel_size"]
        text = f"{rows}x{columns}\n{text}"
        x += 0.75 * (across - columns * PIXEL)
        y += 0.2 * (height - rows * PIXEL)
        outline(ax, x, y, columns * PIXEL, rows * PIXEL)
        end_x, end_y, end = to_left + 0.35 * to_top, 0, 0
        if to_height > PIXEL:
            end_x, end_y, end = to_x + 0.25 * to_across, to_y + 0.6 * to_height, PIXEL
            outline(ax, end_x, end_y, PIXEL, PIXEL)
        xs = [x + columns * PIXEL] * 2, [end_x] * 2
        ys = [y, y + rows * PIXEL], [end_y, end_y + end]
    else:
        xs = [left + BAR, right], [to_left, to_right - BAR]
        ys = [top, -top], [to_top, -to_top]
    ax.plot(xs, ys, color="black", linewidth=0.7, zorder=4)
    words = [f"{each.kind} {each}".strip() for each in others if each.kind not in RESHAPES]
    text = "\n+ ".join([text, *words])
    middle = (left + right + to_left + to_right) / 4
    ax.text(middle, -2.6, text, ha="center", va="top", fontsize=12, color=utils.GREY)


def draw(layers, path):
    """Draw the layers as stacks of planes, in the manner of figure 2 of LeCun et al. (1998).

    Args:
        layers: those of `model.trace`; one without a stack of its own, such as dropout, is named
            in the text below.
    """
    starts = [0, *(i for i, layer in enumerate(layers) if layer.kind in WORDS)]
    stacks = [layers[start:end] for start, end in zip(starts, [*starts[1:], None])]
    figure = Figure(figsize=(2.2 + 1.6 * len(stacks), 4.1), layout="constrained")
    ax = figure.add_subplot(aspect="equal", ylim=(-3.6, 3.1))
    ax.axis("off")
    places, left = [], 0
    for first, *_ in stacks:
        places.append(draw_stack(ax, first, left))
        left = places[-1][0][1] + GAP
    for stack, source, target in zip(stacks[1:], places, places[1:]):
        draw_step(ax, stack, source, target)
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
