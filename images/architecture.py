"""Print the table of the network in model.py, and draw it in images/architecture.png.

python images/architecture.py
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)


import utils
from images import plots
from images.trace import table, trace
from model import LeNet

COLORS = {"I": "white", "C": "#cfe3f7", "S": "#fde3c8", "F": "#d5efd9", "O": "#d5efd9"}
LABELS = {
    "conv2d": "convolution",
    "avg_pool2d": "average pooling",
    "max_pool2d": "max pooling",
    "linear": "fully\nconnected",
}
PIXEL, BAR, GAP = 0.1, 0.28, 1.0  # size of a pixel, width of a bar, distance between layers


def draw_box(ax, x, y, width, height, color="none", zorder=3):
    """Draw a rectangle with its lower left corner at x, y."""
    style = {"facecolor": color, "edgecolor": "black", "linewidth": 0.8, "zorder": zorder}
    ax.add_patch(plots.Rectangle((x, y), width, height, **style))


def draw_layer(ax, layer, left):
    """Draw maps as a stack, or units as a bar. Return the front map or bar: x, y, width, height."""
    count, rows, columns = (*layer.output.shape, 1, 1)[:3]
    if rows * columns > 1:
        width, height, planes = columns * PIXEL, rows * PIXEL, min(count, 40)
    else:
        left += 0.8  # room for the texts below
        width, height, planes = BAR, 0.03 * min(count, 150) + 0.3, 1
    step = min(0.2, 1.6 / planes)
    spread = (planes - 1) * step
    for i in range(planes):
        x, y = left + i * step, spread / 2 - i * step - height / 2
        draw_box(ax, x, y, width, height, COLORS[layer.name[0]], zorder=2)
    text = f"{layer.name.upper()}\n{'x'.join(map(str, layer.output.shape))}"
    ax.text(left, (height + spread) / 2 + 0.12, text, va="bottom", fontsize=13)
    return x, y, width, height


def draw_connection(ax, layer, source, target, before):
    """Draw the connection from one layer to the next, and label it below.

    Args:
        source, target: fronts of both layers, from `draw_layer`; before: labels to put first.
    """
    x, y, width, height = source
    next_x, next_y, next_width, next_height = target
    middle = (x + width + next_x) / 2
    operation = layer.operations[0]
    text = LABELS[operation.op]
    if "kernel_size" in operation.attributes and width != BAR:
        # One window, and the pixel or unit computed from it.
        rows, columns = operation.attributes["kernel_size"]
        text = f"{rows}x{columns}\n{text}"
        x += 0.75 * (width - columns * PIXEL)
        y += 0.2 * (height - rows * PIXEL)
        width, height = columns * PIXEL, rows * PIXEL
        draw_box(ax, x, y, width, height)
        next_x += 0.25 * next_width
        next_y += 0.6 * next_height
        next_height = PIXEL
        draw_box(ax, next_x, next_y, PIXEL, PIXEL)
    ends = [y, y + height], [next_y, next_y + next_height]
    ax.plot([x + width, next_x], ends, color="black", linewidth=0.7, zorder=4)
    text = "\n+ ".join([*before, text, *layer.activations()])
    ax.text(middle, -2.6, text, ha="center", va="top", fontsize=12, color=plots.GRAY)


@plots.default_style
def draw(layers, path):
    """Draw the layers, from `trace`, in the style of figure 2 of LeCun et al. (1998)."""
    figure = plots.Figure(figsize=(2.6 + 1.6 * len(layers), 4.1), layout="constrained")
    ax = figure.add_subplot(aspect="equal", ylim=(-3.6, 3.1))
    ax.axis("off")
    source = draw_layer(ax, layers[0], left=0)
    before = layers[0].activations()
    for layer in layers[1:]:
        target = draw_layer(ax, layer, left=source[0] + source[2] + GAP)
        draw_connection(ax, layer, source, target, before)
        source, before = target, []
    ax.text(1.6, 0, "5", ha="center", va="center", fontsize=80, family="DejaVu Serif", zorder=2.5)
    plots.save_figure(figure, path, dpi=110)


def main(argv=None):
    utils.Parser("Print and draw the layers of the network in model.py.").parse_args(argv)
    model = LeNet()
    layers = trace(model)
    rows = table(layers)
    print(f"| {' | '.join(rows[0])} |\n|{'---|' * 6}---:|")  # a Markdown table
    for row in rows:
        *cells, parameters = row.values()
        print(f"| {' | '.join(cells)} | {parameters:,} |")
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    path = utils.ROOT / "images" / "architecture.png"
    draw(layers, path)
    print(f"Picture: {utils.shown(path)}")


if __name__ == "__main__":
    utils.run_script(main)
