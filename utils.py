"""Code shared by train.py and test.py: the command line, datasets, batches and checkpoints."""

import argparse
import ast
import builtins
import contextlib
import difflib
import errno
import gc
import inspect
import io
import os
import re
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import zipfile
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

# Waiting OpenMP threads spin. On busy cores this makes a step ten times slower, so let them sleep
# sooner. The variable is read when torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")
gc.disable()  # its passes over the objects of torch would take a third of the start

import torch
import torch.nn.functional as F
from filelock import FileLock, Timeout

from images.glyphs import draw_glyphs

gc.enable()
if not hasattr(builtins, "get_ipython"):  # another %run would freeze the notebook's garbage
    gc.freeze()  # later passes, such as those at exit, skip these objects, too

ROOT = Path(__file__).resolve().parent


# --- Errors and the command line ------------------------------------------------------------------


class Error(Exception):
    """Bad input or a broken environment. The message is one line, if possible with advice."""


class Unavailable(Error):
    """The run does not exist, or the dataset is neither on disk nor downloadable."""


@contextlib.contextmanager
def errors_as(message, *types):
    """Turn exceptions of these types, raised in a with block, into an `Error`.

    Args:
        message: text of the `Error`; REASON is replaced by the message of the exception.
    """
    try:
        yield
    except types as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise Error(message.replace("REASON", reason)) from error


class Parser(argparse.ArgumentParser):
    """An argument parser whose help states every default and whose errors are of type `Error`."""

    def __init__(self, description):
        super().__init__(description=description, allow_abbrev=False)

    def add_argument(self, *names, **kwargs):
        if kwargs.get("default") not in (None, argparse.SUPPRESS):
            kwargs["help"] += " (default: %(default)s)"
        return super().add_argument(*names, **kwargs)

    def add_shared_options(self):
        """Add the options that train.py and test.py have in common."""
        add = self.add_argument
        add("--name", type=run_name, help="name of the run (default for a new run: its dataset)")
        add("--data-dir", type=expand_path, default=ROOT / "data", help="directory of the datasets")
        text = "parent directory of the results, checkpoints/NAME and images/NAME"
        add("--output-dir", type=expand_path, default=ROOT, help=text)
        text = "auto: CUDA if available, else CPU; choose a GPU with CUDA_VISIBLE_DEVICES"
        add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help=text)

    def error(self, message):
        raise Error(f"{message} (see python {self.prog} --help)")


def number_type(kind, low, high=2**32 - 1):
    """Return an argparse type: an int or float (`kind`) between `low` and `high`."""

    def parse(text):
        value = kind(text)
        if not low <= value <= high:  # NaN is not between them either
            raise argparse.ArgumentTypeError(f"must be from {low} to {high}, not {text}")
        return value

    parse.__name__ = kind.__name__  # appears in argparse's message for text that is not a number
    return parse


def expand_path(text):
    """Convert an argument to a path, and expand ~."""
    with errors_as(f"{text}: REASON", RuntimeError):  # the home directory is unknown
        return Path(text).expanduser()


def run_name(text):
    """Check the name of a run, which becomes the name of a directory, and return it.

    "page" is not allowed: images/page is reserved for the sources of the page.
    """
    if not re.fullmatch(r"[^\W_][\w .,=+-]{,200}", text) or text == "page":
        raise argparse.ArgumentTypeError(f"{text!r} cannot be a run name; use one such as relu-1")
    return text


def run_script(main):
    """Run `main`. Exit status: 0, 2 (error), 130 (Ctrl-C or SIGTERM) or 141 (broken pipe)."""
    if sys.stdout is None:  # standard output is closed
        sys.stdout = Path(os.devnull).open("w")
    if hasattr(sys.stdout, "reconfigure"):  # not in notebooks
        sys.stdout.reconfigure(errors="backslashreplace")  # for file names it cannot encode
    try:
        previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    except ValueError:  # not in the main thread
        previous = None
    status = 0
    try:
        try:
            main()
        except (Error, OSError) as error:
            if isinstance(error, BrokenPipeError):
                raise
            status = 2
            print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        except KeyboardInterrupt as stop:
            status = 130
            print(f"\nStopped. {stop}".rstrip(), file=sys.stderr)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as head, has exited: drop the rest
        status = status or 128 + 13  # what a shell reports
        for stream in (sys.stdout, sys.stderr):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    finally:
        if previous is not None:
            signal.signal(signal.SIGTERM, previous)
    sys.exit(status)


