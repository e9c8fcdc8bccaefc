"""What the tests share: where a run has its files, small runs on Glyphs, scripts in a process."""

import functools
import importlib
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

import train
import utils
from model import LeNet

judge = importlib.import_module("test")  # a plain import is sorted among the standard library
ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("model.py", "train.py", "test.py", "utils.py", "images/lenet5.html")
ARCHIVES = [
    f"{split}-{kind}-ubyte.gz"
    for split in ("train", "t10k")
    for kind in ("images-idx3", "labels-idx1")
]
TINY = ["--dataset=Glyphs", "--limit=300", "--epochs=3"]
SMALL = [*TINY, "--limit=1500", "--epochs=4", "--batch-size=100", "--seed=0"]  # 15 steps an epoch
# A proxy that refuses connections cuts the scripts off on every machine.
OFFLINE = dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9") | {"no_proxy": ""}
OFFLINE |= {"PYTHONUNBUFFERED": "", "PYTHONDONTWRITEBYTECODE": "1"}
posix = pytest.mark.skipif(os.name == "nt", reason="needs POSIX")


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=12, help="how often test_crash.py kills its run")


# --- Where a run has its files, and what is in them -----------------------------------------------


def options(folder, data_dir):
    return [f"--data-dir={data_dir}", f"--output-dir={folder}", "--device=cpu"]


def run_dir(folder, dataset="Glyphs"):
    return folder / "checkpoints" / dataset


def picture_dir(folder, dataset="Glyphs"):
    return folder / "images" / dataset


def load(folder, name):
    return utils.load_checkpoint(run_dir(folder) / name)


def network(checkpoint, path=None):
    """LeNet with the weights of `checkpoint`, checked as the scripts do if it came from `path`."""
    model = LeNet(num_classes=len(checkpoint["classes"]))
    if path:
        utils.restore(path, checkpoint, model)
    else:
        model.load_state_dict(checkpoint["model"])
    return model


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def expect_same_run(one, other):
    """All that a run leaves behind, bit for bit."""
    for name in ("best.pt", "last.pt"):
        assert flatten(load(one, name)) == flatten(load(other, name))
    csvs = [(picture_dir(folder) / "metrics.csv").read_bytes() for folder in (one, other)]
    assert csvs[0] == csvs[1]


