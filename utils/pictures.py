"""The user's own pictures, made to look like those of a data set."""

import warnings

import numpy as np
import torch

from utils.cli import Error, relative

PIXEL_LIMIT = 100_000_000  # beyond any camera; a small file can claim to hold far more
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM")  # none that runs a program
BOX = {"FashionMNIST": 28, "MNIST": 20, "Glyphs": 20}  # longer side of the object, in pixels


def load_picture(path, dataset):
    """Read a picture of one object and make it look like an image of `dataset`.

    Grey, bright on black, cropped to the object and scaled as the data set's authors did: MNIST
    fits a digit into 20x20 pixels and centres its mass in 28x28 (LeCun et al. 1998, section III.A),
    FashionMNIST fits the article into 28x28 (Xiao et al. 2017, section 2).

    Returns:
        image (uint8, 28 x 28).

    Raises:
        Error: the file is no picture that can be read, or it is of one colour.
    """
    from PIL import Image

    grey = _read_grey(path)
    border = np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]])
    background = np.median(border)
    x = grey - background
    if background > (grey.max() + grey.min()) / 2:
        x = -x
    noise = 4 * np.median(np.abs(border - background))  # of the paper, the table, the wall
    x = (x - noise).clip(min=0)
    if x.max() <= 1e-3 * (1 + abs(background)):
        raise Error(f"{relative(path)} shows nothing: it is of one colour")
    x = (255 * x / x.max()).astype(np.uint8)

    rows, columns = ((x > 25).any(axis=axis).nonzero()[0] for axis in (1, 0))
    x = x[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    scale = BOX[dataset] / max(x.shape)
    height, width = (max(1, round(side * scale)) for side in x.shape)
    x = np.array(Image.fromarray(x).resize((width, height), Image.Resampling.BILINEAR), dtype=float)
    x = (255 * x / x.max()).round().astype(np.uint8)

    # MNIST's centres of mass lie on pixel 14 of 0 to 27, not on 13.5.
    middle = (height - 1) / 2, (width - 1) / 2
    if dataset == "MNIST":
        middle = [(np.indices(x.shape)[axis] * x).sum() / x.sum() for axis in (0, 1)]
    top, left = (
        int(np.clip(round(14 - m), 0, 28 - side)) for m, side in zip(middle, (height, width))
    )
    image = torch.zeros(28, 28, dtype=torch.uint8)
    image[top : top + height, left : left + width] = torch.from_numpy(x)
    return image


def _read_grey(path):
    """Read a picture as grey levels (float, H x W), the right way up, at most 1024 pixels wide."""
    from PIL import Image, ImageOps

    shown = relative(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # we have PIXEL_LIMIT
            picture = Image.open(path, formats=FORMATS)
        with picture:
            if picture.width * picture.height > PIXEL_LIMIT:
                raise Error(f"{shown} is too large: {picture.width}x{picture.height} pixels")
            if getattr(picture, "is_animated", False) and picture.format != "MPO":
                raise Error(f"{shown} is animated: save the one picture that you mean")
            deep = picture.mode.startswith(("I", "F"))  # 16 bits and more
            if picture.mode not in ("RGB", "RGBA", "L"):  # which are scaled first, to save memory
                picture = picture.convert("F" if deep else "RGBA")
            picture.thumbnail((1024, 1024))
            picture = ImageOps.exif_transpose(picture).convert("F" if deep else "RGBA")
    except FileNotFoundError:
        raise Error(f"{shown} does not exist") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise Error(f"{shown} is no picture that can be read: {error}") from error

    if picture.mode == "F":
        return np.array(picture, dtype=float)
    grey = np.array(picture.convert("RGB").convert("L"), dtype=float)
    alpha = np.array(picture.getchannel("A"), dtype=float) / 255
    # What is transparent becomes white behind a dark object and black behind a bright one.
    mean = (grey * alpha).sum() / max(alpha.sum(), 1)
    return alpha * grey + (1 - alpha) * (255 if mean < 128 else 0)
