"""What the tests share: small runs on Glyphs, the real archives where they are, the scripts."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train
import utils

ROOT = Path(__file__).resolve().parent.parent
ARCHIVES = [
    f"{split}-{kind}-ubyte.gz"
    for split in ("train", "t10k")
    for kind in ("images-idx3", "labels-idx1")
]
# A proxy that refuses connections: scripts run by the tests are cut off on every machine.
OFFLINE = dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9") | {"no_proxy": ""}
OFFLINE |= {"PYTHONUNBUFFERED": ""}  # as on a user's machine


def interrupt_after(epochs):
    """Return a stand-in for `train.print_epoch` that is Ctrl-C after so many epochs."""

    def print_epoch(history, *_):
        if len(history) == epochs:
            raise KeyboardInterrupt

    return print_epoch


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=25, help="how often test_crash.py kills its run")


def load(tmp_path, name):
    return utils.load_checkpoint(tmp_path / "checkpoints" / "Glyphs" / name)


def expect_same_run(one, other):
    """All that a run leaves behind, bit for bit."""
    for name in ("best.pt", "last.pt"):
        first, second = load(one, name), load(other, name)
        assert flatten(first) == flatten(second)
    csvs = [(folder / "images" / "Glyphs" / "metrics.csv").read_bytes() for folder in (one, other)]
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


def options(folder, glyphs_dir):
    return [
        f"--data-dir={glyphs_dir}",
        f"--checkpoint-dir={folder / 'checkpoints'}",
        f"--image-dir={folder / 'images'}",
        "--device=cpu",
    ]


@pytest.fixture(scope="session")
def glyphs_dir(tmp_path_factory):
    """A data folder that Glyphs is drawn into once, and that has nothing else."""
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="session")
def glyphs_run(tmp_path_factory, glyphs_dir):
    """The folder of a run of 3 epochs on all of Glyphs, with its checkpoints and images."""
    folder = tmp_path_factory.mktemp("run")
    assert train.main(["--dataset=Glyphs", "--epochs=3", *options(folder, glyphs_dir)]) == 0
    return folder


@pytest.fixture(scope="session")
def real_data(tmp_path_factory):
    """A data folder with the real archives of FashionMNIST and MNIST."""
    source = Path(os.environ.get("LENET_DATA", ROOT.parent / "shared" / "data"))
    folder = tmp_path_factory.mktemp("real")
    for dataset in ("FashionMNIST", "MNIST"):
        for name in ARCHIVES:
            archive = source / dataset / "raw" / name
            if not archive.exists():
                pytest.skip(f"{archive} is missing: LENET_DATA names a folder with the archives")
            (folder / dataset / "raw").mkdir(parents=True, exist_ok=True)
            shutil.copy(archive, folder / dataset / "raw")
    return folder


@pytest.fixture
def run_script(tmp_path):
    """Run a script as a user does, from another folder and without a network."""

    def run(script, *options):
        return subprocess.run(
            [sys.executable, ROOT / script, *map(str, options)],
            cwd=tmp_path,
            env=os.environ | OFFLINE,
            capture_output=True,
            text=True,
            timeout=120,
        )

    return run
