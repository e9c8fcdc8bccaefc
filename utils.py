"""What train.py and test.py share.

In this order: names and errors, data sets, batches, checkpoints, plots, and Glyphs, the built-in
data set.
"""

import argparse
import contextlib
import gzip
import io
import math
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import zipfile
from http.client import HTTPException
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw, ImageFont

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# --- Names and errors -----------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parent
DIGITS = [str(digit) for digit in range(10)]
CLASSES = {
    "FashionMNIST": [
        *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
        *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
    ],
    "MNIST": DIGITS,
    "Glyphs": DIGITS,
}
FOLDERS = {
    "data": (ROOT / "data", "where the data sets are, or are downloaded to"),
    "checkpoint": (ROOT / "checkpoints", "a run on data set D has its checkpoints in D/ in here"),
    "image": (ROOT / "images", "a run on data set D has its pictures in D/ in here"),
}


class Error(Exception):
    """Bad input or bad surroundings; the message is one line that says what to do."""


class Unavailable(Error):
    """A data set is neither on disk nor can be fetched."""


class Parser(argparse.ArgumentParser):
    """The options that train.py and test.py share; bad ones are an `Error`, which is one line.

    Args:
        description: of the script.
        dataset: help on --dataset auto.
    """

    def __init__(self, description, dataset, **how):
        super().__init__(description=description, allow_abbrev=False, **how)
        names, devices = ("auto", *CLASSES), ("auto", "cpu", "cuda", "mps")
        add = self.add_argument
        add("--dataset", choices=names, default="auto", help=f"{dataset} (default: auto)")
        for name, (default, text) in FOLDERS.items():
            text += f" (default: {default.name}, beside the script)"
            add(f"--{name}-dir", type=folder, default=default, help=text)
        add("--device", choices=devices, default="auto", help="auto: CUDA or CPU (default: auto)")

    def error(self, message):
        raise Error(f"{message} (see python {self.prog} --help)")


def path(text):
    """An argparse type: a path, in which ~ is the user's home."""
    return Path(os.path.expanduser(text))  # noqa: PTH111 - never raises


def folder(text):
    """An argparse type: the path of a folder, or of one that can be made."""
    if os.path.lexists(path(text)) and not os.path.isdir(path(text)):  # noqa: PTH112 - never raises
        raise argparse.ArgumentTypeError(f"{text!r} is no folder")
    return path(text)


def number(kind, low, above=False):
    """Return an argparse type: a finite int or float (`kind`), at least `low` or above it."""

    high = 2**63 if kind is int else math.inf  # torch has no larger whole numbers

    def parse(text):
        with contextlib.suppress(ArithmeticError, TypeError, ValueError):
            value = kind(text)
            if (low < value if above else low <= value) and value < high:
                return value
        what = "a whole number" if kind is int else "a number"
        bound = "above" if above else "from"
        raise argparse.ArgumentTypeError(f"{text!r} is not {what} {bound} {low}")

    return parse


