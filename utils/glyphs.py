"""Glyphs, the built-in data set: digits drawn on the spot, for machines without a network."""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from utils.checkpoint import load, save
from utils.cli import Error

# The fonts that matplotlib ships; the test digits come from a family that training never sees.
FONTS = {
    "train": [
        *("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique"),
        *("DejaVuSansMono", "DejaVuSansMono-Bold"),
        *("DejaVuSansMono-Oblique", "DejaVuSansMono-BoldOblique"),
        *("DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic"),
        *("cmr10", "cmb10", "cmss10", "cmtt10"),
    ],
    "test": ["STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta"],
}
COUNTS = {"train": 60_000, "test": 10_000}
SEEDS = {"train": 0, "test": 1}
VERSION = 1  # raise it whenever a change makes other glyphs, so that no old cache is used


def load_glyphs(data_dir, split):
    """Load one split of Glyphs from its cache below `data_dir`, or draw it and fill the cache.

    Returns:
        images (uint8, N x 28 x 28, bright on black) and labels (int64, N).
    """
    path = Path(data_dir) / "Glyphs" / f"{split}-v{VERSION}.pt"
    if path.exists():
        try:
            cached = load(path)
            return cached["images"], cached["labels"]
        except (Error, LookupError, TypeError) as error:
            print(f"{error}: drawing the glyphs again", file=sys.stderr)
    images, labels = draw_glyphs(split)
    save({"images": images, "labels": labels}, path)
    return images, labels


def draw_glyphs(split):
    """Draw one split of Glyphs: digits in the fonts that matplotlib ships, warped and noisy.

    Each call draws the same images. The fonts of train and test are disjoint.

    Returns:
        images (uint8, N x 28 x 28, bright on black) and labels (int64, N), N as in COUNTS.
    """
    outlines = _draw_outlines(FONTS[split])  # fonts x weights x 10 digits x 64 x 64
    fonts, weights = outlines.shape[:2]
    generator = torch.Generator().manual_seed(SEEDS[split])

    def uniform(low, high, *shape):
        return torch.rand(shape, generator=generator) * (high - low) + low

    count = COUNTS[split]
    labels = torch.randperm(count, generator=generator) % 10
    images = []
    for digit in labels.split(5000):
        n = len(digit)
        font = torch.randint(fonts, (n,), generator=generator)
        weight = torch.randint(weights, (n,), generator=generator)
        x = outlines[font, weight, digit].unsqueeze(1)

        angle = uniform(-25, 25, n).deg2rad()
        scale_x, scale_y = uniform(0.7, 1.1, 2, n)
        shear = uniform(-0.3, 0.3, n)
        cos, sin = angle.cos(), angle.sin()
        row_x = torch.stack([cos / scale_x, (cos * shear - sin) / scale_x], dim=1)
        row_y = torch.stack([sin / scale_y, (sin * shear + cos) / scale_y], dim=1)
        shift = uniform(-3, 3, n, 2, 1) * 2 / 28  # up to 3 pixels, in the grid's units
        theta = torch.cat([torch.stack([row_x, row_y], dim=1), shift], dim=2)
        grid = F.affine_grid(theta, (n, 1, 28, 28), align_corners=False)
        x = F.grid_sample(x, grid, align_corners=False)

        x = torch.lerp(x, F.avg_pool2d(x, 3, stride=1, padding=1), uniform(0, 1, n, 1, 1, 1))
        x = x * uniform(0.4, 1, n, 1, 1, 1)
        x = x + torch.randn(x.shape, generator=generator) * uniform(0, 0.22, n, 1, 1, 1)
        images.append((x.clamp(0, 1) * 255).round().to(torch.uint8).squeeze(1))
    return torch.cat(images), labels


def _draw_outlines(fonts):
    """Draw the ten digits in each font and four stroke weights (float, 0 to 1)."""
    import matplotlib
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    outlines = torch.empty(len(fonts), 4, 10, 64, 64)
    for i, name in enumerate(fonts):
        layout = ImageFont.Layout.BASIC  # the one that every build of Pillow has
        font = ImageFont.truetype(folder / f"{name}.ttf", 60, layout_engine=layout)
        for weight in range(4):
            for digit in range(10):
                image = Image.new("L", (64, 64))
                ImageDraw.Draw(image).text(
                    (32, 32), str(digit), 255, font, anchor="mm", stroke_width=weight
                )
                outlines[i, weight, digit] = torch.from_numpy(np.array(image)) / 255
    # Smoothed, so that sampling every other pixel or so leaves no jagged edges.
    return F.avg_pool2d(outlines.flatten(0, 2), 3, stride=1, padding=1).view_as(outlines)
