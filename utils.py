"""What train.py and test.py share.

In this order: names and errors, data sets, batches, checkpoints, plots, and Glyphs, the built-in
data set. Each section can be read alone.
"""

import argparse
import contextlib
import gzip
import hashlib
import io
import itertools
import math
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import zipfile
import zlib
from http.client import HTTPException
from pathlib import Path

# On busy cores OpenMP's threads, which spin while they wait, make a step up to 10 times slower; so
# let them wait in earnest after a while. torch reads this when it is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")
# A notebook's backend is handed down to Pythons that lack it, which then cannot import matplotlib.
backend = os.environ.pop("MPLBACKEND", None)

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw, ImageFont

from model import layer_table, trace

if backend:
    os.environ["MPLBACKEND"] = backend
    with contextlib.suppress(ValueError):
        matplotlib.rcParams["backend"] = backend

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

ROOT = Path(__file__).resolve().parent
DIGITS = [str(digit) for digit in range(10)]
CLOTHES = [
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
]
# All that one must say of a data set: its classes; whether a mirrored image is of the same class;
# by how many pixels its images are moved in training; whether they show pen strokes; how objects
# were fitted into 28x28, with the longer `side`, centred by mass or by their box; and, beside what
# torchvision knows, sources of the archives, and md5 sums of what is in them.
PEN_STROKES = {
    "classes": DIGITS,
    "mirror": False,
    "shift": 1,
    "strokes": True,
    "side": 20,
    "by_mass": False,
}
DATASETS = {
    "FashionMNIST": {
        "classes": CLOTHES,
        "mirror": True,
        "shift": 0,
        "strokes": False,
        "side": 28,
        "by_mass": False,
        "sources": ["https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/"],
        "unpacked": {
            "train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
            "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
            "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
            "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
        },
    },
    "MNIST": {
        **PEN_STROKES,
        "by_mass": True,
        "unpacked": {
            "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
            "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
            "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
            "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
        },
    },
    "Glyphs": PEN_STROKES,
}

# --- Names and errors -----------------------------------------------------------------------------


class Error(Exception):
    """Bad input or bad surroundings; the message is one line that says what to do."""


class Unavailable(Error):
    """There is no such run, or a data set is neither on disk nor can be fetched."""


class Parser(argparse.ArgumentParser):
    """A parser whose help states all defaults; bad options are an `Error`, which is one line."""

    def __init__(self, description):
        super().__init__(description=description, allow_abbrev=False)

    def add_options_of_a_run(self, dataset):
        """Add the options that train.py and test.py share; `dataset` is the help on --dataset."""
        add = self.add_argument
        add("--dataset", choices=("auto", *DATASETS), default="auto", help=dataset)
        add("--name", type=plain_name, help="of the run (default: that of its data set)")
        text = "where the data sets are, or are downloaded to"
        add("--data-dir", type=folder_path, default=ROOT / "data", help=text)
        text = "a run has its files in checkpoints/NAME and images/NAME in here"
        add("--output-dir", type=folder_path, default=ROOT, help=text)
        text = "auto: CUDA or CPU; CUDA_VISIBLE_DEVICES says which GPU"
        add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help=text)

    def add_argument(self, *names, **how):
        """Add an option whose help states its default."""
        if how.get("default") not in (None, argparse.SUPPRESS):
            how["help"] += " (default: %(default)s)"
        return super().add_argument(*names, **how)

    def error(self, message):
        raise Error(f"{message} (see python {self.prog} --help)")


def plain_name(text):
    """An argparse type: the name of a run, which is to be the name of a folder."""
    plain = text.isprintable() and Path(text).name == text and "\\" not in text
    if not plain or text[0] in ".-":
        raise argparse.ArgumentTypeError(f"{text!r} is no plain name, such as relu-1")
    return text


def file_path(text):
    """An argparse type: a path, in which ~ is the user's home."""
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from error


def folder_path(text):
    """An argparse type: the path of a folder, or of one that can be made."""
    path = file_path(text)
    if os.path.lexists(path) and not os.path.isdir(path):  # noqa: PTH112 - that of Path may fail
        raise argparse.ArgumentTypeError(f"{text!r} is no folder")
    return path