def flatten(value):
    """Turn nested dicts, lists and tensors into something that == compares bit for bit."""
    if isinstance(value, dict):
        return {key: flatten(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [flatten(item) for item in value]
    if isinstance(value, torch.Tensor):
        return str(value.dtype), list(value.shape), value.numpy().tobytes()
    return value


def printed_rows(out):
    """The table of the epochs as lists of words, such as ["2/20", "1.39e-02", ..., "77.18%"]."""
    return [line.split() for line in out.splitlines() if re.match(r" *\d+/\d+ ", line)]


def damage(content, how, place=None):
    """Return `content` (bytes) damaged in one of the ways DAMAGE, in the middle or at `place`."""
    flipped = bytearray(content)
    flipped[len(content) // 2 if place is None else place // 8] ^= 1 << (place or 0) % 8
    ways = {"truncated": content[:-1], "flipped bit": bytes(flipped), "empty": b"", "text": b"<p>"}
    return ways[how]


DAMAGE = ["truncated", "flipped bit", "empty", "text"]


def random_images(count):
    generator = torch.Generator().manual_seed(count)
    return torch.randint(256, (count, 28, 28), dtype=torch.uint8, generator=generator)


def look_up(tiles, tile):
    """Tell whether `tile` (H x W) is to be seen somewhere in the array `tiles`."""
    windows = np.lib.stride_tricks.sliding_window_view(tiles, tile.shape)
    return bool((np.abs(windows - tile).max(axis=(2, 3)) < 1e-5).any())


# --- Data and runs --------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def glyphs_dir(tmp_path_factory):
    """A data folder that Glyphs is drawn into once, and that has nothing else."""
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="session")
def few_glyphs(tmp_path_factory, glyphs_dir):
    """A data folder with 600 training and 200 test images of Glyphs."""
    folder = tmp_path_factory.mktemp("few")
    for split, count in (("train", 600), ("test", 200)):
        images, labels = utils.load_images("Glyphs", glyphs_dir, split)
        few = {"images": images[:count], "labels": labels[:count]}
        utils.save(few, folder / "Glyphs" / f"{split}-v{utils.CACHE_VERSION}.pt")
    return folder


@pytest.fixture(scope="session")
def start(glyphs_dir):
    """Run train.py here, with its files in a folder and maybe Ctrl-C in training step `stop_at`."""

    def start(folder, *line, stop_at=None):
        batches, steps = utils.batches, []

        def interrupted(*args, **how):
            for batch in batches(*args, **how):
                steps.append(batch)
                if len(steps) == stop_at:
                    raise KeyboardInterrupt
                yield batch

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(utils, "batches", interrupted)
            try:
                return train.main([*options(folder, glyphs_dir), *line])
            except KeyboardInterrupt as stop:  # as utils.run_script does
                print(f"Stopped: {stop}", file=sys.stderr)
                return 130

    return start


@pytest.fixture(scope="session")
def glyphs_run(tmp_path_factory, start):
    """The folder of a run of 3 epochs on 8,000 digits, with its checkpoints and images."""
    folder = tmp_path_factory.mktemp("run")
    line = ["--limit=8000", "--batch-size=40", "--epochs=3"]
    assert start(folder, "--dataset=Glyphs", *line) == 0
    return folder


@pytest.fixture(scope="session")
def small_run(tmp_path_factory, start):
    """The folder of a small run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("small")
    assert start(folder, *SMALL) == 0
    return folder


@pytest.fixture(scope="session")
def stopped_run(tmp_path_factory, start):
    folder = tmp_path_factory.mktemp("stopped")
    assert start(folder, *SMALL, stop_at=31) == 130
    return folder


@pytest.fixture
def stopped(tmp_path, stopped_run):
    """The folder of the same run, stopped after two of its four epochs; it may be changed."""
    return shutil.copytree(stopped_run, tmp_path / "stopped")


@pytest.fixture(scope="session")
def real_data(tmp_path_factory):
    """A data folder with the real archives of FashionMNIST and MNIST, and nothing else."""
    wanted = [Path(name, "raw", file) for name in ("FashionMNIST", "MNIST") for file in ARCHIVES]
    sources = [ROOT / "data", *map(Path, filter(None, [os.environ.get("LENET_DATA")]))]
    for source in sources:
        if all((source / path).is_file() for path in wanted):
            break
    else:
        pytest.skip("no archives in data/, nor in the folder that LENET_DATA names")
    folder = tmp_path_factory.mktemp("real")
    for path in wanted:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source / path, folder / path)
    return folder


@pytest.fixture
def figures(monkeypatch):
    """The matplotlib figures that are saved, by the name of their file."""
    figures, save = {}, utils.save_figure

    def keep(figure, path, **how):
        figures[path.name] = figure
        save(figure, path, **how)

    monkeypatch.setattr(utils, "save_figure", keep)
    return figures


# --- Scripts --------------------------------------------------------------------------------------


@pytest.fixture
def launch(tmp_path):
    """Start a script, in another folder than its own; what still runs is killed after the test."""
    processes = []

    def start(script, *line, env=os.environ, more=None, cwd=tmp_path, prepare=None):
        how = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE) | {"preexec_fn": prepare}
        line = [sys.executable, script, *line]
        process = subprocess.Popen(
            line, text=True, env=env | OFFLINE | (more or {}), cwd=cwd, **how
        )
        patience = threading.Timer(120, process.kill)  # who reads its output then goes on
        patience.start()
        processes.append((process, patience))
        return process

    yield start
    for process, patience in processes:
        patience.cancel()
        process.kill()
        process.communicate()


def finish(process):
    out, err = process.communicate(timeout=120)
    assert "Traceback" not in err
    return process.returncode, out, err


@pytest.fixture
def checkout(tmp_path):
    """A copy of the scripts, in a path with spaces and umlauts."""
    folder = tmp_path / "Übung 1, größer" / "lenet"
    (folder / "images").mkdir(parents=True)
    for name in SCRIPTS:
        shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture
def run_script(monkeypatch, capsys):
    """Run `main` as its script does; return the exit status, standard output and error."""

    def run(main, *line):
        monkeypatch.setattr(sys, "argv", [f"{main.__module__}.py", *map(str, line)])
        monkeypatch.setattr(signal, "signal", lambda *_: None)
        with pytest.raises((SystemExit, KeyboardInterrupt)) as caught:
            utils.run_script(main)
        return caught.value.code, *capsys.readouterr()

    return run


@pytest.fixture
def refused(run_script):
    """Run `main` as its script does, expect one line and status 2, and return that line."""

    def run(main, *line):
        status, out, err = run_script(main, *line)
        assert (status, out) == (2, ""), err
        assert re.fullmatch(rf"{main.__module__}\.py: error: .*\n", err)
        return err

    return run


def with_ctrl_c():
    """For `prepare`: a background shell ignores Ctrl-C, and its children would inherit that."""
    return functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
