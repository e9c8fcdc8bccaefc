"""What the two scripts share on the command line: errors, types of options, the device."""

import argparse
import math
import os
import shlex
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
DATASETS = ("FashionMNIST", "MNIST", "Glyphs")
FOLDERS = {
    "data": (ROOT / "data", "where the data sets are, or are downloaded to"),
    "checkpoint": (ROOT / "checkpoints", "a run on data set D has its checkpoints in D/ in here"),
    "image": (ROOT / "images", "a run on data set D has its pictures in D/ in here"),
}


class Error(Exception):
    """Bad input or bad surroundings; the message is one line that says what to do."""


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default to each option's help, if it has one."""

    def _get_help_string(self, action):
        without = action.default is None or action.default is False  # but 0 is a default
        return action.help if without else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, and whose help states the defaults."""

    def __init__(self, description):
        super().__init__(description=description, formatter_class=HelpFormatter, allow_abbrev=False)

    def add_folders_and_device(self):
        """Add the options that train.py and test.py share."""
        for name, (default, purpose) in FOLDERS.items():
            self.add_argument(f"--{name}-dir", type=Path, default=default, help=purpose)
        self.add_argument(
            "--device",
            choices=("auto", "cpu", "cuda", "mps"),
            default="auto",
            help="auto: the fastest one that is there",
        )

    def error(self, message):
        raise Error(f"{message} (see python {self.prog} --help)")


def run(main):
    """Run a script's `main` and exit with its status; an `Error` is one line and status 2."""
    try:
        sys.exit(main())
    except Error as error:
        sys.stdout.flush()
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of the output, such as head, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


def number(kind, low, above=False):
    """Return an argparse type: a finite int or float (`kind`), at least `low` or above it."""
    high = 2**63 - 1 if kind is int else sys.float_info.max
    if kind is int:
        expected = f"a whole number from {low} to {high}"
    else:
        expected = f"a number {'above' if above else 'of at least'} {low}"

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or (above and value == low):
            raise argparse.ArgumentTypeError(f"{text!r} is not {expected}")
        return value

    return parse


def choose_device(name):
    """Return the torch.device for auto, cpu, cuda or mps; auto takes the fastest there is.

    Raises:
        Error: this machine or this build of torch has no such device.
    """
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        name = next(device for device, there in available.items() if there)
    if not available[name]:
        raise Error(f"--device {name} is not available here: use --device auto")
    return torch.device(name)


def relative(path):
    """Return `path` as one would type it: relative to the current folder where it lies below."""
    path = Path(path).resolve()
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def command(script, args):
    """Return the command line of `script` for the data set and the folders that `args` name."""
    line = f"python {script} --dataset {args.dataset}"
    for name, (default, _) in FOLDERS.items():
        folder = getattr(args, f"{name}_dir")
        if folder != default:
            line += f" --{name}-dir {shlex.quote(str(folder))}"
    return line