def number(kind, low, high=math.inf, above=False):
    """Return an argparse type: an int or float (`kind`) from `low`, or above it, to `high`."""
    what = f"{'a whole number' if kind is int else 'a number'} {'above' if above else 'from'} {low}"
    what += f" to {high}" if high < math.inf else ""
    limit = 2**63 if kind is int else math.inf  # torch has no larger whole numbers

    def parse(text):
        with contextlib.suppress(ArithmeticError, TypeError, ValueError):
            value = kind(text)
            if (low < value if above else low <= value) and value <= high and value < limit:
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}")

    return parse


def run_script(main):
    """Run a script's `main` and exit with its status: 2 after an `Error`, 130 after a signal."""
    if sys.stdout is None:  # closed: the next file to be opened would take its place
        sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115
    with contextlib.suppress(AttributeError):  # a notebook's stdout has other ways
        sys.stdout.reconfigure(errors="backslashreplace")  # names that it cannot show
    before = signal.getsignal(signal.SIGTERM)
    with contextlib.suppress(ValueError):  # only the main thread may
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    status = 128 + 13  # as the shell tells of a broken pipe
    try:
        try:
            with matplotlib.rc_context():  # pictures do not depend on the user's settings
                matplotlib.rcdefaults()
                result = main()
            sys.stdout.flush()
            status = result
        except Error as error:
            status = 2
            message = " ".join(str(error).split())
            print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
        except KeyboardInterrupt as stop:
            status = 130
            print(f"\nStopped: {stop}" if str(stop) else "\nStopped.", file=sys.stderr)
    except BrokenPipeError:  # nobody reads any more, as after | head; nor what is left to write
        for stream in (sys.stdout, sys.stderr):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    with contextlib.suppress(ValueError):
        signal.signal(signal.SIGTERM, before)
    sys.exit(status)


@contextlib.contextmanager
def refuse(path, message, errors=Exception):
    """Turn what goes wrong with the file `path` in a with statement into an `Error`.

    A damaged file can fail in any way, a hostile one in even more.

    Args:
        message: of the `Error`; {path} and {error} in it stand for the file and what was wrong.
    """
    try:
        yield
    except Error:
        raise
    except errors as error:
        reason = getattr(error, "strerror", None) or error
        raise Error(message.format(path=relative(path), error=reason)) from error


@contextlib.contextmanager
def warn(consequence=""):
    """Print an `Error` in a with statement as a warning, and go on after the statement."""
    try:
        yield
    except Error as error:
        print(f"Warning: {error}{consequence}", file=sys.stderr)


def relative(path):
    """Return `path` as one would type it: relative to the current folder where it lies below."""
    path = Path(os.path.realpath(path))
    try:
        return path.relative_to(Path.cwd())
    except (ValueError, FileNotFoundError):  # it lies elsewhere, or the current folder is gone
        return path


def file_of(args, run, name):
    """Return the path of a file of a run: checkpoints are in one folder, the others in another."""
    folder = "checkpoints" if name.endswith(".pt") else "images"
    return args.output_dir / folder / run["name"] / name


def command(script, args, run, *options):
    """Return a command line on `run` that works where it is printed."""
    python = "python" if shutil.which("python") == sys.executable else sys.executable
    line = [python, relative(ROOT / script), *options, "--name", run["name"]]
    if args.data_dir != ROOT / "data":
        line += ["--data-dir", relative(args.data_dir)]
    if args.output_dir != ROOT:
        line += ["--output-dir", relative(args.output_dir)]
    if args.device != "auto":
        line += ["--device", args.device]
    return (subprocess.list2cmdline if os.name == "nt" else shlex.join)(map(str, line))


