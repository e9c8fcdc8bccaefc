"""The command line of the scripts: their options, errors, exit status. It does without torch."""

import argparse
import errno
import math
import os
import shlex
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DIGITS = [str(digit) for digit in range(10)]
CLASSES = {
    "FashionMNIST": [
        *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
        *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
    ],
    "MNIST": DIGITS,
    "Glyphs": DIGITS,
}
DATASETS = tuple(CLASSES)
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
            self.add_argument(f"--{name}-dir", type=folder, default=default, help=purpose)
        self.add_argument(
            "--device",
            choices=("auto", "cpu", "cuda", "mps"),
            default="auto",
            help="auto: the fastest one that is there",
        )

    def error(self, message):
        raise Error(f"{message} (see python {self.prog} --help)")

    def exit(self, status=0, message=None):
        _flush()
        super().exit(status, message)

    def check(self):
        """Answer --help, and refuse bad options, before torch is imported: that takes seconds.

        From here until `run`, Ctrl-C ends the process without a traceback from the imports.
        """
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        try:
            self.parse_args()
        except Error as error:
            sys.exit(_refuse(error))


def train_parser(recipes):
    """Return the parser of train.py's options; `recipes` (by name) fill in what is left out."""
    parser = Parser("Train LeNet-5 and keep the weights of the best epoch.")
    parser.add_argument(
        "--dataset",
        choices=("auto", *DATASETS),
        default="auto",
        help="auto: FashionMNIST or, if it cannot be had, the built-in Glyphs; "
        "with --resume: the data set of the newest run",
    )
    whole, positive = number(int, 1), number(float, 0, above=True)

    def by_recipe(field):
        return ", ".join(f"{name}: {getattr(recipe, field)}" for name, recipe in recipes.items())

    parser.add_argument(
        "--recipe",
        choices=tuple(recipes),
        default="default",
        help="long: the best results; the others: what each ingredient is worth, see README.md",
    )
    parser.add_argument(
        "--epochs", type=whole, help=f"passes over the train split ({by_recipe('epochs')})"
    )
    parser.add_argument("--batch-size", type=whole, default=128, help="images per step")
    parser.add_argument(
        "--lr", type=positive, help=f"peak of the learning rate ({by_recipe('lr')})"
    )
    parser.add_argument(
        "--weight-decay", type=number(float, 0), help=f"decoupled ({by_recipe('weight_decay')})"
    )
    parser.add_argument(
        "--seed", type=number(int, 0), default=0, help="for the weights and the order"
    )
    parser.add_argument(
        "--limit", type=whole, help="only the first LIMIT images of each split, for a quick look"
    )
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted run")
    parser.add_folders_and_device()
    return parser


def test_parser():
    """Return the parser of test.py's options."""
    parser = Parser("Judge a trained LeNet-5 on the full test set, or on your own pictures.")
    parser.add_argument(
        "--dataset",
        choices=("auto", *DATASETS),
        default="auto",
        help="whose newest weights to take; auto: the newest of all, or else the shipped ones",
    )
    parser.add_argument("--checkpoint", type=Path, help="take the weights in this file instead")
    parser.add_argument(
        "--seed", type=number(int, 0), default=0, help="for the choice of 64 random images"
    )
    parser.add_argument(
        "--image", type=Path, nargs="+", help="classify these pictures instead of the test set"
    )
    parser.add_folders_and_device()
    return parser


def folder(text):
    """An argparse type: the path of a folder, or of one that can be made."""
    if os.path.exists(text) and not os.path.isdir(text):  # noqa: PTH110, PTH112 - never raise
        raise argparse.ArgumentTypeError(f"{text!r} is no folder")
    return Path(text)


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


def run(main):
    """Run a script's `main` and exit with its status.

    An `Error` and a full disk are one line and status 2, a signal is status 130, and a closed pipe
    141.
    """
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, _stop)
    signal.signal(signal.SIGTERM, _stop)
    if sys.stdout is None:  # it was closed
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 - open to the end
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # names that the terminal cannot show
    try:
        status = main()
        sys.stdout.flush()
    except Error as error:
        _flush()
        status = _refuse(error)
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        status = 130
    except BrokenPipeError:  # the reader of the output, such as head, has had enough
        status = 141
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        status = _refuse(f"cannot write the output: {error.strerror}")
    _flush()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback from the clean-up
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sys.exit(status)


def _stop(number, frame):
    """Interrupt the script; the next signal ends the process at once."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    raise KeyboardInterrupt


def _flush():
    """Write out what was printed or, where that is not possible, drop it."""
    try:
        if sys.stdout:  # or else it was closed
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _refuse(error):
    print(f"{Path(sys.argv[0]).name}: error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2


def relative(path):
    """Return `path` as one would type it: relative to the current folder where it lies below."""
    path = Path(os.path.realpath(path))
    try:
        return path.relative_to(Path.cwd())
    except (ValueError, FileNotFoundError):  # it lies elsewhere, or the current folder is gone
        return path


def command(script, args, launcher="python"):
    """Return the command line of `script` with the data set, folders and device of `args`."""
    line = f"{launcher} {script} --dataset {args.dataset}"
    for name, (default, _) in FOLDERS.items():
        folder = getattr(args, f"{name}_dir")
        if folder != default:
            line += f" --{name}-dir {shlex.quote(str(folder))}"
    if args.device != "auto":
        line += f" --device {args.device}"
    return line