def forget_modules(result):
    """Forget our modules, so that the next %run of a script in ROOT or ROOT/* sees edited files."""
    ipython.events.unregister("post_run_cell", forget_modules)
    for name in list(sys.modules):
        if name in ("model", "train", "test", "utils") or name.split(".")[0] == "images":
            del sys.modules[name]


if hasattr(builtins, "get_ipython") and ROOT in Path(sys.argv[0]).resolve().parents[:2]:  # in %run
    ipython = builtins.get_ipython()
    ipython.events.register("post_run_cell", forget_modules)


def shown(path):
    """Return `path` for display: relative if it is inside the working directory."""
    path = Path(path).absolute()
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def output_path(args, run, name):
    """Return the path of a file of `run`: in checkpoints/NAME (.pt) or in images/NAME (others)."""
    directory = "checkpoints" if name.endswith(".pt") else "images"
    return args.output_dir / directory / run["name"] / name


def shell_command(script, args, run, *options):
    """Return a shell command for `run` that works in the current directory."""
    python = "python" if shutil.which("python") == sys.executable else sys.executable
    words = [python, shown(ROOT / script), *options, "--name", run["name"]]
    if args.output_dir != ROOT:
        words += ["--output-dir", shown(args.output_dir)]
    if args.data_dir != ROOT / "data":
        words += ["--data-dir", shown(args.data_dir)]
    if args.device != "auto":
        words += ["--device", args.device]
    join = subprocess.list2cmdline if os.name == "nt" else shlex.join
    return join([str(word) for word in words])


@contextlib.contextmanager
def locked(args, run):
    """Create the checkpoint directory of `run`, and lock it during a with block.

    Raises:
        Error: another run is using it, or it is not writable.
    """
    directory = output_path(args, run, "best.pt").parent
    pictures = output_path(args, run, "metrics.png").parent
    message = f"cannot write to {shown(directory)}: REASON; choose another --output-dir"
    with errors_as(message, OSError):
        directory.mkdir(parents=True, exist_ok=True)
        with errors_as(f"another run is using {shown(directory)}: choose another --name", Timeout):
            lock = file_lock(directory, timeout=0)
        for leftover in [*directory.glob("*.tmp"), *pictures.glob("*.tmp")]:  # of a killed run
            leftover.unlink(missing_ok=True)
    with lock:
        yield


def file_lock(directory, timeout=-1):
    """Lock `directory`, or print a warning if its file system does not support locks.

    Wait up to `timeout` seconds (-1: forever). Return a context manager that releases the lock; if
    the process ends first, the operating system releases it.

    Raises:
        filelock.Timeout: another process still holds the lock.
    """
    try:
        return FileLock(directory / ".lock").acquire(timeout)
    except OSError as error:
        if error.errno != errno.ENOLCK:
            raise
        print(f"Warning: {shown(directory)} cannot be locked", file=sys.stderr)
        return contextlib.nullcontext()


# --- Datasets -------------------------------------------------------------------------------------

DIGITS = list("0123456789")
CLOTHES = "T-shirt/top,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Ankle boot".split(",")
FASHION_MIRROR = "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/"


@dataclass
class DatasetInfo:
    """Properties of a dataset; the defaults suit digits."""

    classes: list
    flip: bool = False  # augmentation: flip half of the images horizontally
    shift: int = 1  # augmentation: largest shift, in pixels
    strokes: bool = True  # augmentation: vary the width of pen strokes
    object_size: int = 20  # your own pictures: longer side of the object, out of 28 pixels
    centered_by_mass: bool = False  # your own pictures; otherwise by bounding box
    mirrors: tuple = ()  # download addresses in addition to those of torchvision


DATASETS = {  # to add a torchvision dataset in MNIST format, such as KMNIST, add a line
    "FashionMNIST": DatasetInfo(
        CLOTHES, flip=True, shift=0, strokes=False, object_size=28, mirrors=(FASHION_MIRROR,)
    ),
    "MNIST": DatasetInfo(DIGITS, centered_by_mass=True),
    "Glyphs": DatasetInfo(DIGITS),
}
TIMEOUT = 8  # seconds to wait for a mirror; torchvision would wait forever
CACHE_VERSION = 2  # increase it when the images change, so that old caches are not used