def choose_device(name):
    """Return the torch.device for auto, cpu, cuda or mps; auto is cuda if there, else cpu.

    Raises:
        Error: the device does not work here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.ones(1, device=name).add(1).item()  # an old GPU is there, but may have no kernels
    except (AssertionError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise Error(f"the device {name} does not work ({reason}): use --device cpu") from error
    return torch.device(name)


def prepare(model, classes, device):
    """Move `model` to `device`, into the memory format in which it is fastest.

    That is channels_last, unless forward does not run in it (`view` does not).

    Raises:
        Error: its output is not N x classes.
    """
    images = torch.zeros(2, 1, 32, 32, device=device)
    model.to(device).eval()
    with torch.no_grad():
        logits = model(images)
        if not isinstance(logits, torch.Tensor) or logits.shape != (2, classes):
            what = getattr(logits, "shape", None)
            what = f"a {type(logits).__name__}" if what is None else f"2 images x {what[1:]}"
            raise Error(f"forward in model.py must return logits, N x {classes}, and not {what}")
        model.to(memory_format=torch.channels_last)
        try:
            model(images)
        except RuntimeError:
            model.to(memory_format=torch.contiguous_format)
    return model


# --- Data sets ------------------------------------------------------------------------------------

TIMEOUT = 8  # seconds that a server may be silent
CACHE_VERSION = 2  # raise it whenever a change makes other images, so that no old cache is used


def load_images(dataset, data_dir, split):
    """Load one split of a data set: from its cache, else from its archives, else by download.

    Args:
        dataset: one of DATASETS.
        data_dir: folder with torchvision's layout, such as FashionMNIST/raw/*.gz.
        split: train (60,000 images) or test (10,000).

    Returns:
        images (uint8, N x 28 x 28, bright on black) and labels (int64, N).

    Raises:
        Unavailable: the data set is neither on disk nor can be fetched.
        Error: torchvision does not work, or reads this data set in another way.
        ValueError: there is no such split.
    """
    if split not in ("train", "test"):
        raise ValueError(f"the splits are train and test, not {split!r}")
    cache = Path(data_dir) / dataset / f"{split}-v{CACHE_VERSION}.pt"
    if os.path.lexists(cache):
        with warn(": making it anew"), refuse(cache, "{path} is damaged"):
            cached = load(cache)
            return cached["images"], cached["labels"]
    if dataset == "Glyphs":
        images, labels = draw_glyphs(split)
    else:
        try:
            images, labels = read_archives(dataset, Path(data_dir), split)
        except OSError as error:
            raise Unavailable(f"cannot use {relative(data_dir)}: {error}") from error
    with warn("; the next start will take as long"):
        save({"images": images, "labels": labels}, cache)
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
    """Read one split of a data set from its archives; fetch those that are missing or damaged."""
    try:  # only here: it takes seconds to import
        from torchvision import datasets
    except (ImportError, RuntimeError) as error:
        raise Error(
            f"torchvision does not work with torch {torch.__version__} ({error}): install a "
            "matching pair with pip install --upgrade --force-reinstall torch torchvision"
        ) from error
    source, entry = getattr(datasets, dataset, object), DATASETS[dataset]
    if not isinstance(vars(source).get("resources"), list):  # EMNIST would get those of MNIST
        raise Error(f"torchvision does not have {dataset} in MNIST's format: it cannot be used")
    raw, unpacked = data_dir / dataset / "raw", entry.get("unpacked", {})
    files = {name: read_archive(raw / name, md5, unpacked) for name, md5 in source.resources}
    missing = [(name, md5) for name, md5 in source.resources if files[name] is None]
    if missing:
        fetch([*source.mirrors, *entry.get("sources", [])], raw, missing)
        files |= {name: read_archive(raw / name, md5, unpacked) for name, md5 in missing}
    prefix = "train" if split == "train" else "t10k"
    images, labels = (
        bytearray(files[f"{prefix}-{kind}-ubyte.gz"]) for kind in ("images-idx3", "labels-idx1")
    )
    sizes = [int.from_bytes(images[i : i + 4], "big") for i in (4, 8, 12)]
    labels = torch.frombuffer(labels, dtype=torch.uint8, offset=8).long()
    if sizes != [len(labels), 28, 28] or labels.max() >= len(entry["classes"]):
        raise Error(
            f"{dataset} has not images of 28x28 pixels, labelled as its classes in utils.py"
        )
    return torch.frombuffer(images, dtype=torch.uint8, offset=16).view(-1, 28, 28), labels


def read_archive(path, md5, unpacked):
    """Return the contents of a .gz file, which may be unpacked or packed anew; None if not whole.

    Args:
        md5: of the .gz file.
        unpacked: md5 sums of contents, by the name without .gz.
    """
    for file in (path, path.with_suffix("")):
        if not file.is_file():
            continue
        data = file.read_bytes()
        known = hashlib.md5(data).hexdigest() == md5
        with contextlib.suppress(EOFError, OSError, zlib.error):
            data = gzip.decompress(data)
        if known or hashlib.md5(data).hexdigest() == unpacked.get(path.stem):
            return data
    return None


def fetch(mirrors, folder, missing):
    """Fetch files into `folder` from the first of `mirrors` that has them.

    Args:
        missing: list of the files' names and md5 sums.

    Raises:
        Unavailable: none of the mirrors has them all.
    """
    from torchvision.datasets.utils import check_integrity, download_url

    name = missing[0][0]
    problem = f"{name} is {'damaged' if (folder / name).exists() else 'missing'}"
    print(f"{problem} in {relative(folder)}", file=sys.stderr)
    reasons, timeout = [], socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)  # torchvision sets none
    try:
        for mirror in mirrors:
            print(f"downloading from {mirror}", file=sys.stderr, flush=True)
            try:
                with tempfile.TemporaryDirectory() as mine:  # other runs may do the same
                    for name, md5 in missing:
                        if not check_integrity(folder / name, md5):  # by now
                            download_url(mirror + name, mine, name, md5)
                            write_file(folder / name, Path(mine, name).read_bytes())
                return
            except (OSError, RuntimeError, HTTPException, Error) as error:
                reasons.append(f"{mirror}: {error}")
    finally:
        socket.setdefaulttimeout(timeout)
    raise Unavailable(
        f"{problem} and cannot be fetched ({'; '.join(reasons)}): put the {len(missing)} .gz files "
        f"into {relative(folder)}"
    )


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


def keep_freed_memory():
    """Let glibc keep the memory of a step for the next one, a quarter of the time of an epoch.

    It gives freed blocks back to the system, and fetches them anew, until it has seen a large one
    freed: from then on it keeps all blocks up to that size.
    """
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


def batches(images, labels, mean, std, batch_size, mirror=False, shift=0, strokes=False):
    """Yield all images once, in random order, augmented and padded with black to 32x32.

    Order and augmentation come from the random numbers of the CPU: all devices see the same.

    Args:
        images: uint8, N x 28 x 28; labels: int64, N; both on one device, where the work is done.
        mean, std: of the pixels, for `normalise`.
        mirror: whether half of the images are mirrored.
        shift: most pixels by which an image is moved, up or down and to the left or right.
        strokes: whether a third of the images, of pen strokes, is thinned and a third thickened.

    Yields:
        batch_size (the last time maybe fewer) inputs, float, B x 1 x 32 x 32, and labels, int64, B.
    """
    count = len(labels)
    order = torch.randperm(count).to(images.device)
    mirrored = torch.rand(count).lt(0.5 if mirror else 0.0).view(-1, 1, 1).to(images.device)
    top, left = torch.randint(2 * shift + 1, (2, count)).to(images.device)
    if strokes:
        share = (torch.randint(-1, 2, (count,)) * torch.rand(count)).to(images.device)
    for start in range(0, count, batch_size):
        part = slice(start, start + batch_size)
        x = images[order[part]]
        x = torch.where(mirrored[part], x.flip(2), x)
        windows = F.pad(x, [2 + shift] * 4).unfold(1, 32, 1).unfold(2, 32, 1)
        x = windows[torch.arange(len(x), device=x.device), top[part], left[part]]
        x = normalise(x, mean, std)
        if strokes:
            x = change_thickness(x, share[part])
        yield x, labels[order[part]]


def change_thickness(x, share):
    """Thicken or thin bright strokes (float, N x 1 x H x W) by up to a pixel on each side.

    Args:
        share: float, N, from -1 to 1. Above 0 the image is blended with the largest of each 3x3
            pixels (dilation), below 0 with the least of them (erosion), which is -max(-x).
    """
    share = share.view(-1, 1, 1, 1)
    extreme = share.sign() * F.max_pool2d(share.sign() * x, 3, stride=1, padding=1)
    return x.lerp(extreme, share.abs())


@torch.no_grad()
def predict(model, images, mean, std, batch_size=1000):
    """Return the logits (float, N x classes) of `model` for images (uint8, N x 28 x 28).

    Padding comes before normalising, as in training: black is then the black of the images.

    Raises:
        ValueError: the images are of another shape or type.
    """
    if images.dtype != torch.uint8 or images.shape[1:] != (28, 28):
        raise ValueError(f"images are to be uint8, N x 28 x 28, not {images.dtype}, {images.shape}")
    model.eval()
    padded = (F.pad(x, [2] * 4) for x in images.split(batch_size))
    return torch.cat([model(normalise(x, mean, std)) for x in padded])


# --- Checkpoints ----------------------------------------------------------------------------------

FORMAT = 3  # of checkpoints; raise it whenever older code could not read them, newer code can
HISTORY = ("epoch", "lr", "train_loss", "train_accuracy", "val_loss", "val_accuracy")
SIZE_LIMIT = 2**30  # bytes; a checkpoint of LeNet-5 has 1 MiB, a train split 46 MiB


def write_file(path, data):
    """Write the bytes `data` to `path`: after a crash the file is the old or the new one, whole.

    A link stays one: the file that it names is written.

    Raises:
        Error: the file cannot be written; what was there before is untouched.
    """
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # others may write this file, too
    message = "cannot write {path}: {error} (what was there before is untouched)"
    with refuse(path, message, OSError):
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
    path = Path(path)
    with refuse(path, "cannot read {path}: {error}"):
        if not path.is_file():
            raise ValueError("it is no file" if path.exists() else "it does not exist")
        if path.stat().st_size > SIZE_LIMIT:
            raise ValueError("it is too large for a file of this project")
        buffer = io.BytesIO(path.read_bytes())
    with refuse(path, "{path} is damaged, or no file of this project"):
        # torch.save writes a zip archive, but torch.load does not verify its CRC-32 sums.
        with zipfile.ZipFile(buffer) as archive:
            size = sum(record.file_size for record in archive.infolist())
            if size > buffer.getbuffer().nbytes or archive.testzip():  # torch does not compress
                raise zipfile.BadZipFile
        buffer.seek(0)
        return torch.load(buffer, map_location="cpu", weights_only=True)


def load_checkpoint(path):
    """Read a checkpoint: a dict, which train.py calls a run, with values as it writes them.

    Raises:
        Error: as `load`; also if it is no checkpoint, or one from a newer format.
    """
    run = load(path)
    with refuse(path, "{path} is not a checkpoint of train.py ({error})"):
        if run["format"] > FORMAT:
            raise Error(f"{relative(path)} is of a newer version: update the project")
        history = run["history"]
        if not (
            run["classes"] == DATASETS[run["dataset"]]["classes"]
            and 0 <= run["mean"] <= 1
            and 0 < run["std"] <= 1
            and 1 <= run["epoch"] == len(history)
            and all(tuple(row) in (HISTORY, HISTORY[:4]) for row in history)  # the latter if --full
            and all(row["epoch"] == i for i, row in enumerate(history, 1))
            and all(math.isfinite(number) for row in history for number in row.values())
            and isinstance(run["options"], dict)
            and all(isinstance(row, dict) for row in run.get("layers", []))
        ):
            raise ValueError("it has a value that train.py cannot have written")
        return run | {"name": plain_name(run.get("name", run["dataset"]))}


def best_epoch(history):
    """Return the row with the highest validation accuracy, the first of equals; else the last."""
    return max(history, key=lambda row: row.get("val_accuracy", row["epoch"]))  # --full has none


def restore(path, run, model, optimizers=()):
    """Put the weights of `run`, read from `path`, into `model`, and its state into `optimizers`.

    With optimizers, the random numbers go on where they were, too.

    Raises:
        Error: the run is of another network than `model`, or its state is not that of a run.
    """
    weights, rows = run["model"], layer_table(trace(model))
    message = (
        "{path} does not fit the network in model.py: {error}; change that back, or train anew"
    )
    with refuse(path, message):
        for theirs, ours in itertools.zip_longest(run.get("layers", rows), rows, fillvalue={}):
            for key in {**ours, **theirs}:
                if theirs.get(key) != ours.get(key):
                    name = ours.get("layer", theirs.get("layer"))
                    raise ValueError(f"{name} has the {key} {ours.get(key)}, not {theirs.get(key)}")
        wrong = [name for name, _ in kinds(weights).items() ^ kinds(model.state_dict()).items()]
        if wrong:
            raise ValueError(f"{wrong[0]} is missing, unknown or of another shape")
        for name, weight in weights.items():
            if not weight.isfinite().all():
                raise ValueError(f"{name} has values that are not finite")
        small = {n: w.half() for n, w in weights.items() if w.is_floating_point()}
        for copy in run.get("copies", []):
            if not 0 <= copy["epoch"] <= run["epoch"] or kinds(copy["weights"]) != kinds(small):
                raise ValueError("its copies of earlier weights are wrong")
    if optimizers:
        with refuse(path, "{path} cannot be resumed: its state is wrong"):
            for optimizer, saved in zip(optimizers, run["optimizers"], strict=True):
                restore_optimizer(optimizer, saved)
            torch.set_rng_state(run["random"])
    model.load_state_dict(weights)


def restore_optimizer(optimizer, saved):
    """Put the state dict `saved` into `optimizer`, if it is such as this one has; else fail."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # makes a state to compare with, and changes the weights
    ours = optimizer.state_dict()
    for index, state in saved["state"].items():
        if kinds(state) != kinds(ours["state"][index]):
            raise ValueError("not the state of this optimizer")
    optimizer.load_state_dict({**ours, "state": saved["state"]})  # peak rates stay ours


