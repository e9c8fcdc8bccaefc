"""Simulate photos of digits, and count how many the pretrained network classifies correctly.

python tests/simulated_photos.py             25 pictures of each kind, from MNIST's test images
python tests/simulated_photos.py --seed 7    others
"""

import io
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import utils  # before torch, whose environment it sets
import numpy as np
import torch
from PIL import Image, ImageFilter

from images import photos
from model import LeNet

KINDS = "drawn black on white, drawn white on black, grainy paper, turned and blurred, "
KINDS += "small in a large frame, light from one side, ruled paper, squared paper, table edge, "
KINDS += "shadow along a side, shadow edge through the digit, faint pencil, pencil on squared paper"
KINDS = f"{KINDS}, chalk, thin pen".split(", ")


def photograph(digit, kind, rng):
    """Return a gray PIL image, 400 x 400 to 1200 x 900, of `digit` (uint8, 28 x 28).

    Args:
        kind: one of KINDS.
        rng: a numpy generator, for size, position, light and grain.
    """
    width, height = int(rng.integers(400, 1201)), int(rng.integers(400, 901))
    fraction = 0.15 if kind.startswith("small") else rng.uniform(0.4, 0.75)
    size = round(fraction * min(width, height))
    ink = Image.fromarray(digit).resize((size, size), Image.Resampling.BICUBIC)
    if kind.startswith("turned"):
        ink = ink.rotate(rng.choice([-12, 12]), Image.Resampling.BICUBIC)
    edge = 180 if kind == "thin pen" else 100  # gray level at the edge of a stroke
    y, x = rng.integers(height - size + 1), rng.integers(width - size + 1)
    stroke = np.zeros((height, width))
    stroke[y : y + size, x : x + size] = ((np.array(ink, dtype=float) - edge) / 60 + 0.5).clip(0, 1)
    if kind.startswith("drawn"):
        picture = 255 * (1 - stroke if "black on" in kind else stroke)
        return Image.fromarray(picture.astype(np.uint8))

    across, down = np.linspace(0, 1, width), np.linspace(0, 1, height)[:, None]
    left, right = x, width - size - x  # free space on both sides of the digit
    side = np.arange(width) < left / 2 if left > right else np.arange(width) > width - right / 2
    paper, light = np.full((2, height, width), 1.0)
    for axis in (0, 1)[: ("ruled" in kind) + 2 * ("squared" in kind)]:
        spacing = max(24, size // 4)
        lines = (np.arange(paper.shape[axis]) + rng.integers(spacing)) % spacing < 2
        paper[lines if axis == 0 else (slice(None), lines)] *= 0.75
    if kind == "table edge":
        paper[:, side] = rng.uniform(0.2, 0.5)
    if kind == "shadow along a side":
        light[:, side] = rng.uniform(0.5, 0.65)
    if kind == "light from one side":
        light -= 0.55 * (across if rng.random() < 0.5 else down)
    if kind.startswith("shadow edge"):
        middle = (x + size / 2) / width + rng.uniform(-0.3, 0.3) * (down - (y + size / 2) / height)
        light[across < middle] = 0.6
    dark = rng.uniform(0.25, 0.4) if "pencil" in kind else rng.uniform(0.7, 0.9)
    picture = rng.uniform(190, 235) * paper * (1 - dark * stroke) * light
    if kind == "chalk":
        picture = rng.uniform(40, 80) + 150 * stroke * rng.uniform(0.55, 1, stroke.shape)
    picture += rng.normal(0, 4, picture.shape)
    picture = Image.fromarray(picture.clip(0, 255).astype(np.uint8))
    picture = picture.filter(ImageFilter.GaussianBlur(3 if "blurred" in kind else 0.8))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=int(rng.integers(60, 91)))
    return Image.open(file)


def classify(count, images, labels, directory, seed=0):
    """Yield each kind, and which of `count` pictures are classified correctly (bool, count)."""
    path = ROOT / "checkpoints" / "lenet5-mnist.pt"
    run = utils.load_checkpoint(path)
    model = LeNet()
    utils.load_weights(path, run, model)
    picture = Path(directory) / "picture.bmp"  # faster than PNG
    for number, kind in enumerate(KINDS):
        rng = np.random.default_rng([number, seed] if seed else number)
        chosen = rng.choice(len(labels), count, replace=False)
        seen = []
        for i in chosen:
            photograph(images[i].numpy(), kind, rng).save(picture)
            try:
                seen.append(photos.load_picture(picture, utils.DATASETS["MNIST"]))
            except utils.Error:  # rejected, which counts as an error, too
                seen.append(torch.zeros(28, 28, dtype=torch.uint8))
        logits = utils.predict(model, torch.stack(seen), mean=run["mean"], std=run["std"])
        yield kind, logits.argmax(dim=1) == labels[chosen]


def main():
    parser = utils.Parser("Simulate photos of digits, and classify them.")
    parser.add_argument("--seed", type=int, default=0, help="seed of the pictures")
    args = parser.parse_args()
    images, labels = utils.load_images("MNIST", ROOT / "data", "test")
    accuracies = []
    with tempfile.TemporaryDirectory() as directory:
        for kind, correct in classify(25, images, labels, directory, args.seed):
            accuracies.append(correct.float().mean().item())
            print(f"{kind:<32}{accuracies[-1]:>6.0%}", flush=True)
    print(f"{'all':<32}{sum(accuracies) / len(KINDS):>6.1%}")


if __name__ == "__main__":
    utils.run_script(main)
