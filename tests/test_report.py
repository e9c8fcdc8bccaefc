"""test.py: which weights it takes, what it reports of them, what it draws, the page it writes."""

import contextlib
import io
import os
import re
import shutil
from base64 import b64decode
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from benchmark import judge as accuracy_of
from conftest import (
    ROOT,
    files,
    judge,
    load,
    look_up,
    network,
    options,
    picture_dir,
    random_images,
    run_dir,
)
from matplotlib.colors import to_rgb
from PIL import Image

import utils

README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def judged(glyphs_run, glyphs_dir, tmp_path_factory):
    """What test.py printed, drew and wrote of `glyphs_run`, and the same computed from scratch."""
    folder = shutil.copytree(glyphs_run, tmp_path_factory.mktemp("judged") / "run")
    figures, grids, out = {}, {}, io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        collect(patch, "save_figure", lambda figure, path, **_: figures.update({path.name: figure}))
        collect(patch, "plot_grid", lambda *args: grids.update({args[3].name: args}))
        assert judge.main(options(folder, glyphs_dir)) == 0
    images, labels = utils.load_images("Glyphs", glyphs_dir, "test")
    x = torch.zeros(10_000, 1, 32, 32)
    x[:, 0, 2:30, 2:30] = images / 255
    checkpoint = load(folder, "best.pt")
    with torch.no_grad():
        logits = network(checkpoint)((x - checkpoint["mean"]) / checkpoint["std"])
    sample = torch.randperm(10_000, generator=torch.Generator().manual_seed(0))[:64]
    return SimpleNamespace(**locals())


def collect(patch, name, note):
    """Note the arguments of utils.`name`, and call it."""
    real = getattr(utils, name)

    def call(*args, **how):
        note(*args, **how)
        return real(*args, **how)

    patch.setattr(utils, name, call)


# --- Numbers --------------------------------------------------------------------------------------

INTERVALS = [
    *((9156, 10000, (0.9100, 0.9209)), (0, 10, (0, 0.2775))),
    *((10, 10, (0.7225, 1)), (5, 10, (0.2366, 0.7634))),
]


@pytest.mark.parametrize(("correct", "total", "interval"), INTERVALS)
def test_wilson_interval(correct, total, interval):
    assert judge.wilson_interval(correct, total) == pytest.approx(interval, abs=1e-4)


def test_confusion_matrix():
    labels, predicted = torch.tensor([0, 0, 1, 2, 2, 2]), torch.tensor([0, 1, 1, 0, 0, 2])
    expected = [[1, 1, 0], [0, 1, 0], [2, 0, 1]]
    assert judge.confusion_matrix(labels, predicted, 3).tolist() == expected


def test_report_agrees_with_a_count_from_scratch(judged):
    text, labels, predicted = judged.out.getvalue(), judged.labels, judged.logits.argmax(1)
    right = predicted == labels
    correct = right.sum().item()
    assert correct > 8500
    best = run_dir(judged.folder) / "best.pt"
    z, n, p = 1.96, 10_000, correct / 10_000  # Wilson's interval solves |p - q| = z sqrt(q(1-q)/n)
    low, high = np.sort(np.roots([1 + z**2 / n, -(2 * p + z**2 / n), p**2]))
    loss = F.cross_entropy(judged.logits, labels)
    assert text.splitlines()[:3] == [
        f"Weights: {best}, epoch {judged.checkpoint['epoch']} of a run on Glyphs",
        f"Test accuracy on Glyphs: {correct / 100:.2f}% ({correct}/10000, "
        f"95% CI {100 * low:.2f}-{100 * high:.2f})",
        f"Test loss on Glyphs: {loss:.4f} (10000)",
    ]
    for digit in range(10):
        hits = (right & (labels == digit)).sum().item()
        others = predicted[(labels == digit) & ~right].bincount()
        row = rf"{digit} +{hits / 10:.1f}% \({hits}/1000\) +(\d) \({others.max()}\)"
        assert others[int(re.search(row, text)[1])] == others.max()
    hits = right[judged.sample].sum().item()
    assert f"Accuracy on 64 random test images: {100 * hits / 64:.1f}% ({hits}/64)\n" in text
    assert f"Pictures: {picture_dir(judged.folder)}\n" in text


