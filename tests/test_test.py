"""test.py: which weights it takes, what it reports, what it draws."""

import os
import re
import shutil

import pytest
import torch
from conftest import ROOT, judge, load
from conftest import options as folders
from PIL import Image

import utils


@pytest.fixture
def options(glyphs_run, tmp_path, glyphs_dir):
    """Judge the run of `glyphs_run`; the pictures go to tmp_path/images."""
    return [*folders(tmp_path, glyphs_dir), f"--checkpoint-dir={glyphs_run / 'checkpoints'}"]


@pytest.fixture
def grids(monkeypatch):
    """Instead of drawing grids of images, collect what would be drawn."""
    grids = []
    monkeypatch.setattr(utils, "plot_grid", lambda *args: grids.append(args))
    return grids


def find(*line):
    return judge.find_checkpoint(judge.parse_args(list(map(str, line))))


def test_wilson_interval():
    for correct, total, interval in (
        *((9156, 10000, (0.9100, 0.9209)), (0, 10, (0, 0.2775))),
        *((10, 10, (0.7225, 1)), (5, 10, (0.2366, 0.7634))),
    ):
        assert judge.wilson_interval(correct, total) == pytest.approx(interval, abs=1e-4)


def test_confusion_matrix():
    labels, predicted = torch.tensor([0, 0, 1, 2, 2, 2]), torch.tensor([0, 1, 1, 0, 0, 2])
    expected = [[1, 1, 0], [0, 1, 0], [2, 0, 1]]
    assert judge.confusion_matrix(labels, predicted, 3).tolist() == expected


def test_report_agrees_with_a_count_from_scratch(options, glyphs_run, glyphs_dir, tmp_path, capsys):
    assert judge.main(options) == 0
    text = capsys.readouterr().out
    checkpoint = load(glyphs_run, "best.pt")
    utils.restore(model := judge.LeNet(), checkpoint, "best.pt")
    images, labels = utils.load_images("Glyphs", glyphs_dir, "test")
    x = torch.zeros(10_000, 1, 32, 32)
    x[:, 0, 2:30, 2:30] = images / 255
    with torch.no_grad():
        logits = model((x - checkpoint["mean"]) / checkpoint["std"])
    predicted = logits.argmax(1)
    correct = (predicted == labels).sum().item()
    assert correct > 8500
    assert re.match(r"Weights: .*best.pt, epoch [123] of a run on Glyphs\n", text)
    assert f"Test accuracy on Glyphs: {correct / 100:.2f}% ({correct}/10000, 95% CI " in text
    assert f"Test loss on Glyphs: {torch.nn.functional.cross_entropy(logits, labels):.4f}" in text
    for digit in range(10):
        hits = ((predicted == labels) & (labels == digit)).sum().item()
        others = predicted[(labels == digit) & (predicted != digit)].bincount()
        row = rf"{digit} +{hits / 10:.1f}% \({hits}/1000\) +(\d) \({others.max()}\)"
        assert others[int(re.search(row, text)[1])] == others.max()
    share, hits = re.search(r"Accuracy on 64 random test images: (.*)% \((\d+)/64\)", text).groups()
    assert float(share) == pytest.approx(100 * int(hits) / 64, abs=0.05)
    for name in ("predict.png", "confusion.png", "mistakes.png", "features.png"):
        with Image.open(tmp_path / "images" / "Glyphs" / name) as picture:
            assert min(picture.size) >= 700
            assert len(picture.convert("RGB").resize((100, 100)).getcolors(10_000)) > 20


def test_captions_of_the_64_are_right(options, grids):
    judge.main(options)
    (images, captions, title, path, right), (_, wrong_captions, _, wrong_path, wrong_right) = grids
    captions, wrong_captions = list(captions), list(wrong_captions)
    assert (path.name, wrong_path.name) == ("predict.png", "mistakes.png")
    assert len(images) == len(captions) == len(right) == 64
    assert f"{right.sum()} of them right" in title
    for caption, ok in zip(captions, right):
        assert re.fullmatch(r"\u2713 \d" if ok else r"\u2717 \d\nis \d", caption)
    assert not wrong_right.any()
    shares = [float(re.fullmatch(r"\u2717 \d \((.*)%\)\nis \d", c)[1]) for c in wrong_captions]
    assert shares == sorted(shares, reverse=True)


def test_no_mistakes_are_drawn_where_there_are_none(glyphs_run, grids, tmp_path):
    images, labels = torch.zeros(64, 28, 28, dtype=torch.uint8), torch.arange(64) % 10
    logits = torch.eye(10)[labels]
    checkpoint = load(glyphs_run, "best.pt")
    judge.draw_test_set(checkpoint, images, labels, logits, torch.arange(64), tmp_path)
    assert len(grids) == 1


