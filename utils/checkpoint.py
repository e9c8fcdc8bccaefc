"""Files that are whole or not there: safe writing, and checkpoints that can be trusted."""

import contextlib
import io
import math
import os
import sys
import zipfile
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

import torch

from utils.cli import CLASSES, DATASETS, Error, relative

FORMAT = 1  # raise it whenever a checkpoint's keys change their meaning
HISTORY = ("epoch", "lr", "train_loss", "train_accuracy", "val_loss", "val_accuracy")
FIELDS = {  # key of a checkpoint -> whether its value is one that train.py can have written
    "model": lambda value: isinstance(value, dict),
    "dataset": lambda value: value in DATASETS,
    "classes": lambda value: value in CLASSES.values(),
    "mean": lambda value: isinstance(value, float) and 0 <= value <= 1,
    "std": lambda value: isinstance(value, float) and 0 < value <= 1,
    "epoch": lambda value: isinstance(value, int) and value > 0,
    "history": lambda value: (
        isinstance(value, list)
        and len(value) > 0
        and all(isinstance(row, dict) and tuple(row) == HISTORY for row in value)
        and all(isinstance(number, int | float) for row in value for number in row.values())
        and all(math.isfinite(number) for row in value for number in row.values())
        and [row["epoch"] for row in value] == list(range(1, len(value) + 1))
    ),
    "options": lambda value: isinstance(value, dict),
    "torch": lambda value: isinstance(value, str),
}
TRAINING_STATE = ("optimizers", "random")  # in last.pt, not in best.pt
OPTIMIZER_STATE = {"Muon": {"momentum"}, "AdamW": {"step", "exp_avg", "exp_avg_sq"}, "SGD": set()}
SIZE_LIMIT = 64 * 2**20  # bytes; ours are below 1 MiB, the larger half of Glyphs is 46 MiB


def write_file(path, data):
    """Write the bytes `data` to `path`: after a crash the file is the old or the new one, whole.

    A link stays one: the file that it names is written.

    Raises:
        Error: the file cannot be written; what was there before is untouched.
    """
    path = Path(os.path.realpath(path))
    temporary = path.with_name(path.name + ".tmp")
    try:
        if path.exists() and not path.is_file():
            raise Error(f"cannot write {relative(path)}: there is something else in its place")
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
    """Write tensors and plain values, nested in dicts and lists, to `path`."""
    buffer = io.BytesIO()
    torch.save(obj, buffer)
    write_file(path, buffer.getvalue())


def load(path):
    """Read what `save` wrote, onto the CPU. No code in the file is ever run.

    Raises:
        Error: the file is missing, too large, damaged, or holds more than tensors and plain values.
    """
    path, shown = Path(path), relative(path)
    try:
        size = path.stat().st_size
        if not path.is_file() or size > SIZE_LIMIT:
            what = f"too large ({size:,} bytes)" if path.is_file() else "no file"
            raise Error(f"{shown} is not one of this project's checkpoints: it is {what}")
        buffer = io.BytesIO(path.read_bytes())
    except FileNotFoundError:
        raise Error(f"{shown} does not exist") from None
    except OSError as error:
        raise Error(f"cannot read {shown}: {error.strerror}") from error
    try:
        # torch.save writes a zip archive, but torch.load does not verify its CRC-32 sums.
        with zipfile.ZipFile(buffer) as archive:
            size = sum(record.file_size for record in archive.infolist())
            intact = size <= SIZE_LIMIT and archive.testzip() is None
        buffer.seek(0)
        obj = torch.load(buffer, map_location="cpu", weights_only=True) if intact else None
    except Exception as error:  # a damaged file can fail in any way, a hostile one in even more
        raise Error(f"{shown} is damaged, or no file of this project") from error
    if not intact:
        raise Error(f"{shown} is damaged: its contents do not match its checksum")
    return obj


def load_checkpoint(path):
    """Read a checkpoint: a dict with the keys that `train.py` wrote.

    Raises:
        Error: as `load`; also if it is no checkpoint, or one from a newer format.
    """
    checkpoint = load(path)
    shown = relative(path)
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("format"), int):
        raise Error(f"{shown} is not a checkpoint of train.py")
    if checkpoint["format"] > FORMAT:
        raise Error(
            f"{shown} has format {checkpoint['format']}, this version reads up to {FORMAT}: "
            "update the project"
        )
    for key, is_right in FIELDS.items():
        if key not in checkpoint or not is_right(checkpoint[key]):
            raise Error(f"{shown} is not a checkpoint of train.py: its {key} is missing or wrong")
    if checkpoint["classes"] != CLASSES[checkpoint["dataset"]]:
        raise Error(f"{shown} is not a checkpoint of train.py: its classes are another data set's")
    if checkpoint["epoch"] != len(checkpoint["history"]):
        raise Error(f"{shown} is not a checkpoint of train.py: its epoch and history disagree")
    return checkpoint