def run(main):
    """Run a script's `main` and exit with its status: 2 after an `Error`, 130 after a signal."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    sys.stdout.reconfigure(errors="backslashreplace")  # names that the terminal cannot show
    try:
        status = main()
    except Error as error:
        print(f"{Path(sys.argv[0]).name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        status = 130
    sys.exit(status)


def relative(path):
    """Return `path` as one would type it: relative to the current folder where it lies below."""
    path = Path(os.path.realpath(path))
    try:
        return path.relative_to(Path.cwd())
    except (ValueError, FileNotFoundError):  # it lies elsewhere, or the current folder is gone
        return path


def command(script, args, *options):
    """Return a command line that works where it is printed: with the folders, device of `args`."""
    python = "python" if shutil.which("python") == sys.executable else sys.executable
    line = [python, relative(ROOT / script), *options, "--dataset", args.dataset]
    for name, (default, _) in FOLDERS.items():
        if (path := getattr(args, f"{name}_dir")) != default:
            line += [f"--{name}-dir", relative(path)]
    if args.device != "auto":
        line += ["--device", args.device]
    return (subprocess.list2cmdline if os.name == "nt" else shlex.join)(map(str, line))


def choose_device(name):
    """Return the torch.device for auto, cpu, cuda or mps; auto is cuda where it works, else cpu.

    Raises:
        Error: the device that was named does not work here.
    """
    device = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    try:
        torch.ones(1, device=device).add(1).item()  # an old GPU is there, but may have no kernels
    except (AssertionError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        if name != "auto":
            raise Error(f"--device {name} does not work ({reason}): use --device auto") from error
        print(f"Warning: the GPU does not work ({reason}); the CPU is taken", file=sys.stderr)
        device = "cpu"
    return torch.device(device)


# --- Data sets ------------------------------------------------------------------------------------

SECOND_SOURCES = {  # where torchvision knows of one alone
    "FashionMNIST": ["https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/"]
}
TIMEOUT = 8  # seconds that a server may be silent
CACHE_VERSION = 2  # raise it whenever a change makes other images, so that no old cache is used


def load_images(dataset, data_dir, split):
    """Load one split of a data set: from its cache, else from its archives, else by download.

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
    cache = Path(data_dir) / dataset / f"{split}-v{CACHE_VERSION}.pt"
    if os.path.exists(cache):  # noqa: PTH110 - never raises
        try:
            cached = load(cache)
            return cached["images"], cached["labels"]
        except (Error, LookupError, TypeError):
            print(f"{relative(cache)} is damaged: making it anew", file=sys.stderr)
    if dataset == "Glyphs":
        images, labels = draw_glyphs(split)
    else:
        try:
            images, labels = read_archives(dataset, Path(data_dir), split)
        except OSError as error:
            raise Unavailable(f"cannot use {relative(data_dir)}: {error}") from error
    try:
        save({"images": images, "labels": labels}, cache)
    except Error as error:
        print(f"Warning: {error}; the next start will take as long", file=sys.stderr)
    return images, labels


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


def read_archives(dataset, data_dir, split):
    """Read one split of FashionMNIST or MNIST from its archives; fetch them where need be."""
    try:  # only here: it takes seconds to import
        from torchvision import datasets
        from torchvision.datasets.utils import check_integrity
    except (ImportError, RuntimeError) as error:
        raise Error(
            f"torchvision does not work with torch {torch.__version__} ({error}): install a "
            "matching pair with pip install --upgrade --force-reinstall torch torchvision"
        ) from error
    source = getattr(datasets, dataset)
    raw = data_dir / dataset / "raw"
    missing = [
        (name, md5) for name, md5 in source.resources if not check_integrity(raw / name, md5)
    ]
    if missing:
        fetch([*source.mirrors, *SECOND_SOURCES.get(dataset, [])], raw, missing)
    prefix = "train" if split == "train" else "t10k"
    images, labels = (
        bytearray(gzip.decompress((raw / f"{prefix}-{kind}-ubyte.gz").read_bytes()))
        for kind in ("images-idx3", "labels-idx1")
    )
    images = torch.frombuffer(images, dtype=torch.uint8, offset=16).view(-1, 28, 28)
    return images, torch.frombuffer(labels, dtype=torch.uint8, offset=8).long()


def fetch(mirrors, folder, missing):
    """Fetch files into `folder` from the first of `mirrors` that has them.

    Args:
        missing: list of the files' names and md5 sums.

    Raises:
        Unavailable: none of the mirrors has them all.
    """
    from torchvision.datasets.utils import download_url

    name = missing[0][0]
    problem = f"{name} is {'damaged' if (folder / name).exists() else 'missing'}"
    print(f"{problem} in {relative(folder)}", file=sys.stderr)
    reasons, timeout = [], socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)  # torchvision sets none
    try:
        for mirror in mirrors:
            print(f"downloading from {mirror}", file=sys.stderr, flush=True)
            try:
                for name, md5 in missing:  # download_url passes over those that are there by now
                    download_url(mirror + name, folder, name, md5)
                return
            except (OSError, RuntimeError, HTTPException) as error:
                reasons.append(f"{mirror}: {error}")
    finally:
        socket.setdefaulttimeout(timeout)
    raise Unavailable(f"{problem} and cannot be fetched ({'; '.join(reasons)})")


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


# --- Batches --------------------------------------------------------------------------------------

# glibc returns freed blocks to the system, and fetches them again in the next step, a quarter of an
# epoch in all, until it has seen a large one freed: from then on it keeps blocks up to that size.
torch.empty(31 * 2**20, dtype=torch.uint8)


