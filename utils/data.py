"""The data sets as whole uint8 tensors, their splits, and their way into the network."""

import socket
import sys
import threading
import urllib.request
from http.client import HTTPException
from pathlib import Path

import torch
import torch.nn.functional as F

from utils.cli import Error, relative
from utils.glyphs import load_glyphs

# torchvision knows the md5 sums of the archives; these are the sums of the files inside them.
UNPACKED_MD5 = {
    "FashionMNIST": {
        "train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
        "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
        "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
        "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
    },
    "MNIST": {
        "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
        "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
        "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
        "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
    },
}
SECOND_SOURCES = {
    "FashionMNIST": ["https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/"]
}
TIMEOUT = 8  # seconds; with two silent sources the user still hears of it within 30


class Unavailable(Error):
    """A data set is neither on disk nor can be fetched."""


def load_images(dataset, data_dir, split):
    """Load one split of a data set, from `data_dir` if it is there, else by download.

    Args:
        dataset: FashionMNIST, MNIST or Glyphs.
        data_dir: folder with torchvision's layout, such as FashionMNIST/raw/*.gz.
        split: train (60,000 images) or test (10,000).

    Returns:
        images (uint8, N x 28 x 28, bright on black) and labels (int64, N).

    Raises:
        Unavailable: the data set is neither on disk nor can be fetched.
        Error: torchvision does not work.
    """
    try:
        if dataset == "Glyphs":
            return load_glyphs(data_dir, split)
        return _load_torchvision(dataset, Path(data_dir), split)
    except OSError as error:
        raise Unavailable(f"cannot use the data folder {relative(data_dir)}: {error}") from error


def load_train_images(dataset, data_dir):
    """Load the train split of `dataset`; auto is FashionMNIST or, where it cannot be had, Glyphs.

    Returns:
        the name of the data set, images (uint8, N x 28 x 28) and labels (int64, N).

    Raises:
        Error: as `load_images`; a data set that is named is never replaced.
    """
    if dataset != "auto":
        return dataset, *load_images(dataset, data_dir, "train")
    try:
        return "FashionMNIST", *load_images("FashionMNIST", data_dir, "train")
    except Unavailable as error:
        rule = "!" * 100
        print(
            f"{rule}\n"
            f"FashionMNIST cannot be had: {error}.\n\n"
            "TRAINING ON GLYPHS INSTEAD: digits drawn on the spot from the fonts of matplotlib.\n"
            "Its accuracies say nothing about FashionMNIST. README.md tells how to get the data.\n"
            f"{rule}",
            file=sys.stderr,
            flush=True,
        )
    return "Glyphs", *load_images("Glyphs", data_dir, "train")


def _load_torchvision(dataset, data_dir, split):
    try:
        from torchvision import datasets
        from torchvision.datasets.utils import check_integrity, extract_archive
    except (ImportError, RuntimeError) as error:
        raise Error(
            f"torchvision does not work with torch {torch.__version__} ({error}): install a "
            "matching pair with pip install --upgrade --force-reinstall torch torchvision"
        ) from error
    source = getattr(datasets, dataset)
    mirrors = [*source.mirrors, *SECOND_SOURCES.get(dataset, [])]
    for name, md5 in source.resources:
        archive = data_dir / dataset / "raw" / name
        unpacked = archive.with_suffix("")
        if check_integrity(unpacked, UNPACKED_MD5[dataset][unpacked.name]):
            continue
        if not check_integrity(archive, md5):
            damaged = [str(relative(path)) for path in (unpacked, archive) if path.exists()]
            problem = f"{' and '.join(damaged) or relative(archive)} is "
            problem += "damaged" if damaged else "missing"
            if damaged:
                print(f"{problem}: fetching it again", file=sys.stderr)
            _download(mirrors, archive, md5, problem)
        extract_archive(archive, archive.parent)
    loaded = source(data_dir, train=split == "train")
    return loaded.data, loaded.targets