def test_classes_without_a_mistake_or_an_image_are_reported(
    glyphs_run, tmp_path, monkeypatch, capsys
):
    """A test set of 64 times the same digit, and a network that takes everything for it."""
    images, labels = random_images(64), torch.full([64], 3)
    monkeypatch.setattr(utils, "load_images", lambda *_: (images, labels))
    checkpoint = load(glyphs_run, "best.pt")
    checkpoint["model"]["f7.bias"][3] = 1000
    utils.save(checkpoint, tmp_path / "three.pt")
    line = [*options(tmp_path, tmp_path), f"--checkpoint={tmp_path / 'three.pt'}", "--seed=0"]
    assert judge.main(line) == 0
    out = capsys.readouterr().out
    assert re.search(r"^3 +100.0% \(64/64\) +-$", out, re.MULTILINE)
    assert re.search(r"^4 +0.0% \(0/0\) +-$", out, re.MULTILINE)
    assert not (picture_dir(tmp_path) / "mistakes.png").exists()


@pytest.mark.parametrize("dataset", ["FashionMNIST", "MNIST"])
def test_shipped_weights_have_the_accuracy_in_the_readme(real_data, dataset):
    path = ROOT / "checkpoints" / f"lenet5-{dataset.lower()}.pt"
    accuracy, _ = accuracy_of(utils.load_checkpoint(path), real_data)
    # Rounding differs from machine to machine: it may turn an image or two.
    shown = re.search(rf"\| {dataset} \| `checkpoints/{path.name}` .*\((\d+)/10000\)", README)
    assert abs(round(10_000 * accuracy) - int(shown[1])) <= 3
    assert accuracy >= {"FashionMNIST": 0.91, "MNIST": 0.99}[dataset]


# --- Pictures -------------------------------------------------------------------------------------


def test_seed_chooses_the_64_random_test_images(judged, glyphs_dir, monkeypatch):
    """Those of seed 0, the default, are in `judged`."""
    grids = []
    monkeypatch.setattr(utils, "plot_grid", lambda *args: grids.append(args))
    judge.main([*options(judged.folder, glyphs_dir), "--seed=1"])
    sample = torch.randperm(10_000, generator=torch.Generator().manual_seed(1))[:64]
    assert torch.equal(grids[0][0], judged.images[sample])


def test_captions_of_the_64_say_what_was_predicted(judged):
    images, captions, title, path, right = judged.grids["predict.png"]
    assert path == picture_dir(judged.folder) / "predict.png"
    assert torch.equal(images, judged.images[judged.sample])
    assert title == f"LeNet-5 on Glyphs: 64 random test images, {right.sum()} of them right"
    for i, caption, ok in zip(judged.sample, captions, right, strict=True):
        label, answer = judged.labels[i], judged.logits[i].argmax()
        assert ok == (label == answer)
        assert caption == (f"\u2713 {answer}" if ok else f"\u2717 {answer}\nis {label}")


def test_mistakes_are_the_surest_ones_in_their_order(judged):
    images, captions, title, path, right = judged.grids["mistakes.png"]
    assert path == picture_dir(judged.folder) / "mistakes.png"
    assert not right.any()
    confidence, predicted = judged.logits.softmax(1).max(1)
    wrong = (predicted != judged.labels).nonzero().flatten()
    surest = sorted(wrong.tolist(), key=lambda i: -confidence[i])[:64]
    assert title == f"LeNet-5 on Glyphs: 64 of {len(wrong)} wrong test images, the surest first"
    assert torch.equal(images, judged.images[surest])
    for i, caption in zip(surest, captions, strict=True):
        answer, label = predicted[i], judged.labels[i]
        assert caption == f"\u2717 {answer} ({confidence[i]:.1%})\nis {label}"


