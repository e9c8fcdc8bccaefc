"""What the tests share: small runs on Glyphs, the real archives where they are, the scripts."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import train

ROOT = Path(__file__).resolve().parent.parent
ARCHIVES = [
    f"{split}-{kind}-ubyte.gz"
    for split in ("train", "t10k")
    for kind in ("images-idx3", "labels-idx1")
]
# A proxy that refuses connections: scripts run by the tests are cut off on every machine.
OFFLINE = dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9") | {"no_proxy": ""}


@pytest.fixture(scope="session")
def glyphs_dir(tmp_path_factory):
    """A data folder that Glyphs is drawn into once, and that has nothing else."""
    return tmp_path_factory.mktemp("data")


@pytest.fixture
def folders(tmp_path, glyphs_dir):
    """The options that keep a run's files in `tmp_path` and train on the shared Glyphs."""
    return [
        f"--data-dir={glyphs_dir}",
        f"--checkpoint-dir={tmp_path / 'checkpoints'}",
        f"--image-dir={tmp_path / 'images'}",
        "--device=cpu",
    ]


@pytest.fixture(scope="session")
def glyphs_run(tmp_path_factory, glyphs_dir):
    """The folder of a run of 3 epochs on all of Glyphs, with its checkpoints and images."""
    folder = tmp_path_factory.mktemp("run")
    options = [f"--{name}-dir={folder / name}s" for name in ("checkpoint", "image")]
    options += [f"--data-dir={glyphs_dir}", "--dataset=Glyphs", "--epochs=3", "--device=cpu"]
    assert train.main(options) == 0
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
