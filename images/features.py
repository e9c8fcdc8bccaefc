"""Draw the outputs of all layers for one image."""

import math

import torch
import torch.nn.functional as F

import utils
from images import plots
from images.trace import trace


@plots.default_style
def draw(run, model, images, labels, index, path):
    """Draw the outputs of all layers for image `index`, and the kernels of the first layer.

    Args:
        model: on the CPU, with the weights of `run`.
        images: uint8, N x 28 x 28; labels: int64, N.
    """
    classes = utils.DATASETS[run["dataset"]].classes
    image = F.pad(images[index : index + 1], [2] * 4)
    layers = trace(model, utils.normalize(image, run["mean"], run["std"]))
    panels = [("Input", image / 255, "gray")]
    kernels = layers[1].operations[0].tensors.get("weight", image)
    if kernels.ndim == 4 and kernels.shape[1] == 1:
        panels.append((f"Kernels of {layers[1].name}", kernels[:, 0], "RdBu_r"))
    panels += [(layer.name, layer.output, "gray") for layer in layers[1:-1]]

    mosaics = [mosaic(maps) for _, maps, _ in panels]
    widths = [min(max(6 * tiles.shape[1] / tiles.shape[0], 0.9), 2.2) for tiles in mosaics]
    figure = plots.Figure(figsize=(sum(widths) + 3.5, 7.2), layout="constrained")
    axes = figure.subplots(1, len(panels) + 1, width_ratios=[*widths, 2.2])
    for ax, tiles, (title, maps, cmap) in zip(axes, mosaics, panels):
        low, high = maps.min().item(), maps.max().item()
        if cmap != "gray":
            low, high = -max(-low, high), max(-low, high)  # so that 0 is white
        ax.imshow(tiles.numpy(), cmap=cmap, vmin=low, vmax=high)
        ax.set_title(f"{title}\n{'x'.join(map(str, maps.shape))}", fontsize=11)
        ax.set_xlabel(f"{low:.2g}\nto {high:.2g}", fontsize=10)
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
    percent = 100 * utils.probabilities(layers[-1].output.view(1, -1))[0]
    axes[-1].barh(classes, percent.tolist(), color=plots.BLUE)
    axes[-1].tick_params(axis="y", labelsize=min(10, 260 / len(classes)))
    axes[-1].set(xlim=(0, 100), ylim=(len(classes) - 0.5, -0.5))
    axes[-1].set_title("Output\nprobability (%)", fontsize=11)
    title = f"test image {index} of {run['dataset']}, class {classes[labels[index]]}"
    figure.suptitle(f"All layers of LeNet-5 for {title}", fontsize=14)
    figure.supxlabel("Below each layer: its range, from black to white or blue to red", size=11)
    plots.save_figure(figure, path)


def mosaic(maps):
    """Tile maps (N x H x W) or units (N) into a tall, narrow picture. Gaps between maps are NaN."""
    maps = maps.view((*maps.shape, 1, 1)[:3])  # units become 1x1 maps
    count, height, _ = maps.shape
    columns = max(1, round(math.sqrt(count / 5)))
    gap = min(1, height - 1)  # none between units
    padded = F.pad(maps, [0, gap, 0, gap, 0, -count % columns], value=math.nan)
    return torch.cat([torch.cat([*row], dim=1) for row in padded.split(columns)])