def pixel_statistics(images):
    """Return the mean and the standard deviation of all pixels (uint8), as floats in 0 to 1."""
    share = images.flatten().bincount(minlength=256).double() / images.numel()
    levels = torch.arange(256).double() / 255
    mean = share @ levels
    return mean.item(), (share @ (levels - mean) ** 2).sqrt().item()


def normalise(images, mean, std):
    """Turn images (uint8, N x 32 x 32) into network input (float, N x 1 x 32 x 32)."""
    return images.unsqueeze(1).float().sub_(255 * mean).div_(255 * std)


def batches(images, labels, mean, std, batch_size, mirror=False, shift=0):
    """Yield all images once, in random order, augmented and padded with black to 32x32.

    Order and augmentation come from the random numbers of the CPU: all devices see the same.

    Args:
        images: uint8, N x 28 x 28; labels: int64, N; both on one device, where the work is done.
        mean, std: of the pixels, for `normalise`.
        mirror: whether half of the images are mirrored.
        shift: most pixels by which an image is moved, up or down and to the left or right.

    Yields:
        batch_size (the last time maybe fewer) inputs, float, B x 1 x 32 x 32, and labels, int64, B.
    """
    count = len(labels)
    plan = [torch.randperm(count), torch.rand(count) < (0.5 if mirror else 0.0)]
    plan += torch.randint(2 * shift + 1, (2, count))
    plan = [each.to(images.device).split(batch_size) for each in plan]
    for index, mirrored, top, left in zip(*plan):
        x = images[index]
        x = torch.where(mirrored.view(-1, 1, 1), x.flip(2), x)
        windows = F.pad(x, [2 + shift] * 4).unfold(1, 32, 1).unfold(2, 32, 1)
        x = windows[torch.arange(len(x), device=x.device), top, left]
        yield normalise(x, mean, std), labels[index]


@torch.inference_mode()
def predict(model, images, mean, std, batch_size=1000):
    """Return the logits (float, N x classes) of `model` for images (uint8, N x 28 x 28)."""
    model.eval()
    padded = (F.pad(x, [2] * 4) for x in images.split(batch_size))
    return torch.cat([model(normalise(x, mean, std)) for x in padded])


# --- Checkpoints ----------------------------------------------------------------------------------

FORMAT = 2  # of checkpoints; raise it whenever older code could not read them, newer code can
HISTORY = ("epoch", "lr", "train_loss", "train_accuracy", "val_loss", "val_accuracy")
SIZE_LIMIT = 64 * 2**20  # bytes; a checkpoint has less than 1 MiB, a train split 46 MiB


def write_file(path, data):
    """Write the bytes `data` to `path`: after a crash the file is the old or the new one, whole.

    A link stays one: the file that it names is written.

    Raises:
        Error: the file cannot be written; what was there before is untouched.
    """
    path = Path(os.path.realpath(path))
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise Error(
            f"cannot write {relative(path)}: {error.strerror} (what was there before is untouched)"
        ) from error


def save(obj, path):
    """Write tensors and plain values, nested in dicts and lists, to `path`; see `write_file`."""
    buffer = io.BytesIO()
    torch.save(obj, buffer)
    write_file(path, buffer.getbuffer())