def load_images(dataset, data_dir, split):
    """Load one split from its cache, or else read it (Glyphs: draw it), and cache it.

    Args:
        dataset: a key of DATASETS.
        data_dir: root of the datasets, as in torchvision; contains FashionMNIST/raw/*.gz.
        split: "train" (60,000 images) or "test" (10,000).

    Returns:
        images (uint8, N x 28 x 28, bright on black) and labels (int64, N).

    Raises:
        Unavailable: the dataset is neither on disk nor downloadable.
        Error: its files are damaged, or torchvision does not work.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split must be train or test, not {split!r}")
    cache = Path(data_dir) / dataset / f"{split}-v{CACHE_VERSION}.pt"
    if cache.exists():
        try:
            cached = load(cache)
            with errors_as(f"{shown(cache)} is damaged", KeyError, TypeError):
                return cached["images"], cached["labels"]
        except Error as error:
            print(f"Warning: {error}; creating {shown(cache)} again", file=sys.stderr)
    if dataset == "Glyphs":
        images, labels = draw_glyphs(split)
    else:
        images, labels = read_with_torchvision(dataset, Path(data_dir), split == "train")
    try:
        save({"images": images, "labels": labels}, cache)
    except Error as error:
        print(f"Warning: {error}; the next start will be slow, too", file=sys.stderr)
    return images, labels


def load_training_images(dataset, data_dir):
    """Return the dataset's name and its train split; "auto" means FashionMNIST or else Glyphs."""
    if dataset != "auto":
        return dataset, *load_images(dataset, data_dir, "train")
    try:
        return "FashionMNIST", *load_images("FashionMNIST", data_dir, "train")
    except Unavailable as error:
        text = "TRAINING ON GLYPHS INSTEAD: digits drawn with the fonts included in matplotlib.\n"
        text += "The accuracy will say nothing about FashionMNIST."
        line = "!" * 100
        print(f"{line}\n{error}.\n\n{text}\n{line}", file=sys.stderr)
    return "Glyphs", *load_images("Glyphs", data_dir, "train")


def read_with_torchvision(dataset, data_dir, train):
    """Read one split with torchvision, which unpacks or downloads missing files."""
    message = f"torchvision does not work with torch {torch.__version__} (REASON): install "
    message += "matching versions with pip install --upgrade --force-reinstall torch torchvision"
    with errors_as(message, ImportError, RuntimeError):
        from torchvision import datasets  # only here, because it takes seconds
    dataset_class = getattr(datasets, dataset)
    try:
        return read_split(dataset_class, data_dir, train)
    except RuntimeError:  # unpacked files are missing or too short
        return download_split(dataset_class, data_dir, train)


def download_split(dataset_class, data_dir, train):
    """Unpack archives or download them from the first working mirror, then read one split."""
    name, mirrors = dataset_class.__name__, dataset_class.mirrors
    raw = data_dir / name / "raw"
    old_files = set(raw.glob("*-ubyte*"))
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        raw.mkdir(parents=True, exist_ok=True)
        with file_lock(raw.parent):  # one process downloads, the others wait
            for mirror in [*mirrors, *DATASETS[name].mirrors]:
                dataset_class.mirrors = [mirror]  # torchvision's own loop stops at a timeout
                try:
                    return read_split(dataset_class, data_dir, train, download=True)
                except (OSError, RuntimeError, HTTPException) as error:
                    reason = " ".join(str(error).split())
            for new_file in set(raw.glob("*-ubyte*")) - old_files:
                new_file.unlink()
    except OSError as error:  # the directory is not writable
        reason = str(error)
    finally:
        socket.setdefaulttimeout(timeout)
        dataset_class.mirrors = mirrors
    text = f"and cannot be downloaded ({reason}): put its four .gz files into {shown(raw)}"
    if old_files:
        raise Error(f"{name} is incomplete or damaged {text}, and delete all other files there")
    raise Unavailable(f"{name} is missing {text}")


def read_split(dataset_class, data_dir, train, download=False):
    """Return images (uint8, N x 28 x 28) and labels (int64, N) of a torchvision dataset."""
    name = dataset_class.__name__
    directory = shown(data_dir / name)
    message = f"the files in {directory} are damaged: delete this directory"
    with errors_as(message, AssertionError, KeyError, TypeError, ValueError):
        data = dataset_class(data_dir, train=train, download=download)
    count, num_classes = len(data.targets), len(DATASETS[name].classes)
    if data.data.shape != (count, 28, 28) or data.targets.max() >= num_classes:
        message = f"{name} in {directory} does not consist of 28x28 images of {num_classes} classes"
        raise Error(f"{message}: delete the directory if it is damaged, or correct DATASETS")
    return data.data, data.targets


