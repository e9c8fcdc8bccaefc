"""Classify your own pictures, each of a single digit or a single article of clothing.

LeNet-5 was trained on small images of one bright, centered object on black. `python test.py
--image` first converts each picture to this form; images/own.png shows the result.
"""

import sys
import warnings

import numpy as np
import torch
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageOps

import utils
from images import plots

FORMATS = ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "AVIF"]  # EPS would start a program
MAX_SIDE = 100  # pixels: larger pictures are shrunk, which also averages out noise and paper grain


def classify(args, run, model):
    """Print the three most likely classes of each picture, and draw the converted images.

    Raises:
        utils.Error: a picture cannot be read. All others are classified first.
    """
    info = utils.DATASETS[run["dataset"]]
    device = next(model.parameters()).device
    files = [file for path in args.image for file in find_pictures(path)]
    images, captions = [], []
    for file in files:
        try:
            image = load_picture(file, info)
        except utils.Error as error:
            print(f"Warning: {error}", file=sys.stderr)
            continue
        outputs = utils.predict(model, image[None].to(device), run["mean"], run["std"])
        top = zip(*utils.probabilities(outputs)[0].topk(3))
        best = [f"{info.classes[i]} ({p:.1%})" for p, i in top]
        print(f"{file}: {', '.join(best)}")
        name = file.name.encode(errors="replace").decode()  # file names are arbitrary bytes
        images.append(image)
        captions.append(f"{name[:20]}\n{best[0]}")
    if images:
        path = args.output_dir / "images" / "own.png"
        title = f"Your pictures, converted for LeNet-5 ({run['dataset']})"
        plots.draw_grid(torch.stack(images[:64]), captions, title, path)
        print(f"Picture: {utils.shown(path)}")
    if len(images) < len(files):
        raise utils.Error(f"{len(files) - len(images)} of {len(files)} pictures could not be used")


def find_pictures(path):
    """List the pictures directly in a directory, except hidden ones. A file is listed as it is."""
    if not path.is_dir():
        return [path]
    suffixes = [suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS]
    files = [file for file in path.glob("[!.]*") if file.suffix.lower() in suffixes]
    return sorted(files) or [path]  # reading the directory itself then fails


def load_picture(path, info):
    """Read a picture and make it look like the images of a dataset: uint8, 28 x 28.

    Raises:
        utils.Error: it cannot be read, or contains no object.
    """
    with utils.errors_as(f"cannot read {path}: REASON", Exception):  # damaged files raise anything
        gray = read_gray(path)
    difference = subtract_background(gray, info.strokes)
    if difference.getextrema()[1] < 32:
        raise utils.Error(f"cannot use {path}: no object found, because the contrast is too low")
    image = ImageOps.autocontrast(difference)
    threshold = 255 / 3 if info.strokes else 255 / 20  # above ruled lines and noise
    image = image.point(lambda value: value if value > threshold else 0)
    if info.strokes:
        image = clear_border(image)
    return torch.from_numpy(np.array(crop_and_center(image, info)))


def read_gray(path):
    """Read a picture as a small grayscale image, upright, with white where it is transparent."""
    Image.init()
    formats = [name for name in FORMATS if name in Image.OPEN]
    # record=True keeps warnings, such as of damaged EXIF data, off the screen.
    with warnings.catch_warnings(record=True), Image.open(path, formats=formats) as file:
        picture = ImageOps.exif_transpose(file).convert("RGBA")
    picture.thumbnail((MAX_SIDE, MAX_SIDE))
    white = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(white, picture).convert("L")


def subtract_background(gray, strokes):
    """Return an image of how much darker than the background each pixel is, 0 to 255.

    For pen strokes the background is a blurred copy, which follows uneven light and shadows
    (adaptive thresholding). Clothes fill too much of the picture for that: their background is
    one level, the median along the border.
    """
    pixels = np.asarray(gray)
    level = np.median(np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]]))
    if level < sum(gray.getextrema()) / 2:  # bright on dark
        gray, level = ImageOps.invert(gray), 255 - level
    if strokes:
        background = gray.filter(ImageFilter.GaussianBlur(MAX_SIDE / 5))
    else:
        background = Image.new("L", gray.size, int(level))
    return ImageChops.subtract(background, gray)  # negative values become 0


def clear_border(image):
    """Erase everything connected to the border, such as a shadow or the edge of a table.

    If almost nothing is left, the digit itself touches the border: keep the image as it is.
    """
    framed = ImageOps.expand(image, border=1, fill=255)
    ImageDraw.floodfill(framed, (0, 0), 0, thresh=254)  # spreads over all pixels above 0
    inside = ImageOps.crop(framed, border=1)
    enough = np.count_nonzero(inside) > inside.width * inside.height / 200
    return inside if enough else image


def crop_and_center(image, info):
    """Crop the object, and scale it to 28x28 pixels, as in the dataset.

    MNIST digits fit in 20x20 pixels and are centered by mass (LeCun et al. 1998, section III.A);
    FashionMNIST articles fill the image (Xiao et al. 2017, section 2).
    """
    left, top, right, bottom = image.getbbox()
    side = round(max(right - left, bottom - top) * 28 / info.object_size)
    x, y = (left + right) / 2, (top + bottom) / 2
    if info.centered_by_mass:
        mass = np.asarray(image, dtype=float)
        x = np.average(np.arange(image.width), weights=mass.sum(axis=0)) + 0.5 - side / 56
        y = np.average(np.arange(image.height), weights=mass.sum(axis=1)) + 0.5 - side / 56
    left, top = round(x - side / 2), round(y - side / 2)
    image = image.crop((left, top, left + side, top + side))  # black outside the picture
    return ImageOps.autocontrast(image.resize((28, 28)))
