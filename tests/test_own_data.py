"""A data set of one's own, in MNIST's format: an entry in utils.py, and all works with it."""

import gzip
import hashlib
import json
import re
import string
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ARCHIVES, files, flatten, judge, options, picture_dir, printed_rows, run_dir
from matplotlib import get_data_path
from PIL import Image, ImageDraw, ImageFont
from torchvision import datasets

import utils

LETTERS = {
    **{"classes": list(string.ascii_uppercase), "mirror": False, "shift": 1},
    **{"side": 20, "by_mass": False, "strokes": True},
}
COUNTS = {"train": 20, "t10k": 4}  # images of each class


def draw_letter(letter, side, size, place):
    font = ImageFont.truetype(f"{get_data_path()}/fonts/ttf/DejaVuSans-Bold.ttf", size)
    image = Image.new("L", (side, side))
    ImageDraw.Draw(image).text(place, letter, 255, font, anchor="mm")
    return image


def idx(array):
    """An array of bytes in MNIST's format, packed."""
    sizes = b"".join(size.to_bytes(4, "big") for size in (0x800 + array.ndim, *array.shape))
    return gzip.compress(sizes + array.astype(np.uint8).tobytes(), 1)


@pytest.fixture
def offer(tmp_path, monkeypatch):
    """Make a data set Letters of images and labels by split; return its data folder."""

    def offer(splits, entry=LETTERS):
        raw = tmp_path / "data" / "Letters" / "raw"
        raw.mkdir(parents=True)
        sums = []
        for name in ARCHIVES:
            images, labels = splits[name.partition("-")[0]]
            content = idx(images if "images" in name else labels)
            (raw / name).write_bytes(content)
            sums.append((name, hashlib.md5(content).hexdigest()))
        source = SimpleNamespace(resources=sums, mirrors=[])
        monkeypatch.setattr(datasets, "Letters", source, raising=False)
        monkeypatch.setitem(utils.DATASETS, "Letters", entry)
        return tmp_path / "data"

    return offer


@pytest.fixture
def letters(offer):
    rng, splits = np.random.default_rng(0), {}
    for split, count in COUNTS.items():
        labels = rng.permutation(np.repeat(np.arange(26), count))
        images = [
            draw_letter(LETTERS["classes"][label], 28, 20, 14 + rng.integers(-1, 2, 2))
            for label in labels
        ]
        splits[split] = np.stack(images), labels
    return offer(splits)