def test_seed_chooses_the_64(options, grids):
    for seed in (0, 0, 1):
        judge.main([*options, f"--seed={seed}"])
    first, again, other = (grid[0] for grid in grids[::2])
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_newest_run_is_taken_and_the_data_set_can_be_named(glyphs_run, tmp_path):
    source = glyphs_run / "checkpoints" / "Glyphs" / "best.pt"
    for age, dataset in enumerate(("Glyphs", "MNIST")):
        path = tmp_path / dataset / "best.pt"
        utils.save(load(glyphs_run, "best.pt") | {"dataset": dataset}, path)
        os.utime(path, (1000 - age, 1000 - age))
    folder = f"--checkpoint-dir={tmp_path}"
    assert find(folder) == tmp_path / "Glyphs" / "best.pt"
    assert find(folder, "--dataset=MNIST") == path
    assert find(folder, "--checkpoint", source) == source


def test_shipped_weights_are_taken_where_there_was_no_run(tmp_path, monkeypatch):
    monkeypatch.setattr(utils, "ROOT", tmp_path)  # a fresh checkout
    shipped = tmp_path / "checkpoints"
    shipped.mkdir()
    for path in (ROOT / "checkpoints").glob("*.pt"):
        shutil.copy(path, shipped)
    folder = f"--checkpoint-dir={shipped}"
    assert find(folder) == shipped / "lenet5-fashionmnist.pt"
    assert find(folder, "--dataset=MNIST") == shipped / "lenet5-mnist.pt"
    with pytest.raises(utils.Error, match=r"no run on Glyphs in .*: start one with train.py"):
        find(folder, "--dataset=Glyphs")


@pytest.mark.parametrize("name", ["checkpoint", "checkpoints/Glyphs"])
def test_named_folder_without_a_run_is_refused(glyphs_run, name):
    """Mistyped, or the run's own folder: no other weights are judged instead."""
    with pytest.raises(utils.Error, match=rf"no run in .*{name}: .* the folder that has D/best.pt"):
        find("--checkpoint-dir", glyphs_run / name)


@pytest.mark.parametrize(("dataset", "percent"), [("FashionMNIST", 91.0), ("MNIST", 99.0)])
def test_shipped_weights_are_good(real_data, tmp_path, capsys, dataset, percent):
    weights = ROOT / "checkpoints" / f"lenet5-{dataset.lower()}.pt"
    assert judge.main([f"--checkpoint={weights}", *folders(tmp_path, real_data)]) == 0
    out = capsys.readouterr().out
    assert float(re.search(rf"Test accuracy on {dataset}: (.*?)%", out)[1]) >= percent


def test_own_pictures_are_classified(options, tmp_path, glyphs_dir, capsys):
    images, labels = utils.load_images("Glyphs", glyphs_dir, "test")
    clear = images.flatten(1).double().std(dim=1).argsort(descending=True)[:3].tolist()
    paths = [tmp_path / f"digit-{labels[i]}-{i}.png" for i in clear]
    for i, path in zip(clear, paths):
        Image.fromarray(255 - images[i].numpy()).resize((280, 280)).save(path)
    first, *others = map(str, paths)
    assert judge.main([*options, "--image", *others, "--image", first]) == 0
    out = capsys.readouterr().out
    for path in paths:
        line = re.search(rf"{path.name}: (\d) \((.*?)%\), (\d) \((.*?)%\), (\d) \((.*?)%\)\n", out)
        shares = [float(share) for share in line.groups()[1::2]]
        assert shares == sorted(shares, reverse=True)
        assert sum(shares) <= 100.2
        assert line[1] == path.name[6]
    with Image.open(tmp_path / "images" / "own.png") as picture:
        assert picture.width > 300


def test_all_of_many_pictures_are_printed_and_64_drawn(options, grids, monkeypatch, capsys):
    monkeypatch.setattr(judge, "load_picture", lambda file, _: torch.full([28, 28], int(file.stem)))
    monkeypatch.setattr(
        judge, "read_grey", lambda file: torch.full([64, 128], 255 - int(file.stem))
    )
    assert judge.main([*options, "--image", *(f"{i}.png" for i in range(70))]) == 0
    out = capsys.readouterr().out
    assert re.findall(r"^(\d+).png: ", out, re.MULTILINE) == [str(i) for i in range(70)]
    assert out.endswith("own.png, the first 64\n")
    [(images, captions, *_)] = grids
    assert images[:, 64, 64].tolist() == list(range(255, 191, -1))  # the pictures themselves
    assert images[:, 64, 200].tolist() == list(range(64))  # and what is seen of them
    assert captions[63].startswith("63.png\n")
