"""Checkpoints: written whole or not at all, and never trusted."""

import io
import math
import os
import pickle
import random
import zipfile

import pytest
import torch
from conftest import damage, flatten, load, network, run_dir

import utils
from model import LeNet


class Attack(str):
    """The path of a file that is made when this is unpickled the careless way."""

    def __reduce__(self):
        return open, (str(self), "w")


@pytest.fixture
def path(tmp_path):
    (tmp_path / "run").mkdir()
    return tmp_path / "run" / "best.pt"


def refuse(path, match):
    with pytest.raises(utils.Error, match=match) as caught:
        network(utils.load_checkpoint(path), path)
    assert path.name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_round_trip(path, glyphs_run):
    checkpoint = load(glyphs_run, "best.pt")
    utils.save(checkpoint, path)
    loaded = utils.load_checkpoint(path)
    assert flatten(loaded) == flatten(checkpoint)
    assert flatten(dict(network(loaded, path).state_dict())) == flatten(dict(checkpoint["model"]))
    assert [p.name for p in path.parent.iterdir()] == ["best.pt"]


@pytest.mark.parametrize("name", ["best.pt", "last.pt"])
def test_damage_is_noticed_or_has_no_effect(path, glyphs_run, name):
    content = (run_dir(glyphs_run) / name).read_bytes()
    whole, rng = flatten(load(glyphs_run, name)), random.Random(0)
    for size in [*(len(content) * i // 12 for i in range(12)), len(content) - 1]:
        path.write_bytes(content[:size])
        refuse(path, "damaged")
    places = [rng.randrange(8 * len(content)) for _ in range(20)]
    # The data is most of the file; these are its directory.
    places += [8 * len(content) - 1 - rng.randrange(len(content) // 3) for _ in range(20)]
    for place in places:
        path.write_bytes(damage(content, "flipped bit", place))
        try:
            assert flatten(utils.load_checkpoint(path)) == whole
        except utils.Error as error:
            assert "best.pt" in str(error)


def test_code_in_a_checkpoint_never_runs(path, tmp_path, glyphs_run):
    trap, old = tmp_path / "trap", io.BytesIO()
    hostile = load(glyphs_run, "best.pt") | {"model": Attack(trap)}
    torch.save(hostile, old, _use_new_zipfile_serialization=False)
    for content in (pickle.dumps(hostile["model"]), old.getvalue()):
        path.write_bytes(content)
        refuse(path, "damaged, or no file of this project")
    utils.save(hostile, path)
    refuse(path, "damaged, or no file of this project")
    assert not trap.exists()
    torch.load(path, weights_only=False)  # the trap is a real one
    assert trap.exists()


def test_files_that_are_far_too_large_are_refused(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(200 * 2**20))
    refuse(path, "damaged")
    with path.open("wb") as file:
        file.truncate(10**12)  # a sparse file: no byte of it is on the disk
    refuse(path, "too large")


def test_what_is_no_checkpoint_at_all_is_refused(path):
    refuse(path, "does not exist")
    refuse(path.parent, "is no file")
    for content in (b"", b"text\n", b"PK\x03\x04", b"\x80\x02}."):
        path.write_bytes(content)
        refuse(path, "damaged, or no file of this project")
    for content in ([1, 2, 3], {}, LeNet().state_dict()):
        utils.save(content, path)
        refuse(path, "is not a checkpoint of train.py")


WEIGHTS = LeNet().state_dict()
HOSTILE = {
    "newer format": ({"format": utils.FORMAT + 1}, "update the project"),
    "path as data set": ({"dataset": "../../home"}, "not a checkpoint"),
    "other classes": ({"dataset": "FashionMNIST"}, "not a checkpoint"),  # its classes are others
    "nan mean": ({"mean": math.nan}, "not a checkpoint"),
    "std of 0": ({"std": 0.0}, "not a checkpoint"),
    "no epochs": ({"epoch": 0, "history": []}, "not a checkpoint"),
    "history of words": (
        {"epoch": 1, "history": [dict.fromkeys(utils.HISTORY, "high")]},
        "not a checkpoint",
    ),
    "list of options": ({"options": []}, "not a checkpoint"),
    "double": ({"model": LeNet().double().state_dict()}, "does not fit the network"),
    "meta": ({"model": LeNet().to("meta").state_dict()}, "does not fit the network"),
    "7 classes": (
        {"model": LeNet(num_classes=7).state_dict()},
        "does not fit .*: f7.* of another shape",
    ),
    "unknown weight": ({"model": WEIGHTS | {"f8": torch.ones(1)}}, "f8 is missing, unknown"),
    "weight is a number": ({"model": WEIGHTS | {"f7.bias": 3}}, "does not fit the network"),
    "nan weight": (
        {"model": WEIGHTS | {"f7.bias": torch.full([10], torch.nan)}},
        "f7.bias has values that are",
    ),
    "sparse weight": (
        {"model": WEIGHTS | {"f7.bias": torch.ones(10).to_sparse()}},
        "f7.bias is missing, unknown",
    ),
    "huge weight": (
        {"model": WEIGHTS | {"f7.bias": torch.ones(1).expand(10**6, 10**6)}},
        "f7.bias is missing",
    ),
}


@pytest.mark.parametrize(("changes", "match"), HOSTILE.values(), ids=HOSTILE)
@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
def test_what_train_py_cannot_have_written_is_refused(path, glyphs_run, changes, match):
    utils.save(load(glyphs_run, "best.pt") | changes, path)
    refuse(path, match)


def test_write_that_fails_leaves_the_old_file(path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    utils.write_file(path, b"old")
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(utils.Error, match="No space left"):
        utils.write_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in path.parent.iterdir()] == ["best.pt"]


def test_file_is_on_the_disk_before_it_takes_the_old_ones_place(path, monkeypatch):
    real, sizes = os.fsync, []

    def fsync(descriptor):
        sizes.append((os.fstat(descriptor).st_size, path.read_bytes()))
        real(descriptor)

    utils.write_file(path, b"old")
    monkeypatch.setattr("os.fsync", fsync)
    utils.write_file(path, b"new one")
    assert sizes == [(7, b"old")]
    assert path.read_bytes() == b"new one"


def test_unreadable_file_is_refused(path, monkeypatch):
    def denied(path):
        raise PermissionError(13, "Permission denied")

    path.write_bytes(b"secret")
    monkeypatch.setattr("pathlib.Path.read_bytes", denied)
    refuse(path, f"cannot read {path}: Permission denied")