def _download(mirrors, archive, md5, problem):
    """Fetch `archive` from the first of `mirrors` that has it, and drop those that do not."""
    from torchvision.datasets.utils import download_url

    reasons = []
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)  # torchvision sets none
    try:
        for mirror in list(mirrors):
            try:
                _ask(mirror + archive.name)
                download_url(mirror + archive.name, archive.parent, archive.name, md5)
                return
            except (OSError, RuntimeError, HTTPException) as error:
                reasons.append(f"{mirror}: {error}")
                mirrors.remove(mirror)
    finally:
        socket.setdefaulttimeout(timeout)
    raise Unavailable(f"{problem} and cannot be fetched ({'; '.join(reasons)})")


def _ask(url):
    """Raise an OSError unless a server answers within TIMEOUT.

    The thread is for the look-up of the server's name and for servers with many addresses: their
    waits know no time-out, or add up.
    """
    errors = [TimeoutError(f"no answer within {TIMEOUT} seconds")]

    def ask():
        try:
            urllib.request.urlopen(url, timeout=TIMEOUT).close()
            errors.clear()
        except (OSError, HTTPException) as error:
            errors[0] = error

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(TIMEOUT)
    if errors:
        raise errors[0]


def split_train_validation(images, labels, per_class=500):
    """Split off a balanced validation set: every k-th image of each class, whatever the seed.

    Args:
        images: N x 28 x 28; labels: int64, N.
        per_class: validation images of each class; at most half of a class.

    Returns:
        (images, labels) of the train split and (images, labels) of the validation split.
    """
    validation = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        members = (labels == label).nonzero().squeeze(1)
        count = min(per_class, len(members) // 2)
        validation[members[torch.arange(count) * len(members) // max(count, 1)]] = True
    return (images[~validation], labels[~validation]), (images[validation], labels[validation])


def pixel_statistics(images):
    """Return the mean and the standard deviation of all pixels (uint8), as floats in 0 to 1."""
    counts = torch.bincount(images.flatten(), minlength=256).double()
    levels = torch.arange(256, dtype=torch.double) / 255
    mean = (counts * levels).sum() / counts.sum()
    variance = (counts * (levels - mean) ** 2).sum() / counts.sum()
    return mean.item(), variance.sqrt().item()


def draw_changes(count, mirror, shift):
    """Draw how `count` images are augmented, from the global random numbers of the CPU.

    Args:
        mirror: whether half of the images are mirrored.
        shift: most pixels, 0 to 2, by which an image is moved, in either direction.

    Returns:
        int64, count x 3: 1 if mirrored, pixels down, pixels to the right.
    """
    mirrored = torch.randint(2 if mirror else 1, (count, 1))
    return torch.cat([mirrored, torch.randint(-shift, shift + 1, (count, 2))], dim=1)


def preprocess(images, mean, std, changes=None):
    """Turn images (uint8, N x 28 x 28) into network input (float, N x 1 x 32 x 32).

    They are padded with black to 32x32, augmented by `changes` (see `draw_changes`) if there are
    any, and normalised.
    """
    x = F.pad(images, (2, 2, 2, 2))
    if changes is not None:
        mirrored, down, right = changes.unsqueeze(2).unbind(1)
        pixel = torch.arange(32, device=x.device)
        # What is shifted in at one side is the margin of the other one: black as well.
        row, column = (pixel - down) % 32, (pixel - right) % 32
        column = torch.where(mirrored == 1, 31 - column, column)
        source = 32 * row.unsqueeze(2) + column.unsqueeze(1)
        x = x.flatten(1).gather(1, source.flatten(1)).view_as(x)
    return x.unsqueeze(1).float().sub_(255 * mean).div_(255 * std)


@torch.inference_mode()
def predict(model, images, mean, std, batch_size=1000):
    """Return the logits (float, N x classes) of `model` for images (uint8, N x 28 x 28)."""
    model.eval()
    return torch.cat([model(preprocess(x, mean, std)) for x in images.split(batch_size)])