def test_26_classes_go_the_whole_way(letters, tmp_path, start, figures, monkeypatch, capsys):
    """Trained, resumed, judged with all pictures and the page, and asked about own pictures."""
    line = ["--dataset=Letters", "--epochs=8", "--batch-size=20", f"--data-dir={letters}"]
    assert start(tmp_path / "straight", *line) == 0
    out = capsys.readouterr().out
    assert "LeNet-5 with 63,066 parameters on cpu\n" in out  # 16 more units of F6's 84 and a bias
    assert "Letters: 260 images to train on, 260 for validation\n" in out  # at most half of a class
    assert start(tmp_path, *line, stop_at=40) == 130
    assert start(tmp_path, "--resume", f"--data-dir={letters}") == 0
    ends = [
        flatten(utils.load_checkpoint(run_dir(folder, "Letters") / "last.pt"))
        for folder in (tmp_path, tmp_path / "straight")
    ]
    assert ends[0] == ends[1]
    assert ends[0]["classes"] == LETTERS["classes"]
    assert len(printed_rows(capsys.readouterr().out)) == 2 + 6

    grids, plot = {}, utils.plot_grid
    monkeypatch.setattr(
        utils, "plot_grid", lambda *args: [grids.update({args[3].name: args}), plot(*args)]
    )
    assert judge.main(options(tmp_path, letters)) == 0
    out = capsys.readouterr().out
    right = int(re.search(r"Test accuracy on Letters: .* \((\d+)/104, ", out)[1])
    assert right > 80  # 4 by chance
    rows = re.findall(r"^([A-Z]) +\S+% \((\d)/4\)  ", out, re.MULTILINE)
    assert [name for name, _ in rows] == LETTERS["classes"]
    assert sum(int(hits) for _, hits in rows) == right

    folder = picture_dir(tmp_path, "Letters")
    for name in ("metrics.png", "predict.png", "confusion.png", "features.png"):
        with Image.open(folder / name) as picture:
            assert picture.width > 600
    captions = grids["predict.png"][1]
    assert len(captions) == 64
    assert all(re.fullmatch(r"[\u2713\u2717] [A-Z](\nis [A-Z])?", caption) for caption in captions)
    assert len({caption[2] for caption in captions}) > 15
    confusion = figures["confusion.png"].axes[0]
    for axis in (confusion.xaxis, confusion.yaxis):
        assert [label.get_text() for label in axis.get_ticklabels()] == LETTERS["classes"]
    counts = {text.get_position(): int(text.get_text()) for text in confusion.texts}
    assert (len(counts), sum(counts.values())) == (26 * 26, 4 * 26)
    assert sum(counts[i, i] for i in range(26)) == right
    shares = figures["features.png"].axes[-1]
    assert len(shares.patches) == 26
    assert [label.get_text() for label in shares.get_yticklabels()] == LETTERS["classes"]
    assert "26 units" in shares.get_title()

    text = (folder / "lenet5.html").read_text(encoding="utf-8")
    page = json.loads(text.split('id="networks">')[1].split("</script>")[0])["Letters"]
    assert page["classes"] == LETTERS["classes"]
    assert page["layers"][-1]["output"] == [26]
    assert page["labels"] == [label for label in range(26) for _ in range(4)]
    assert page["about"].endswith(f": {right} of 104 test images right")

    for letter in "LTX":
        picture = draw_letter(letter, 300, 200, (150, 140))
        Image.eval(picture, lambda value: 255 - value).save(tmp_path / f"{letter}.png")
    pictures = [str(tmp_path / f"{letter}.png") for letter in "LTX"]
    assert judge.main([*options(tmp_path, letters), "--image", *pictures]) == 0
    out = capsys.readouterr().out
    assert re.findall(r"([LTX])\.png: ([A-Z]) \(", out) == [(each, each) for each in "LTX"]
    assert "trained on Letters" in grids["own.png"][2]


@pytest.mark.parametrize("fault", ["a class too many", "larger images", "a label too few"])
def test_images_and_labels_that_do_not_fit_the_entry_are_refused(offer, fault):
    side = 32 if "images" in fault else 28
    images, labels = np.zeros((52, side, side)), np.arange(52) % 26
    labels[-1] += "class" in fault
    labels = labels[1:] if "label" in fault else labels
    folder = offer(dict.fromkeys(COUNTS, (images, labels)))
    before = files(folder)
    for split in ("train", "test"):
        with pytest.raises(utils.Error, match=r"^Letters has not images of 28x28 pixels"):
            utils.load_images("Letters", folder, split)
    assert files(folder) == before


@pytest.mark.parametrize("name", ["EMNIST", "QMNIST"])
def test_set_that_torchvision_reads_in_another_way_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.setitem(utils.DATASETS, name, LETTERS)
    with pytest.raises(utils.Error, match=f"^torchvision does not have {name} in MNIST"):
        utils.load_train_images(name, tmp_path)
    assert not list(tmp_path.iterdir())


def test_set_without_archives_and_mirrors_says_what_is_missing(offer):
    folder = offer(dict.fromkeys(COUNTS, (np.zeros((52, 28, 28)), np.arange(52) % 26)))
    for path in (folder / "Letters" / "raw").iterdir():
        path.unlink()
    with pytest.raises(utils.Unavailable, match=r"^train-images.* is missing .*: put the 4 \.gz"):
        utils.load_images("Letters", folder, "train")