def kinds(tensors):
    """Return what must agree before tensors, a dict by name, are copied into others."""
    return {name: (t.shape, t.dtype, t.layout, t.is_meta) for name, t in tensors.items()}


def newest(args, file):
    """Return path and contents of the newest checkpoint `file` among the runs that `args` name.

    Raises:
        Error: there is none.
    """
    folder = args.output_dir / "checkpoints"
    paths = [folder / args.name / file] if args.name else folder.glob(f"*/{file}")
    existing = [path for path in paths if path.exists()]
    for path in sorted(existing, key=lambda path: path.stat().st_mtime, reverse=True):
        run = load_checkpoint(path)
        if args.dataset in ("auto", run["dataset"]):
            run["name"] = path.parent.name  # the folder may have been copied or renamed
            return path, run
    named = f" named {args.name}" if args.name else ""
    named += "" if args.dataset == "auto" else f" on {args.dataset}"
    raise Unavailable(
        f"there is no run{named} in {relative(folder)}: start one with train.py, or name with "
        f"--output-dir the folder that has checkpoints/NAME/{file}"
    )


@contextlib.contextmanager
def claim(*folders):
    """Make `folders`, and keep the other runs on this machine out of them in a with statement.

    The system forgets the claim when the process ends, however it does. On Windows, and on file
    systems without locks, the other runs are not noticed.

    Raises:
        Error: another run is at work in one of them, or it cannot be written to.
    """
    with contextlib.ExitStack() as stack:
        for folder in map(relative, folders):
            message = "cannot write into {path}: {error}; name another folder with --output-dir"
            with refuse(folder, message, OSError):
                folder.mkdir(parents=True, exist_ok=True)
                if not os.access(folder, os.W_OK | os.X_OK):
                    raise PermissionError("it is read-only")
            if fcntl is None:
                continue
            try:
                descriptor = os.open(folder, os.O_RDONLY)
                stack.callback(os.close, descriptor)
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise Error(
                    f"another run is at work in {folder}: wait, or --name this one"
                ) from None
            except OSError:  # of a file system without locks
                continue
            for left in folder.glob("*.*.*.tmp"):  # by a run that was killed while it wrote
                left.unlink(missing_ok=True)
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
