"""test.py: which weights it takes, what it reports, what it draws."""

import importlib
import os
import re

import pytest
import torch
from conftest import ROOT
from PIL import Image

import utils

judge = importlib.import_module("test")  # a plain import is sorted among the standard library


def make_options(run, tmp_path, glyphs_dir):
    return [
        f"--data-dir={glyphs_dir}",
        f"--checkpoint-dir={run / 'checkpoints'}",
        f"--image-dir={tmp_path / 'images'}",
        "--device=cpu",
    ]


@pytest.fixture
def options(glyphs_run, tmp_path, glyphs_dir):
    """Judge the run of `glyphs_run`; the pictures go to tmp_path/images."""
    return make_options(glyphs_run, tmp_path, glyphs_dir)


@pytest.fixture(scope="module")
def report(glyphs_run, tmp_path_factory, glyphs_dir):
    """What `python test.py` prints for `glyphs_run`, and the folder of its pictures."""
    folder = tmp_path_factory.mktemp("report")
    with pytest.MonkeyPatch.context() as patch:
        lines = []
        patch.setattr("builtins.print", lambda *args, **kwargs: lines.extend(args))
        assert judge.main(make_options(glyphs_run, folder, glyphs_dir)) == 0
    return "\n".join(lines), folder / "images" / "Glyphs"


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    [
        (9156, 10000, 0.9100, 0.9209),
        (0, 10, 0, 0.2775),
        (10, 10, 0.7225, 1),
        (5, 10, 0.2366, 0.7634),
    ],
)
def test_wilson_interval(correct, total, low, high):
    assert judge.wilson_interval(correct, total) == pytest.approx((low, high), abs=1e-4)


def test_confusion_matrix():
    labels, predicted = torch.tensor([0, 0, 1, 2, 2, 2]), torch.tensor([0, 1, 1, 0, 0, 2])
    expected = [[1, 1, 0], [0, 1, 0], [2, 0, 1]]
    assert judge.confusion_matrix(labels, predicted, 3).tolist() == expected


def test_report_agrees_with_a_count_from_scratch(report, glyphs_run, glyphs_dir):
    text, _ = report
    path = glyphs_run / "checkpoints" / "Glyphs" / "best.pt"
    checkpoint = utils.load_checkpoint(path)
    model = judge.LeNet()
    utils.restore(model, checkpoint, path)
    images, labels = utils.load_images("Glyphs", glyphs_dir, "test")
    x = torch.zeros(10_000, 1, 32, 32)
    x[:, 0, 2:30, 2:30] = images / 255
    with torch.no_grad():
        logits = model((x - checkpoint["mean"]) / checkpoint["std"])
    predicted = logits.argmax(1)
    correct = (predicted == labels).sum().item()
    assert correct > 8500
    assert f"Test accuracy on Glyphs: {correct / 100:.2f}% ({correct}/10000, 95% CI " in text
    assert f"Test loss on Glyphs: {torch.nn.functional.cross_entropy(logits, labels):.4f}" in text
    for digit in range(10):
        hits = ((predicted == labels) & (labels == digit)).sum().item()
        others = predicted[(labels == digit) & (predicted != digit)].bincount()
        row = rf"{digit} +{hits / 10:.1f}% \({hits}/1000\) +(\d) \({others.max()}\)"
        match = re.search(row, text)
        assert match
        assert others[int(match[1])] == others.max()
    sample = re.search(r"Accuracy on 64 random test images: (.*)% \((\d+)/64\)", text)
    assert float(sample[1]) == pytest.approx(100 * int(sample[2]) / 64, abs=0.05)


def test_report_says_which_weights(report):
    assert re.match(r"Weights: .*Glyphs/best.pt, epoch [123] of a run on Glyphs\n", report[0])


def test_pictures_are_drawn(report):
    _, folder = report
    for name in ("predict.png", "confusion.png", "mistakes.png"):
        with Image.open(folder / name) as picture:
            assert min(picture.size) >= 700
            assert len(picture.convert("RGB").resize((100, 100)).getcolors(10_000)) > 20


