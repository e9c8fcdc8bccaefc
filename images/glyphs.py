"""Glyphs, the built-in dataset: digits rendered from the fonts that matplotlib ships."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

TRAIN_FONTS = """
DejaVuSans DejaVuSans-Bold DejaVuSans-Oblique DejaVuSans-BoldOblique DejaVuSansMono
DejaVuSansMono-Bold DejaVuSansMono-Oblique DejaVuSansMono-BoldOblique DejaVuSerif DejaVuSerif-Bold
DejaVuSerif-Italic DejaVuSerif-BoldItalic cmr10 cmb10 cmss10 cmtt10
""".split()
TEST_FONTS = "STIXGeneral STIXGeneralBol STIXGeneralItalic STIXGeneralBolIta".split()


def draw_glyphs(split):
    """Draw the "train" or "test" split: warped, noisy digits, the same on every call.

    Returns:
        images (uint8, N x 28 x 28, bright on black) and labels (int64, N).
    """
    train = split == "train"
    count, seed = (60_000, 0) if train else (10_000, 1)
    templates = render_digits(TRAIN_FONTS if train else TEST_FONTS)
    generator = torch.Generator().manual_seed(seed)

    def uniform(low, high, *shape):
        return torch.rand(shape, generator=generator) * (high - low) + low

    labels = torch.randperm(count, generator=generator) % 10
    images = []
    for digits in labels.split(5000):
        n = len(digits)
        style = torch.randint(len(templates), (n,), generator=generator)
        x = templates[style, digits].unsqueeze(1)
        # A random matrix rotates, slants and scales the digit.
        warp = 1.2 * torch.eye(2) + uniform(-0.3, 0.3, n, 2, 2)
        shift = uniform(-3, 3, n, 2, 1) * 2 / 28  # about 3 pixels; an image is 2 units wide
        grid = F.affine_grid(torch.cat([warp, shift], dim=2), (n, 1, 28, 28), align_corners=False)
        x = F.grid_sample(x, grid, align_corners=False)
        # Random blur, brightness and noise.
        x = torch.lerp(x, F.avg_pool2d(x, 3, stride=1, padding=1), uniform(0, 1, n, 1, 1, 1))
        x = x * uniform(0.4, 1, n, 1, 1, 1)
        x = x + torch.randn(x.shape, generator=generator) * uniform(0, 0.22, n, 1, 1, 1)
        images.append((x.clamp(0, 1) * 255).round().to(torch.uint8).squeeze(1))
    return torch.cat(images), labels


def render_digits(fonts):
    """Render the digits in each font and stroke width: float, 0 to 1, styles x 10 x 64 x 64."""
    from images.plots import matplotlib  # handles an unknown MPLBACKEND

    templates = []
    for name in fonts:
        path = Path(matplotlib.get_data_path(), "fonts", "ttf", f"{name}.ttf")
        # The other layout engine is missing from some builds of Pillow.
        font = ImageFont.truetype(path, 60, layout_engine=ImageFont.Layout.BASIC)
        for stroke_width in range(4):
            for digit in "0123456789":
                image = Image.new("L", (64, 64))
                draw = ImageDraw.Draw(image)
                draw.text((32, 32), digit, 255, font, anchor="mm", stroke_width=stroke_width)
                templates.append(torch.from_numpy(np.array(image)) / 255)
    # Blur, because sampling about every second pixel would leave jagged edges.
    return F.avg_pool2d(torch.stack(templates), 3, stride=1, padding=1).view(-1, 10, 64, 64)
