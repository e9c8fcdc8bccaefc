"""Checkpoints: written whole or not at all, and never trusted."""

import io
import pickle
import random
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import flatten

import utils
from model import LeNet


class Attack:
    """A pickle that makes a file when it is loaded the careless way."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def make_checkpoint(**changes):
    torch.manual_seed(0)
    row = dict.fromkeys(utils.HISTORY, 0.5) | {"epoch": 1}
    return {
        "format": utils.FORMAT,
        "dataset": "MNIST",
        "classes": list("0123456789"),
        "mean": 0.13,
        "std": 0.31,
        "epoch": 1,
        "history": [row],
        "options": {"epochs": 1},
        "torch": "2.6.0",
        "model": LeNet().state_dict(),
    } | changes


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / "best.pt"


def refuse(path, match):
    with pytest.raises(utils.Error, match=match) as caught:
        utils.restore(LeNet(), utils.load_checkpoint(path), path)
    assert path.name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_round_trip(path):
    checkpoint = make_checkpoint()
    utils.save(checkpoint, path)
    loaded = utils.load_checkpoint(path)
    model = LeNet()
    utils.restore(model, loaded, path)
    for name, tensor in checkpoint["model"].items():
        assert torch.equal(model.state_dict()[name], tensor)
    del checkpoint["model"], loaded["model"]
    assert loaded == checkpoint
    assert [p.name for p in path.parent.iterdir()] == ["best.pt"]


def test_missing_file_and_folder(path, tmp_path):
    refuse(path, "does not exist")
    refuse(tmp_path, "no file")
    refuse(Path("/dev/zero"), "no file")


@pytest.mark.parametrize("name", ["best.pt", "last.pt"])
def test_every_truncation_is_refused(path, glyphs_run, name):
    content = (glyphs_run / "checkpoints" / "Glyphs" / name).read_bytes()
    path.parent.mkdir()
    for size in [*(len(content) * i // 50 for i in range(50)), len(content) - 1]:
        path.write_bytes(content[:size])
        refuse(path, "damaged")


@pytest.mark.parametrize("name", ["best.pt", "last.pt"])
def test_flipped_bits_are_refused_or_have_no_effect(path, glyphs_run, name):
    content = (glyphs_run / "checkpoints" / "Glyphs" / name).read_bytes()
    path.parent.mkdir()
    path.write_bytes(content)
    whole, rng = flatten(utils.load_checkpoint(path)), random.Random(0)
    places = [rng.randrange(len(content)) for _ in range(100)]
    # The data is most of the file; these are its directory.
    places += [len(content) - 1 - rng.randrange(len(content) // 20) for _ in range(100)]
    for place in places:
        flipped = bytearray(content)
        flipped[place] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        try:
            loaded = utils.load_checkpoint(path)
        except utils.Error as error:
            assert "best.pt" in str(error)
        else:
            assert flatten(loaded) == whole


def test_code_in_a_checkpoint_never_runs(path, tmp_path):
    trap = tmp_path / "trap"
    utils.save(make_checkpoint(options={"epochs": Attack(trap)}), path)
    refuse(path, "damaged, or no file of this project")
    path.write_bytes(pickle.dumps(Attack(trap)))
    refuse(path, "damaged, or no file of this project")
    buffer = io.BytesIO()
    torch.save(make_checkpoint(model=Attack(trap)), buffer, _use_new_zipfile_serialization=False)
    path.write_bytes(buffer.getvalue())
    refuse(path, "damaged, or no file of this project")
    assert not trap.exists()
    torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)  # the trap is a real one
    assert trap.exists()


def test_file_that_unpacks_to_more_than_its_size_is_refused(path):
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(200 * 2**20))
    assert path.stat().st_size < 2**20
    refuse(path, "damaged")


def test_tensor_that_claims_a_huge_shape_is_refused(path):
    weights = make_checkpoint()["model"]
    huge = torch.zeros(1).expand(10**6, 10**6)  # four bytes that claim to be 4 TB
    utils.save(make_checkpoint(model=weights | {"c5.weight": huge}), path)
    refuse(path, "c5.weight has shape")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ([1, 2, 3], "not a checkpoint"),
        ({}, "not a checkpoint"),
        (LeNet().state_dict(), "not a checkpoint"),
        (make_checkpoint(format=utils.FORMAT + 1), "update"),
        (make_checkpoint(format="1"), "not a checkpoint"),
        (make_checkpoint(dataset="../../home"), "dataset"),
        (make_checkpoint(dataset=["MNIST"]), "dataset"),
        (make_checkpoint(classes=10), "classes"),
        (make_checkpoint(classes=list(range(10))), "classes"),
        (make_checkpoint(classes=list("012")), "classes"),
        (make_checkpoint(dataset="FashionMNIST"), "its classes are another data set's"),
        (make_checkpoint(mean="0"), "mean"),
        (make_checkpoint(mean=float("nan")), "mean"),
        (make_checkpoint(std=0.0), "std"),
        (make_checkpoint(epoch=0), "epoch"),
        (make_checkpoint(history=[]), "history"),
        (make_checkpoint(history=[{"epoch": 1}]), "history"),
        (make_checkpoint(history=3), "history"),
        (make_checkpoint(history=[dict.fromkeys(utils.HISTORY, "high")]), "history"),
        (make_checkpoint(options=[]), "options"),
        (make_checkpoint(model=[]), "model"),
        (make_checkpoint(model=LeNet().double().state_dict()), "a tensor of another kind"),
        (make_checkpoint(model=LeNet().to("meta").state_dict()), "c1.weight"),
        (make_checkpoint(model={}), "c1.weight"),
        (make_checkpoint(model=LeNet().state_dict() | {"f8.bias": torch.ones(1)}), "f8.bias"),
        (make_checkpoint(model=LeNet().state_dict() | {"f7.bias": 3}), "f7.bias"),
        (make_checkpoint(model=LeNet(num_classes=7).state_dict()), "f7.weight has shape"),
        (
            make_checkpoint(model=LeNet().state_dict() | {"f7.bias": torch.full([10], torch.nan)}),
            "f7.bias",
        ),
        (
            make_checkpoint(model=LeNet().state_dict() | {"f7.bias": torch.ones(10).to_sparse()}),
            "f7.bias",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
def test_what_is_no_checkpoint_of_ours_is_refused(path, content, match):
    utils.save(content, path)
    refuse(path, match)


@pytest.mark.parametrize("content", [b"", b"text\n", b"PK\x03\x04", b"\x80\x02}."])
def test_other_files_are_refused(path, content):
    path.parent.mkdir()
    path.write_bytes(content)
    refuse(path, "damaged, or no file of this project")


def test_too_large_a_file_is_refused_unread(path):
    path.parent.mkdir()
    with path.open("wb") as file:
        file.truncate(10**12)  # a sparse file: no byte of it is on the disk
    refuse(path, "too large")


def test_write_that_fails_leaves_the_old_file(path, monkeypatch):
    utils.write_file(path, b"old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(utils.Error, match="No space left"):
        utils.write_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in path.parent.iterdir()] == ["best.pt"]


def test_newest_run_is_found(tmp_path):
    import os

    for age, dataset in enumerate(("MNIST", "Glyphs", "FashionMNIST", "Elsewhere")):
        utils.write_file(tmp_path / dataset / "best.pt", b"")
        os.utime(tmp_path / dataset / "best.pt", (1000 - age, 1000 - age))
    os.utime(tmp_path / "Elsewhere" / "best.pt", (2000, 2000))
    assert utils.newest(tmp_path, "auto", "best.pt") == tmp_path / "MNIST" / "best.pt"
    assert utils.newest(tmp_path, "Glyphs", "best.pt") == tmp_path / "Glyphs" / "best.pt"
    assert utils.newest(tmp_path, "auto", "last.pt") is None