def load(path):
    """Read what `save` wrote, onto the CPU. No code in the file is ever run.

    Raises:
        Error: the file is missing, too large, damaged, or holds more than tensors and plain values.
    """
    path, shown = Path(path), relative(path)
    try:
        if not path.is_file():
            raise Error(f"{shown} {'is no file' if path.exists() else 'does not exist'}")
        if path.stat().st_size > SIZE_LIMIT:
            raise Error(f"{shown} is too large for a file of this project")
        buffer = io.BytesIO(path.read_bytes())
    except OSError as error:
        raise Error(f"cannot read {shown}: {error.strerror}") from error
    try:
        # torch.save writes a zip archive, but torch.load does not verify its CRC-32 sums.
        with zipfile.ZipFile(buffer) as archive:
            size = sum(record.file_size for record in archive.infolist())
            if size > SIZE_LIMIT or archive.testzip():
                raise zipfile.BadZipFile
        buffer.seek(0)
        return torch.load(buffer, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can fail in any way, a hostile one in even more
        raise Error(f"{shown} is damaged, or no file of this project") from error


def load_checkpoint(path):
    """Read a checkpoint: a dict with the keys that `train` in train.py writes.

    Raises:
        Error: as `load`; also if it is no checkpoint, or one from a newer format.
    """
    checkpoint, shown = load(path), relative(path)
    try:
        if checkpoint["format"] > FORMAT:
            raise Error(f"{shown} is of a newer version: update the project")
        if not is_ours(checkpoint):
            raise ValueError("a value that train.py cannot have written")
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise Error(f"{shown} is not a checkpoint of train.py ({error})") from error
    return checkpoint


def is_ours(checkpoint):
    """Tell whether the values of `checkpoint` are such as train.py writes, or raise an error."""
    history = checkpoint["history"]
    return (
        checkpoint["classes"] == CLASSES[checkpoint["dataset"]]
        and 0 <= checkpoint["mean"] <= 1
        and 0 < checkpoint["std"] <= 1
        and 1 <= checkpoint["epoch"] == len(history)
        and all(tuple(row) in (HISTORY, HISTORY[:4]) for row in history)  # the latter with --full
        and all(row["epoch"] == i for i, row in enumerate(history, 1))
        and all(math.isfinite(number) for row in history for number in row.values())
        and isinstance(checkpoint["options"], dict)
    )


def best_epoch(history):
    """Return the row with the highest validation accuracy, the first of equals; else the last."""
    return max(history, key=lambda row: row.get("val_accuracy", row["epoch"]))  # --full has none


def kinds(tensors):
    """Return what must agree before tensors, a dict by name, are copied into others."""
    return {name: (t.shape, t.dtype, t.layout, t.is_meta) for name, t in tensors.items()}


def restore(model, checkpoint, path):
    """Put the weights of `checkpoint`, read from `path`, into `model`.

    Raises:
        Error: names, shapes or types differ from the model's, or a weight is not finite.
    """
    weights, shown = checkpoint["model"], relative(path)
    try:
        wrong = [name for name, _ in kinds(weights).items() ^ kinds(model.state_dict()).items()]
    except (AttributeError, TypeError) as error:
        raise Error(f"{shown} is not a LeNet-5 ({error})") from error
    if wrong:
        raise Error(f"{shown} is not a LeNet-5: {wrong[0]} is missing, unknown or of another shape")
    for name, weight in weights.items():
        if not weight.isfinite().all():
            raise Error(f"{shown} is useless: {name} has values that are not finite")
    model.load_state_dict(weights)


def restore_run(checkpoint, path, model, optimizers):
    """Put everything back as it was when `checkpoint`, read from `path`, was written.

    Raises:
        Error: as `restore`; also if the state of the optimizers or of the random numbers is wrong.
    """
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    try:
        for optimizer, saved in zip(optimizers, checkpoint["optimizers"], strict=True):
            optimizer.step()  # makes a state to compare with; the weights are restored below
            ours = optimizer.state_dict()
            for index in ours["state"] | saved["state"]:
                if kinds(saved["state"][index]) != kinds(ours["state"][index]):
                    raise ValueError("not the state of this optimizer")
            optimizer.load_state_dict({**ours, "state": saved["state"]})  # peak rates stay ours
        torch.set_rng_state(checkpoint["random"])
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise Error(f"{relative(path)} cannot be resumed: its state is wrong") from error
    restore(model, checkpoint, path)


def newest(checkpoint_dir, dataset, name):
    """Return the newest D/`name` below `checkpoint_dir`, D being `dataset` or any.

    Raises:
        Error: there is none.
    """
    names = CLASSES if dataset == "auto" else [dataset]
    paths = [path for each in names if (path := checkpoint_dir / each / name).exists()]
    if not paths:
        run = "run" if dataset == "auto" else f"run on {dataset}"
        raise Error(
            f"there is no {run} in {relative(checkpoint_dir)}: start one with train.py, or name "
            f"with --checkpoint-dir the folder that has D/{name} of a run on data set D"
        )
    return max(paths, key=lambda path: path.stat().st_mtime)


@contextlib.contextmanager
def claim(*folders):
    """Make `folders`, and keep the other runs on this machine out of them in a with statement.

    The system forgets the claim when the process ends, however it does. On Windows, and on file
    systems without locks, the other runs are not noticed.

    Raises:
        Error: another run is at work in one of them, or it cannot be written to.
    """
    with contextlib.ExitStack() as stack:
        for folder in dict.fromkeys(map(relative, folders)):
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise Error(f"cannot make the folder {folder}: {error.strerror}") from error
            if not os.access(folder, os.W_OK | os.X_OK):
                raise Error(f"cannot write into the folder {folder}: choose another one")
            if fcntl is None:
                continue
            try:
                descriptor = os.open(folder, os.O_RDONLY)
                stack.callback(os.close, descriptor)
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise Error(f"another run is at work in {folder}: wait, or name another") from None
            except OSError:  # of a file system without locks
                pass
        yield


# --- Plots ----------------------------------------------------------------------------------------

GREEN, RED, GREY, BLUE, ORANGE = "#1a7f37", "#cf222e", "#57606a", "#0969da", "#bc4c00"


def save_figure(figure, path, dpi=100):
    """Write a matplotlib figure as a PNG file; errors as `write_file`."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    write_file(path, buffer.getbuffer())


def plot_metrics(history, dataset, path):
    """Draw loss and accuracy over the epochs.

    Args:
        history: list of dicts with the keys HISTORY (accuracies from 0 to 1); with --full those of
            the validation split are missing.
        dataset: name for the title.
    """
    best, epochs = best_epoch(history), [row["epoch"] for row in history]
    splits = [("train", "train", ORANGE), ("val", "validation", BLUE)][: 1 + ("val_loss" in best)]
    start = 3 * len(history) // 20  # the first epochs are far from the rest, which one wants to see
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    axes = figure.subplots(1, 2)
    for ax, key, scale, unit in (
        (axes[0], "loss", 1, "Loss (cross-entropy)"),
        (axes[1], "accuracy", 100, "Accuracy (%)"),
    ):
        shown = []
        for split, name, colour in splits:
            values = [scale * row[f"{split}_{key}"] for row in history]
            ax.plot(epochs, values, ".-", color=colour, label=name)
            shown += values[start:]
        if len(splits) == 2:
            value = scale * best[f"val_{key}"]
            label = f"best: epoch {best['epoch']}, {value:.4g}"
            ax.plot(best["epoch"], value, "*", color=GREEN, markersize=15, label=label)
            ax.axvline(best["epoch"], color=GREY, linestyle=":", linewidth=1)
        margin = 0.06 * (max(shown) - min(shown)) or 0.01
        ax.set(ylim=(min(shown) - margin, max(shown) + margin), xlabel="Epoch", ylabel=unit)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        ax.grid(alpha=0.3)
        ax.legend()
    what = "training and validation" if len(splits) == 2 else "training on all images"
    figure.suptitle(f"LeNet-5 on {dataset}: {what}")
    save_figure(figure, path)


def plot_grid(images, captions, title, path, right=None):
    """Draw images in rows, each with its caption, as one picture: 64 axes take a second.

    Args:
        images: uint8, N x H x W, N > 0; eight squares go into a row, or four pairs (W > 2 H).
        captions: N strings of one or two lines.
        right: N bools; captions and frames are green where True, red where False.
    """
    count, height, width = images.shape
    squares = width // height  # in an image
    columns = min(8 // squares, count)
    rows = -(-count // columns)
    step_y, step_x = height * 10 // 7, width * 8 // 7  # below an image are two lines of text
    canvas = np.full((rows * step_y, columns * step_x, 3), 255, dtype=np.uint8)
    inch = 1.6 * squares / step_x
    size = max(inch * canvas.shape[1], 4.8), inch * canvas.shape[0] + 0.7
    figure = Figure(figsize=size)
    ax = figure.add_axes((0, 0, 1, 1 - 0.7 / size[1]))
    for i, (image, caption) in enumerate(zip(images.numpy(), captions)):
        y, x = i // columns * step_y + 1, i % columns * step_x + (step_x - width) // 2
        colour = GREY if right is None else GREEN if right[i] else RED
        frame = [round(255 * part) for part in to_rgb(colour)]
        canvas[y - 1 : y + height + 1, x - 1 : x + width + 1] = frame
        canvas[y : y + height, x : x + width] = image[..., None]
        place = {"x": x + (width - 1) / 2, "y": y + height + 1, "ha": "center", "va": "top"}
        ax.text(**place, s=caption, color=colour, fontsize=9.5, parse_math=False)
    ax.imshow(canvas)
    ax.axis("off")
    figure.suptitle(title, fontsize=16 if count >= 8 else 11, y=1 - 0.2 / size[1])
    save_figure(figure, path)


def plot_confusion(confusion, classes, title, path):
    """Draw a confusion matrix: counts, each row coloured by its share of the true class.

    Args:
        confusion: int64, classes x classes; rows are true, columns predicted.
    """
    share = confusion / confusion.sum(dim=1, keepdim=True).clamp(min=1)
    figure = Figure(figsize=(8.5, 7.6), layout="constrained")
    ax = figure.add_subplot()
    picture = ax.imshow(share.numpy(), cmap="Blues", vmin=0, vmax=1)
    for i, row in enumerate(confusion.tolist()):
        for j, count in enumerate(row):
            colour = "white" if share[i, j] > 0.5 else "black" if count else "#b0b0b0"
            ax.text(j, i, count, ha="center", va="center", color=colour, fontsize=10)
    ticks = range(len(classes))
    ax.set_xticks(ticks, classes, rotation=40 if max(map(len, classes)) > 2 else 0)
    ax.set_yticks(ticks, classes)
    ax.set(xlabel="Predicted class", ylabel="True class")
    figure.colorbar(picture, label="Share of the true class", shrink=0.85)
    ax.set_title(title)
    save_figure(figure, path)


# --- Glyphs: digits drawn on the spot, for machines without a network -----------------------------

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
GLYPHS = {"train": (60_000, 0), "test": (10_000, 1)}  # how many images, and their seed


def draw_glyphs(split):
    """Draw one split of Glyphs: digits in the fonts that matplotlib ships, warped and noisy.

    Each call draws the same images. The fonts of train and test are disjoint.

    Returns:
        images (uint8, N x 28 x 28, bright on black) and labels (int64, N), N as in GLYPHS.
    """
    count, seed = GLYPHS[split]
    outlines = draw_outlines(FONTS[split])
    generator = torch.Generator().manual_seed(seed)

    def uniform(low, high, *shape):
        return torch.rand(shape, generator=generator) * (high - low) + low

    labels = torch.randperm(count, generator=generator) % 10
    images = []
    for digit in labels.split(5000):
        n = len(digit)
        style = torch.randint(len(outlines), (n,), generator=generator)
        x = outlines[style, digit].unsqueeze(1)
        # Turned, slanted and scaled by a random matrix, and moved by up to 3 pixels of 28.
        warp = 1.2 * torch.eye(2) + uniform(-0.3, 0.3, n, 2, 2)
        shift = uniform(-3, 3, n, 2, 1) * 2 / 28  # in units of half an image
        grid = F.affine_grid(torch.cat([warp, shift], dim=2), (n, 1, 28, 28), align_corners=False)
        x = F.grid_sample(x, grid, align_corners=False)

        x = torch.lerp(x, F.avg_pool2d(x, 3, stride=1, padding=1), uniform(0, 1, n, 1, 1, 1))
        x = x * uniform(0.4, 1, n, 1, 1, 1)
        x = x + torch.randn(x.shape, generator=generator) * uniform(0, 0.22, n, 1, 1, 1)
        images.append((x.clamp(0, 1) * 255).round().to(torch.uint8).squeeze(1))
    return torch.cat(images), labels


def draw_outlines(fonts):
    """Draw the ten digits in each font and four stroke weights.

    Returns:
        float, 0 to 1, styles x 10 x 64 x 64.
    """
    directory, outlines = Path(matplotlib.get_data_path()) / "fonts" / "ttf", []
    for name in fonts:
        layout = ImageFont.Layout.BASIC  # the one that every build of Pillow has
        font = ImageFont.truetype(directory / f"{name}.ttf", 60, layout_engine=layout)
        for weight in range(4):
            for digit in DIGITS:
                image = Image.new("L", (64, 64))
                draw = ImageDraw.Draw(image)
                draw.text((32, 32), digit, 255, font, anchor="mm", stroke_width=weight)
                outlines.append(torch.from_numpy(np.array(image)) / 255)
    # Smoothed, so that sampling every other pixel or so leaves no jagged edges.
    return F.avg_pool2d(torch.stack(outlines), 3, stride=1, padding=1).view(-1, 10, 64, 64)