def best_epoch(history):
    """Return the row with the highest validation accuracy, the first one of equals."""
    return max(history, key=lambda row: row["val_accuracy"])


def restore(model, checkpoint, path):
    """Put the weights of `checkpoint`, read from `path`, into `model`.

    Raises:
        Error: names or shapes differ from the model's, or a weight is not finite.
    """
    ours, theirs = model.state_dict(), checkpoint["model"]
    for name in ours | theirs:
        if name not in ours or not isinstance(theirs.get(name), torch.Tensor):
            raise Error(f"{relative(path)} is not a LeNet-5: {name} is missing or unknown")
        want, have = tuple(ours[name].shape), tuple(theirs[name].shape)
        if want != have:
            raise Error(f"{relative(path)} is not a LeNet-5: {name} has shape {have}, not {want}")
        if (theirs[name].layout, theirs[name].dtype) != (torch.strided, ours[name].dtype):
            raise Error(f"{relative(path)} is not a LeNet-5: {name} is a tensor of another kind")
        if theirs[name].is_meta or not theirs[name].isfinite().all():
            raise Error(f"{relative(path)} is useless: {name} has values that are not finite")
    model.load_state_dict(theirs)


def restore_run(checkpoint, path, model, optimizers):
    """Put everything back as it was when `checkpoint`, read from `path`, was written.

    Raises:
        Error: as `restore`; also if the state of the optimizers or of the random numbers is wrong.
    """
    restore(model, checkpoint, path)
    try:
        for optimizer, saved in zip(optimizers, checkpoint["optimizers"], strict=True):
            # The groups hold the rate and the device's settings: those of this run, not that one.
            groups = optimizer.state_dict()["param_groups"]
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            names = OPTIMIZER_STATE[type(optimizer).__name__]
            if saved["state"].keys() != (set(range(len(parameters))) if names else set()):
                raise ValueError("not all parameters have a state")
            for index, state in saved["state"].items():
                shapes = {value.shape for value in state.values() if value.ndim > 0}
                if state.keys() != names or shapes != {parameters[index].shape}:
                    raise ValueError("a state is not the optimizer's")
            optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})
        torch.set_rng_state(checkpoint["random"])
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise Error(f"{relative(path)} cannot be resumed: its state is wrong") from error


def save_best(checkpoint, run_dir):
    """Write best.pt if the last epoch of `checkpoint`, the contents of last.pt, is the best so far.

    After last.pt: if a crash comes between the two, the same call brings best.pt up to date.
    """
    if best_epoch(checkpoint["history"]) is checkpoint["history"][-1]:
        best = {key: value for key, value in checkpoint.items() if key not in TRAINING_STATE}
        save(best, run_dir / "best.pt")


def warn_if_unfinished(path):
    """Say it if a new run is going to overwrite one that could be resumed."""
    if not path.exists():
        return
    try:
        checkpoint = load_checkpoint(path)
    except Error as error:
        print(f"Note: {error}; it is overwritten after the first epoch", file=sys.stderr)
        return
    done, epochs = checkpoint["epoch"], checkpoint["options"].get("epochs", 0)
    if isinstance(epochs, int) and done < epochs:
        print(
            f"Note: the unfinished run in {relative(path.parent)} (epoch {done} of {epochs}) "
            "is overwritten after the first epoch; to go on with it instead: Ctrl-C, then --resume",
            file=sys.stderr,
        )


def newest(checkpoint_dir, dataset, name):
    """Return the newest D/`name` below `checkpoint_dir`, D being `dataset` or any; None if none."""
    names = DATASETS if dataset == "auto" else [dataset]
    paths = [Path(checkpoint_dir) / each / name for each in names]
    return max(filter(os.path.exists, paths), key=os.path.getmtime, default=None)


def make_folder(path):
    """Make the folder `path` where it is missing.

    Raises:
        Error: it cannot be made, or files cannot be written into it.
    """
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Error(f"cannot make the folder {relative(path)}: {error.strerror}") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise Error(f"cannot write into the folder {relative(path)}: choose another one")


@contextlib.contextmanager
def claim(*folders):
    """Keep the other runs on this machine out of `folders` within a with statement.

    The system forgets the claim when the process ends, however it does. Windows and some file
    systems have no such lock: there the other runs are not noticed.

    Raises:
        Error: another run is at work in one of them.
    """
    with contextlib.ExitStack() as stack:
        for folder in dict.fromkeys(map(os.path.realpath, folders)) if fcntl else ():
            try:
                descriptor = os.open(folder, os.O_RDONLY)
                stack.callback(os.close, descriptor)
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise Error(
                    f"another run is at work in {relative(folder)}: wait for its end, or choose "
                    "another folder"
                ) from None
            except OSError:
                pass
        yield