def split_train_validation(images, labels, per_class=500):
    """Split off a validation set: evenly spaced images of each class, the same for every seed.

    Returns:
        (images, labels) of the training set and (images, labels) of the validation set.
    """
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        members = (labels == label).nonzero().squeeze(1)
        count = min(per_class, len(members) // 2)
        chosen[members[torch.arange(count) * len(members) // max(count, 1)]] = True
    return (images[~chosen], labels[~chosen]), (images[chosen], labels[chosen])


# --- Batches --------------------------------------------------------------------------------------


def mean_and_std(images):
    """Return the mean and standard deviation of all pixels (uint8), scaled to 0..1."""
    fractions = images.flatten().bincount(minlength=256).double() / images.numel()
    levels = torch.arange(256).double() / 255
    mean = fractions @ levels
    return mean.item(), (fractions @ (levels - mean) ** 2).sqrt().item()


def normalize(images, mean, std):
    """Turn images (uint8, N x 32 x 32) into network input (float, N x 1 x 32 x 32)."""
    return torch.sub(images.unsqueeze(1), 255 * mean).div_(255 * std)


def batch_slices(count, batch_size):
    """Divide the indices 0 to `count` - 1 into slices of `batch_size`; the last may be smaller.

    A last batch of one image joins the one before: batch norm may need at least two.
    """
    starts = list(range(0, count, batch_size))
    if count % batch_size == 1 and len(starts) > 1:
        starts.pop()
    return [slice(start, end) for start, end in zip(starts, [*starts[1:], count])]


def batches(images, labels, mean, std, batch_size, flip=False, shift=0, strokes=False):
    """Yield all images once, in random order, augmented and padded with black to 32x32.

    All random numbers are drawn on the CPU, so that every device sees the same batches.

    Args:
        images: uint8, N x 28 x 28; labels: int64, N; both on the device of the network.
        mean, std: of the pixels, for `normalize`.
        flip: flip each image horizontally with probability 0.5.
        shift: move images by up to this many pixels, vertically and horizontally.
        strokes: thin the strokes of a third of the images, and thicken those of another third.

    Yields:
        inputs (float, B x 1 x 32 x 32) and labels (int64, B).
    """
    count = len(labels)
    order = torch.randperm(count).to(images.device)
    flipped = torch.rand(count).lt(0.5 if flip else 0.0).view(-1, 1, 1).to(images.device)
    top, left = torch.randint(2 * shift + 1, (2, count)).to(images.device)
    if strokes:
        amount = (torch.randint(-1, 2, (count,)) * torch.rand(count)).to(images.device)
    for batch in batch_slices(count, batch_size):
        x = images[order[batch]]
        x = torch.where(flipped[batch], x.flip(2), x)
        windows = F.pad(x, [2 + shift] * 4).unfold(1, 32, 1).unfold(2, 32, 1)
        x = windows[torch.arange(len(x), device=x.device), top[batch], left[batch]]
        x = normalize(x, mean, std)
        if strokes:
            x = vary_stroke_width(x, amount[batch])
        yield x, labels[order[batch]]


def vary_stroke_width(x, amount):
    """Thicken or thin bright strokes (float, N x 1 x H x W) by up to a pixel on each side.

    Args:
        amount: float, N, from -1 to 1: positive values blend toward the 3x3 maximum (dilation),
            negative ones toward the 3x3 minimum, -max(-x) (erosion).
    """
    amount = amount.view(-1, 1, 1, 1)
    extreme = amount.sign() * F.max_pool2d(amount.sign() * x, 3, stride=1, padding=1)
    return x.lerp(extreme, amount.abs())


@torch.no_grad()
def predict(model, images, mean, std, batch_size=250):
    """Return the logits (float, N x classes) of `model` for images (uint8, N x 28 x 28).

    Raises:
        ValueError: the images have the wrong dtype or shape.
    """
    if images.dtype != torch.uint8 or images.shape[1:] != (28, 28):
        found = f"{type(images).__name__} of {images.dtype}, {tuple(images.shape)}"
        raise ValueError(f"images must be a uint8 tensor, N x 28 x 28, not a {found}")
    model.eval()
    padded = (F.pad(x, [2] * 4) for x in images.split(batch_size))
    return torch.cat([model(normalize(x, mean, std)) for x in padded])


def probabilities(outputs):
    """Return class probabilities (N x classes): the softmax, unless forward already applied it."""
    sums = outputs.sum(dim=1)
    if (outputs >= 0).all() and torch.allclose(sums, torch.ones_like(sums), atol=1e-4):
        return outputs
    return outputs.softmax(dim=1)


def confusion_matrix(labels, predicted, num_classes):
    """Count how often each true class (row) was predicted as each class (column); int64."""
    pairs = labels * num_classes + predicted
    return pairs.bincount(minlength=num_classes**2).view(num_classes, num_classes)


# --- Devices --------------------------------------------------------------------------------------


def choose_device(name):
    """Return the torch.device named auto, cpu, cuda or mps.

    Raises:
        Error: the device is missing or not supported.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.ones(1, device=name).add(1).item()  # a GPU may be present but unsupported
    except (AssertionError, RuntimeError) as error:
        reason = textwrap.shorten(str(error), 100)
        raise Error(f"device {name} does not work ({reason}): use --device cpu") from error
    return torch.device(name)


@torch.no_grad()
def to_device(model, num_classes, device):
    """Move `model` to `device`, and to channels_last, which is faster, if forward supports it.

    Raises:
        Error: forward does not return logits, N x num_classes.
    """
    images = torch.zeros(2, 1, 32, 32, device=device)
    logits = model.to(device).eval()(images)
    if getattr(logits, "shape", None) != (2, num_classes):
        raise Error(f"forward in model.py must return one tensor of logits, N x {num_classes}")
    try:
        model.to(memory_format=torch.channels_last)(images)  # Tensor.view can fail
    except RuntimeError:
        model.to(memory_format=torch.contiguous_format)
    return model


# --- Checkpoints ----------------------------------------------------------------------------------

CHECKPOINT_VERSION = 4
METRICS = ("epoch", "lr", "train_loss", "train_accuracy", "val_loss", "val_accuracy")


def write_file(path, data):
    """Write the bytes `data` to `path` atomically: a crash leaves the old file or the new one.

    Raises:
        Error: the file cannot be written; the old one is untouched.
    """
    path = Path(os.path.realpath(path))  # write to the target of a link
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    with errors_as(f"cannot write {shown(path)}: REASON", OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def save(obj, path):
    """Write tensors and plain values, nested in dicts and lists, to `path` atomically."""
    buffer = io.BytesIO()
    torch.save(obj, buffer)
    write_file(path, buffer.getbuffer())


def load(path):
    """Read a file that `save` wrote; tensors are on the CPU. Code in the file is never executed.

    Raises:
        Error: the file is missing, damaged, or contains other objects.
    """
    with errors_as(f"cannot read {shown(path)}: REASON", OSError):
        data = io.BytesIO(Path(path).read_bytes())
    message = f"{shown(path)} is damaged, or was not written by this project"
    with errors_as(message, Exception):  # torch.load raises many types
        if zipfile.ZipFile(data).testzip():  # torch.load does not verify the checksums
            raise zipfile.BadZipFile
        data.seek(0)
        return torch.load(data, map_location="cpu", weights_only=True)


def load_checkpoint(path):
    """Read a checkpoint: a dict, called a run, with these keys.

    model: weights, as a state dict; epoch: number of epochs trained
    snapshots: weights after some epochs, for lenet5.html
    history: one row of METRICS per epoch
    name, dataset, options: settings of train.py
    counts: numbers of training and validation images; mean, std: of the training pixels
    logits: output for `fixed_image`, to detect a changed network; code: source of the class
    optimizers, rng_state: states needed to resume; not in the pretrained files
    version: CHECKPOINT_VERSION

    Raises:
        Error: as `load`; also if the file is not a checkpoint of this version.
    """
    run = load(path)
    if not isinstance(run, dict) or run.get("version") != CHECKPOINT_VERSION:
        advice = "train again, or use the version that wrote it"
        raise Error(f"{shown(path)} is not a checkpoint of this version of train.py: {advice}")
    if run["dataset"] not in DATASETS:
        raise Error(f"{shown(path)} was trained on {run['dataset']}, which is not in DATASETS")
    with errors_as(f"{shown(path)} has an invalid run name: REASON", argparse.ArgumentTypeError):
        run_name(run["name"])  # outputs go to a directory of this name
    return run


def newest_checkpoint(args, resume=False):
    """Return the path and contents of best.pt of the newest run that --name and --dataset select.

    With `resume`, return last.pt instead if it continues best.pt. If the run was killed between
    writing the two, last.pt is missing, one epoch behind, or from an older run.

    Raises:
        Unavailable: no run matches.
        Error: the run cannot be read. With neither --name nor `resume`, it is skipped.
    """

    def modified(best):
        return max(file.stat().st_mtime for file in best.parent.glob("*.pt"))

    directory = args.output_dir / "checkpoints"
    paths = [directory / args.name / "best.pt"] if args.name else directory.glob("*/best.pt")
    for path in sorted([p for p in paths if p.exists()], key=modified, reverse=True):
        last = path.with_name("last.pt")
        try:
            run = load_checkpoint(path)
            if resume and last.exists():
                last_run = load_checkpoint(last)
                if last_run["history"][: run["epoch"]] == run["history"]:
                    path, run = last, last_run
        except Error as error:
            if args.name or resume:
                raise
            print(f"Warning: {error}; skipping it", file=sys.stderr)
            continue
        if args.dataset in ("auto", run["dataset"]):
            return path, run | {"name": path.parent.name}  # the directory may have been renamed
    wanted = f" named {args.name}" if args.name else ""
    wanted += "" if args.dataset == "auto" else f" on {args.dataset}"
    raise Unavailable(f"there is no run{wanted} in {shown(directory)}: start one with train.py")


def best_row(history):
    """Return the row with the highest validation accuracy, or the last row with --full."""
    if "val_accuracy" not in history[-1]:
        return history[-1]
    return max(history, key=lambda row: row["val_accuracy"])  # the earliest on ties


def fixed_image():
    """Return a synthetic image with varied contents, a wave pattern (float, 1 x 1 x 32 x 32)."""
    return torch.linspace(0, 30, 1024).sin().view(1, 1, 32, 32)


@torch.no_grad()
def fixed_image_logits(model):
    """Compute the logits of `model` for `fixed_image` on the CPU, in evaluation mode."""
    device = next(model.parameters()).device
    logits = model.eval().cpu()(fixed_image())  # devices round differently
    model.to(device)
    return logits


def same_logits(logits, expected):
    """Compare logits with a tolerance for rounding. NaN and infinity never match."""
    return bool((logits - expected).abs().max() <= 1e-3 * expected.abs().max() < float("inf"))


def source_code(model):
    """Return the source code of the class of `model`, or "" if it is not available."""
    try:
        return inspect.getsource(type(model))
    except (OSError, SyntaxError, TypeError):
        return ""


def code_lines(code):
    """Return the lines of a class without indentation, docstrings, comments or blank lines."""
    try:
        tree = ast.parse(textwrap.dedent(code))
    except SyntaxError:  # saved by a newer Python
        return []
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):  # a docstring
            node.value.value = None
    lines = [line.strip() for line in ast.unparse(tree).splitlines()]
    return [line for line in lines if line not in ("", "None")]


def first_change(old, new):
    """Describe the first place where two versions of a class differ, or return ""."""
    old, new = code_lines(old), code_lines(new)
    for tag, i, j, k, m in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if tag != "equal" and old and new:  # both are available
            texts = [textwrap.shorten(" ".join(lines), 100) for lines in (old[i:j], new[k:m])]
            removed, added = [f"`{text}`" if text else "nothing" for text in texts]
            return f"its class has {removed} where model.py has {added}"
    return ""


def load_weights(path, run, model):
    """Copy the weights of `run`, read from `path`, into `model`.

    Raises:
        Error: `run` trained a different network than the one in model.py.
    """
    try:
        model.load_state_dict(run["model"])
    except RuntimeError as error:  # names or shapes differ
        reason = str(error).splitlines()[1].strip()
    else:
        if same_logits(fixed_image_logits(model), run["logits"]):
            return
        reason = "its logits for a fixed image differ"
    reason = first_change(run["code"], source_code(model)) or reason
    raise Error(f"{shown(path)} was trained with a different network: {reason}")
