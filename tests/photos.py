"""Pictures of digits as phones and drawing programs make them, and how many test.py recognises.

python tests/photos.py    25 pictures of each kind, made of MNIST's test images
"""

import importlib
import io
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image, ImageFilter  # noqa: E402

import utils  # noqa: E402

judge = importlib.import_module("test")
KINDS = (
    *("drawn black on white", "drawn white on black", "grainy paper", "turned and blurred"),
    *("small in a large frame", "light from one side", "ruled paper", "squared paper"),
    *("table edge", "shadow along a side", "shadow edge through the digit", "faint pencil"),
    *("pencil on squared paper", "chalk", "thin pen"),
)


def photograph(digit, kind, rng):
    """Show `digit` (uint8, 28 x 28, bright on black) in a picture of one of KINDS.

    Args:
        rng: a numpy generator, for size, place, light and grain.

    Returns:
        a grey PIL image of 400 x 400 to 1200 x 900 pixels.
    """
    width, height = int(rng.integers(400, 1201)), int(rng.integers(400, 901))
    share = 0.15 if kind.startswith("small") else rng.uniform(0.4, 0.75)
    size = round(share * min(width, height))
    ink = Image.fromarray(digit).resize((size, size), Image.Resampling.BICUBIC)
    if kind.startswith("turned"):
        ink = ink.rotate(rng.choice([-12, 12]), Image.Resampling.BICUBIC)
    edge = 180 if kind == "thin pen" else 100  # level of the edge of a stroke
    y, x = rng.integers(height - size + 1), rng.integers(width - size + 1)
    stroke = np.zeros((height, width))
    stroke[y : y + size, x : x + size] = ((np.array(ink, dtype=float) - edge) / 60 + 0.5).clip(0, 1)
    if kind.startswith("drawn"):
        picture = 255 * (1 - stroke if "black on" in kind else stroke)
        return Image.fromarray(picture.astype(np.uint8))

    across, down = np.linspace(0, 1, width), np.linspace(0, 1, height)[:, None]
    left, right = x, width - size - x  # what is free beside the digit
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


def recognised(kind, count, images, labels, folder):
    """Return which of `count` pictures of a kind the shipped weights recognise (bool, count)."""
    checkpoint = utils.load_checkpoint(ROOT / "checkpoints" / "lenet5-mnist.pt")
    model = judge.LeNet()
    utils.restore("lenet5-mnist.pt", checkpoint, model)
    rng = np.random.default_rng(KINDS.index(kind))
    chosen, seen = rng.choice(len(labels), count, replace=False), []
    for i in chosen:
        photograph(images[i].numpy(), kind, rng).save(Path(folder) / "picture.png")
        try:
            seen.append(judge.load_picture(Path(folder) / "picture.png", "MNIST")[-1])
        except utils.Error:  # it is refused, which is wrong too: nothing is on black
            seen.append(torch.zeros(28, 28, dtype=torch.uint8))
    logits = utils.predict(model, torch.stack(seen), checkpoint["mean"], checkpoint["std"])
    return logits.argmax(dim=1) == labels[chosen]


def main():
    images, labels = utils.load_images("MNIST", ROOT / "data", "test")
    right, start = [], time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        for kind in KINDS:
            right.append(recognised(kind, 25, images, labels, folder).float().mean())
            print(f"{kind:<32}{right[-1]:>6.0%}", flush=True)
    seconds = (time.perf_counter() - start) / 25 / len(KINDS)
    print(f"{'all':<32}{sum(right) / len(KINDS):>6.1%}   {seconds:.2f} s a picture, made and seen")


if __name__ == "__main__":
    utils.run_script(main)