@pytest.mark.parametrize("mistakes", [0, 3, 64])
def test_few_mistakes_are_all_drawn_and_none_where_there_are_none(
    glyphs_run, tmp_path, monkeypatch, mistakes
):
    grids = []
    monkeypatch.setattr(utils, "plot_grid", lambda *args: grids.append(args))
    images, labels = torch.zeros(64, 28, 28, dtype=torch.uint8), torch.arange(64) % 10
    logits = torch.eye(10)[labels]
    logits[:mistakes] = logits[:mistakes].flip(1)
    checkpoint = load(glyphs_run, "best.pt")
    judge.draw_test_set(checkpoint, images, labels, logits, torch.arange(64), tmp_path)
    titles = [title.split(": ")[1] for _, _, title, *_ in grids]
    assert titles[1:] == (
        [f"all {mistakes} wrong test images, the surest first"] if mistakes else []
    )


def test_grid_shows_each_image_above_its_caption_in_green_or_red(tmp_path, figures):
    images, right = random_images(11), torch.arange(11) % 3 > 0
    captions = [f"$caption_{i}$\nline" for i in range(11)]  # no formula
    utils.plot_grid(images, captions, "title", tmp_path / "grid.png", right)
    figure = figures["grid.png"]
    [ax] = figure.axes
    canvas = np.asarray(ax.images[0].get_array())
    assert figure.get_suptitle() == "title"
    assert [text.get_text() for text in ax.texts] == captions
    places = [text.get_position() for text in ax.texts]
    for image, ok, text, (middle, under) in zip(images.numpy(), right, ax.texts, places):
        x, y = round(middle - 13.5), under - 29  # a pixel of frame is between
        assert (canvas[y : y + 28, x : x + 28] == image[..., None]).all()
        red, green, _ = to_rgb(text.get_color())
        assert (green > red) == bool(ok)
        frame = canvas[y - 1 : y + 29, x - 1 : x + 29]
        for edge in (frame[0], frame[-1], frame[:, 0], frame[:, -1]):
            assert (edge == np.round(255 * np.array(to_rgb(text.get_color())))).all()
    rows = sorted({y for _, y in places})
    assert [sum(y == row for _, y in places) for row in rows] == [8, 3]
    assert rows[1] - rows[0] >= 28 + 10  # two lines of text fit between
    assert len({x for x, _ in places}) == 8
    with Image.open(tmp_path / "grid.png") as picture:
        assert picture.width > 1200


def test_confusion_matrix_is_drawn_with_its_counts(tmp_path, figures):
    confusion, classes = torch.tensor([[8, 2, 0], [1, 0, 0], [0, 5, 5]]), ["ab", "cde", "f"]
    utils.plot_confusion(confusion, classes, "title", tmp_path / "confusion.png")
    ax = figures["confusion.png"].axes[0]
    assert ax.get_title() == "title"
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("Predicted class", "True class")
    for axis in (ax.xaxis, ax.yaxis):
        assert [label.get_text() for label in axis.get_ticklabels()] == classes
    shown = {text.get_position(): text for text in ax.texts}
    share = [[0.8, 0.2, 0], [1, 0, 0], [0, 0.5, 0.5]]
    assert np.asarray(ax.images[0].get_array()) == pytest.approx(np.array(share))
    assert ax.images[0].get_clim() == (0, 1)
    for row in range(3):
        for column in range(3):
            text = shown[column, row]
            assert text.get_text() == str(confusion[row, column].item())
            bright = np.mean(to_rgb(text.get_color())) > 0.9
            assert bright == (share[row][column] > 0.5)  # white on dark blue


