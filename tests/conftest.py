"""What the tests share: small runs on Glyphs, and the real archives where they are."""

import importlib
import os
import shutil
from pathlib import Path

import pytest
import torch

import train
import utils
from model import LeNet

judge = importlib.import_module("test")  # a plain import is sorted among the standard library
ROOT = Path(__file__).resolve().parent.parent
ARCHIVES = [
    f"{split}-{kind}-ubyte.gz"
    for split in ("train", "t10k")
    for kind in ("images-idx3", "labels-idx1")
]


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=12, help="how often test_crash.py kills its run")


def load(folder, name):
    return utils.load_checkpoint(folder / "checkpoints" / "Glyphs" / name)


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def expect_same_run(one, other):
    """All that a run leaves behind, bit for bit."""
    for name in ("best.pt", "last.pt"):
        assert flatten(load(one, name)) == flatten(load(other, name))
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


def options(folder, data_dir):
    return [
        f"--data-dir={data_dir}",
        f"--checkpoint-dir={folder / 'checkpoints'}",
        f"--image-dir={folder / 'images'}",
        "--device=cpu",
    ]


@pytest.fixture(scope="session")
def glyphs_dir(tmp_path_factory):
    """A data folder that Glyphs is drawn into once, and that has nothing else."""
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="session")
def start(glyphs_dir):
    """Run train.py here, with its files in a folder and maybe Ctrl-C in training step `stop_at`."""

    def start(folder, *line, stop_at=None):
        forward, steps = LeNet.forward, []

        def interrupted(model, x):
            steps.append(model.training)
            if sum(steps) == stop_at:
                raise KeyboardInterrupt
            return forward(model, x)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(LeNet, "forward", interrupted)
            return train.main([*options(folder, glyphs_dir), *line])

    return start


@pytest.fixture(scope="session")
def glyphs_run(tmp_path_factory, start):
    """The folder of a run of 3 epochs on all of Glyphs, with its checkpoints and images."""
    folder = tmp_path_factory.mktemp("run")
    assert start(folder, "--dataset=Glyphs", "--epochs=3") == 0
    return folder


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