def test_captions_of_the_64_are_right(options, monkeypatch):
    grids = []
    monkeypatch.setattr(utils, "plot_grid", lambda *args: grids.append(args))
    judge.main(options)
    (images, captions, title, path, right), (_, wrong_captions, _, wrong_path, wrong_right) = grids
    captions, wrong_captions = list(captions), list(wrong_captions)
    assert (path.name, wrong_path.name) == ("predict.png", "mistakes.png")
    assert len(images) == len(captions) == len(right) == 64
    assert f"{right.sum()} of them right" in title
    for caption, ok in zip(captions, right):
        assert re.fullmatch(r"\u2713 \d\n?" if ok else r"\u2717 \d\nis \d", caption)
    assert not wrong_right.any()
    shares = [float(re.fullmatch(r"\u2717 \d \((.*)%\)\nis \d", c)[1]) for c in wrong_captions]
    assert shares == sorted(shares, reverse=True)


def test_seed_chooses_the_64(options, monkeypatch):
    chosen = []
    monkeypatch.setattr(utils, "plot_grid", lambda images, *args: chosen.append(images))
    for seed in (0, 0, 1):
        judge.main([*options, f"--seed={seed}"])
    assert torch.equal(chosen[0], chosen[2])
    assert not torch.equal(chosen[0], chosen[4])


def test_newest_run_is_taken_and_the_data_set_can_be_named(glyphs_run, tmp_path):
    source = glyphs_run / "checkpoints" / "Glyphs" / "best.pt"
    checkpoint = utils.load_checkpoint(source)
    for age, dataset in enumerate(("Glyphs", "MNIST")):
        path = tmp_path / "checkpoints" / dataset / "best.pt"
        utils.save(checkpoint | {"dataset": dataset}, path)
        os.utime(path, (1000 - age, 1000 - age))

    def find(*line):
        folder = f"--checkpoint-dir={tmp_path / 'checkpoints'}"
        return judge.find_checkpoint(utils.test_parser().parse_args([folder, *line])).parent.name

    assert find() == "Glyphs"
    assert find("--dataset=MNIST") == "MNIST"
    assert find(f"--checkpoint={source}") == "Glyphs"


def test_shipped_weights_are_taken_where_there_was_no_run(tmp_path):
    def find(*line):
        folder = f"--checkpoint-dir={tmp_path}"
        return judge.find_checkpoint(utils.test_parser().parse_args([folder, *line]))

    assert find() == ROOT / "checkpoints" / "lenet5-fashionmnist.pt"
    assert find("--dataset=MNIST") == ROOT / "checkpoints" / "lenet5-mnist.pt"
    with pytest.raises(utils.Error, match=r"no run on Glyphs.*train.py --dataset Glyphs"):
        find("--dataset=Glyphs")


@pytest.mark.parametrize(("dataset", "percent"), [("FashionMNIST", 91.0), ("MNIST", 99.0)])
def test_shipped_weights_are_good(real_data, tmp_path, capsys, dataset, percent):
    folders = make_options(tmp_path, tmp_path, real_data)
    assert judge.main([f"--dataset={dataset}", *folders]) == 0
    out = capsys.readouterr().out
    assert f"lenet5-{dataset.lower()}.pt" in out
    assert float(re.search(rf"Test accuracy on {dataset}: (.*?)%", out)[1]) >= percent


def test_own_pictures_are_classified(options, tmp_path, glyphs_dir, capsys):
    images, labels = utils.load_images("Glyphs", glyphs_dir, "test")
    clear = images.flatten(1).double().std(dim=1).argsort(descending=True)[:3].tolist()
    paths = []
    for i in clear:
        paths.append(tmp_path / f"digit-{labels[i]}-{i}.png")
        Image.fromarray(255 - images[i].numpy()).resize((280, 280)).save(paths[-1])
    assert judge.main([*options, "--image", *map(str, paths)]) == 0
    out = capsys.readouterr().out
    for path in paths:
        line = re.search(rf"{path.name}: (\d) \((.*?)%\), (\d) \((.*?)%\), (\d) \((.*?)%\)\n", out)
        shares = [float(share) for share in line.groups()[1::2]]
        assert shares == sorted(shares, reverse=True)
        assert sum(shares) <= 100.2
        assert line[1] == path.name[6]
    with Image.open(tmp_path / "images" / "own.png") as picture:
        assert picture.width > 300


def test_own_picture_that_is_none_is_refused_before_anything_is_drawn(options, tmp_path):
    Image.new("L", (9, 9)).save(tmp_path / "plain.png")
    with pytest.raises(utils.Error, match=r"plain.png shows nothing"):
        judge.main([*options, "--image", str(tmp_path / "plain.png")])
    assert not (tmp_path / "images").exists()