def test_confusion_of_the_report_has_the_true_classes_in_rows(judged):
    ax = judged.figures["confusion.png"].axes[0]
    assert ax.get_title() in judged.out.getvalue()
    shown = {text.get_position(): int(text.get_text()) for text in ax.texts}
    for (column, row), count in shown.items():
        of_row = judged.labels == row
        assert count == (of_row & (judged.logits.argmax(1) == column)).sum()


def test_features_show_the_first_of_the_64_in_every_layer(judged):
    i, model = judged.sample[0].item(), network(judged.checkpoint)
    figure = judged.figures["features.png"]
    title = figure.get_suptitle()
    assert f"test image {i} of Glyphs, of class {judged.labels[i]}," in title
    tiles = [np.asarray(image.get_array()) for ax in figure.axes for image in ax.images]
    x = judged.x[i : i + 1]
    assert look_up(tiles[0], x[0, 0].numpy())
    with torch.no_grad():
        c1 = model.sig(model.c1((x - judged.checkpoint["mean"]) / judged.checkpoint["std"]))
        s2 = model.s2(c1)
        c3 = model.sig(model.c3(s2))
        s4 = model.s4(c3)
        c5 = model.sig(model.c5(s4))
        f6 = model.sig(model.f6(c5.flatten(1)))
    kernels = model.c1.weight.detach()[:, 0]
    for shown, maps in zip(tiles[1:], (kernels, c1[0], s2[0], c3[0], s4[0])):
        assert shown.size < 2 * maps.numel()
        assert all(look_up(shown, each.numpy()) for each in maps)
    for shown, units in zip(tiles[6:], (c5, f6), strict=True):
        assert shown.flatten() == pytest.approx(units.flatten().numpy(), abs=1e-5)
    for ax, maps in zip(figure.axes[2:], (c1, s2, c3, s4, c5, f6)):
        low, high = ax.images[0].get_clim()
        assert (low, high) == pytest.approx((maps.min().item(), maps.max().item()), abs=1e-5)
        assert (
            ax.get_xlabel()
            == f"{low:.{2 - (high - low >= 1)}f}\nto {high:.{2 - (high - low >= 1)}f}"
        )
    low, high = figure.axes[1].images[0].get_clim()
    assert high == -low == pytest.approx(kernels.abs().max().item())  # white is 0
    bars = [bar.get_width() for bar in figure.axes[-1].patches]
    assert bars == pytest.approx((100 * judged.logits[i].softmax(0)).tolist(), abs=0.01)
    assert figure.axes[-1].get_ylim() == (9.5, -0.5)  # class 0 at the top


# --- The page -------------------------------------------------------------------------------------


def page_data(path):
    """Return what is embedded in a page: a dict with an entry for each data set."""
    text = path.read_text(encoding="utf-8")
    return judge.json.loads(text.split('id="networks">')[1].split("</script>")[0])


def test_page_has_the_judged_weights_and_ten_test_images_of_each_class(judged):
    networks = page_data(picture_dir(judged.folder) / "lenet5.html")
    assert next(iter(networks)) == "Glyphs"  # the judged one is shown first
    assert {*networks} == {"Glyphs", "FashionMNIST", "MNIST"}
    mine, checkpoint = networks["Glyphs"], judged.checkpoint
    for key in ("classes", "mean", "std"):
        assert mine[key] == checkpoint[key]
    weights = torch.cat([weight.flatten() for weight in checkpoint["model"].values()])
    assert b64decode(mine["weights"]) == weights.numpy().tobytes()
    right, chosen = judged.logits.argmax(1) == judged.labels, []
    for digit in range(10):
        hits, misses = (
            (is_right & (judged.labels == digit)).nonzero().flatten().tolist()
            for is_right in (right, ~right)
        )
        chosen += [*hits[:7], *misses[:3]]
    assert b64decode(mine["samples"]) == judged.images[chosen].numpy().tobytes()
    assert mine["labels"] == [digit for digit in range(10) for _ in range(10)]
    logits = torch.frombuffer(bytearray(b64decode(mine["logits"])), dtype=torch.float32)
    torch.testing.assert_close(logits.view(100, 10), judged.logits[chosen], rtol=0, atol=1e-4)
    about = f"Run on Glyphs, epoch {checkpoint['epoch']}: {right.sum()} of 10,000 test images right"
    assert mine["about"] == about
    assert (mine["box"], mine["by_mass"]) == (20, False)
    shipped = page_data(ROOT / "images" / "lenet5.html")
    assert {name: networks[name] for name in shipped} == shipped


def test_page_that_comes_along_has_the_weights_that_come_along():
    for dataset, network_data in page_data(ROOT / "images" / "lenet5.html").items():
        path = ROOT / "checkpoints" / f"lenet5-{dataset.lower()}.pt"
        checkpoint = utils.load_checkpoint(path)
        weights = torch.cat([weight.flatten() for weight in checkpoint["model"].values()])
        assert b64decode(network_data["weights"]) == weights.numpy().tobytes()


def test_own_weights_take_the_place_of_the_shipped_ones(tmp_path):
    path, images = tmp_path / "page.html", random_images(20)
    checkpoint = utils.load_checkpoint(ROOT / "checkpoints" / "lenet5-mnist.pt")
    checkpoint["model"] = {name: weight + 1 for name, weight in checkpoint["model"].items()}
    judge.write_page(checkpoint, network(checkpoint), "about", images, torch.arange(20) % 10, path)
    networks, shipped = page_data(path), page_data(ROOT / "images" / "lenet5.html")
    assert [*networks] == ["MNIST", "FashionMNIST"]
    assert networks["MNIST"]["weights"] != shipped["MNIST"]["weights"]
    script = [
        page.read_text(encoding="utf-8").split("</script>", 1)[1]
        for page in (path, ROOT / "images" / "lenet5.html")
    ]
    assert script[0] == script[1]


# --- Which weights --------------------------------------------------------------------------------


def find(*line):
    path, _ = judge.find_checkpoint(judge.parse_args(list(map(str, line))))
    return path


def test_newest_run_is_taken_and_the_data_set_can_be_named(glyphs_run, tmp_path):
    source = run_dir(glyphs_run) / "best.pt"
    for age, dataset in enumerate(("Glyphs", "MNIST")):
        path = run_dir(tmp_path, dataset) / "best.pt"
        utils.save(load(glyphs_run, "best.pt") | {"dataset": dataset}, path)
        os.utime(path, (1000 - age, 1000 - age))
    folder = f"--output-dir={tmp_path}"
    assert find(folder) == run_dir(tmp_path) / "best.pt"
    assert find(folder, "--dataset=MNIST") == path
    assert find(folder, "--checkpoint", source) == source


def test_shipped_weights_are_taken_where_there_was_no_run(tmp_path, monkeypatch):
    monkeypatch.setattr(utils, "ROOT", tmp_path)  # a fresh checkout
    shipped = tmp_path / "checkpoints"
    shipped.mkdir()
    for path in (ROOT / "checkpoints").glob("*.pt"):
        shutil.copy(path, shipped)
    folder = f"--output-dir={tmp_path}"
    assert find(folder) == shipped / "lenet5-fashionmnist.pt"
    assert find(folder, "--dataset=MNIST") == shipped / "lenet5-mnist.pt"
    with pytest.raises(utils.Error, match=r"no run on Glyphs in .*: start one with train.py"):
        find(folder, "--dataset=Glyphs")


@pytest.mark.parametrize("name", ["mistyped", "checkpoints/Glyphs"])
def test_named_folder_without_a_run_is_refused(glyphs_run, name):
    """Mistyped, or the run's own folder: no other weights are judged instead."""
    before = files(glyphs_run)
    with pytest.raises(
        utils.Error, match=r"no run in .*: .* the folder that has checkpoints/NAME/best.pt"
    ):
        find(f"--output-dir={glyphs_run / name}")
    assert files(glyphs_run) == before
