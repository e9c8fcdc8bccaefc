"""test.py and images/compare.py: which runs they take, what they report and what they draw."""

import contextlib
import io
import os
import re
import shutil
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, checkpoint, evaluate
from matplotlib.colors import to_rgb

import utils
from images import compare, plots
from model import LeNet


def run(main, *argv, network=LeNet):
    """Run a script, but write no PNG; return what it prints, and its figures by file name."""
    figures, out = {}, io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.setattr(plots, "save_figure", lambda f, path: figures.update({path.name: f}))
        patch.setattr(evaluate, "LeNet", network)
        main(argv)
    return out.getvalue(), figures


def layer_outputs(saved, images):
    """Compute the outputs of all layers with plain torch (images: uint8, N x 28 x 28)."""
    model = LeNet().requires_grad_(False)
    model.load_state_dict(saved["model"])
    x = (F.pad(images / 255, [2] * 4)[:, None] - saved["mean"]) / saved["std"]
    c1 = model.c1(x).sigmoid()
    s2 = F.avg_pool2d(c1, 2)
    c3 = model.c3(s2).sigmoid()
    s4 = F.avg_pool2d(c3, 2)
    c5 = model.c5(s4).sigmoid()
    f6 = model.f6(c5.flatten(1)).sigmoid()
    return [c1, s2, c3, s4, c5, f6, model.f7(f6)]


def sample_of(seed, count=64):
    return torch.randperm(400, generator=torch.Generator().manual_seed(seed))[:count].tolist()


@pytest.fixture(scope="module")
def report(finished_run, options, data_dir, tmp_path_factory):
    """What test.py prints and draws, and the predictions computed from scratch."""
    directory = shutil.copytree(finished_run, tmp_path_factory.mktemp("report") / "run")
    out, figures = run(evaluate.main, *options(directory))
    saved = checkpoint(directory, "best.pt")
    images, labels = utils.load_images("Glyphs", data_dir, "test")
    layers = layer_outputs(saved, images)
    confidence, predicted = layers[-1].softmax(1).max(1)
    pairs = list(zip(labels.tolist(), predicted.tolist()))
    return SimpleNamespace(**locals())


def test_report_and_confusion_matrix_agree_with_a_count_from_scratch(report):
    for num_correct, low, high in ((0, 0, 0.2775), (5, 0.2366, 0.7634), (9, 0.5958, 0.9821)):
        assert evaluate.wilson_interval(num_correct, 10) == pytest.approx((low, high), abs=1e-4)
    rows = ""
    for digit in range(10):
        counts = [report.pairs.count((digit, other)) for other in range(10)]
        total, hits, counts[digit] = sum(counts), counts[digit], 0
        rows += f"{digit} {hits / total:.1%} ({hits}/{total}) "
        rows += f"{counts.index(max(counts))} ({max(counts)})\n"
    correct = [label == guess for label, guess in report.pairs]
    hits, sampled = sum(correct), sum(correct[i] for i in sample_of(seed=0))
    low, high = [100 * bound for bound in evaluate.wilson_interval(hits, 400)]
    expected = f"""
        Weights: {report.directory}/checkpoints/Glyphs/best.pt, epoch {report.saved["epoch"]}
        of a run on Glyphs
        Test accuracy on Glyphs: {hits / 400:.2%} ({hits}/400, 95% CI {low:.2f}-{high:.2f})
        Test loss on Glyphs: {F.cross_entropy(report.layers[-1], report.labels):.4f} (400)
        True class Accuracy Most often confused with {rows}
        Accuracy on 64 random test images: {sampled / 64:.1%} ({sampled}/64)
        Pictures: {report.directory}/images/Glyphs
        Page: {report.directory}/images/Glyphs/lenet5.html: open it in a browser and draw"""
    assert report.out.split() == expected.split()
    for text in report.figures["confusion.png"].axes[0].texts:
        assert int(text.get_text()) == report.pairs.count(text.get_position()[::-1])


@pytest.mark.parametrize("dataset", ["FashionMNIST", "MNIST"])
def test_pretrained_weights_are_portable_and_as_good_as_stated(real_data, dataset):
    file = f"checkpoints/lenet5-{dataset.lower()}.pt"
    saved = torch.load(ROOT / file, weights_only=True)
    weights = saved["model"].values()
    assert all(w.is_contiguous() and w.is_cpu and w.dtype == torch.float32 for w in weights)
    images, labels = utils.load_images(dataset, real_data, "test")
    correct = (layer_outputs(saved, images)[-1].argmax(1) == labels).sum()
    results = (ROOT / "tests" / "README.md").read_text(encoding="utf-8")
    stated = int(re.search(rf"{file}.*\((\d+)/10000\)", results)[1])
    assert abs(correct - stated) <= 3  # processors round differently


def test_newest_or_selected_run_or_else_pretrained_weights_are_evaluated(
    report, tmp_path, error_of
):
    new, old = [tmp_path / "checkpoints" / name / "best.pt" for name in ("new", "old")]
    for path, dataset, time in ((new, "Glyphs", 2000), (old, "MNIST", 1000)):
        utils.save(report.saved | {"dataset": dataset}, path)
        os.utime(path, (time, time))
    pretrained = ROOT / "checkpoints" / "lenet5-fashionmnist.pt"
    common = [f"--output-dir={tmp_path}", f"--data-dir={tmp_path / 'data'}"]
    common += [f"--image={ROOT / 'images' / 'lenet5.png'}"]
    for argv, path in (
        ([], new),
        (["--name=old"], old),
        (["--dataset=MNIST"], old),
        ([f"--checkpoint={old}"], old),
        (["--dataset=FashionMNIST"], pretrained),
    ):
        out, _ = run(evaluate.main, *common, *argv)
        assert out.startswith(f"Weights: {utils.shown(path)}, epoch ")
    for argv in (["--name=mine", "--dataset=FashionMNIST"], ["--name=new", "--dataset=MNIST"]):
        assert "there is no run named" in error_of(evaluate.main, *common, *argv)
    assert not (tmp_path / "data").exists()  # the test split was not loaded


@pytest.mark.parametrize("name", ["predict", "mistakes"])
def test_images_are_in_order_above_captions_in_green_or_red(report, name):
    [ax] = report.figures[f"{name}.png"].axes
    canvas, drawn = torch.tensor(np.asarray(ax.images[0].get_array())), []
    for text, frame in zip(ax.texts, ax.patches, strict=True):
        x, y = round(text.get_position()[0] - 13.5), text.get_position()[1] - 29
        i = (report.images == canvas[y : y + 28, x : x + 28]).all(2).all(1).nonzero().item()
        label, guess = report.pairs[i]
        end = "" if label == guess else f"\ntrue: {label}"
        percent = re.fullmatch(rf"{'✗' if end else '✓'} {guess} \((.*)%\){end}", text.get_text())[1]
        assert float(percent) == pytest.approx(100 * report.confidence[i].item(), abs=0.06)
        for red, green, _ in (to_rgb(text.get_color()), to_rgb(frame.get_edgecolor())):
            assert (green > red) == (label == guess)
        drawn.append(i)
    if name == "predict":
        assert drawn == sample_of(seed=0)
    else:
        errors = report.confidence[report.predicted != report.labels].sort(descending=True)[0]
        assert report.confidence[drawn].tolist() == pytest.approx(errors[:64].tolist())


def bars(figures):
    return [bar.get_width() / 100 for bar in figures["features.png"].axes[-1].patches]


def test_features_are_the_outputs_of_all_layers(report):
    [index] = sample_of(seed=0, count=1)
    *outputs, logits = [layer[index] for layer in report.layers]
    axes = report.figures["features.png"].axes
    for ax, maps in zip(axes[2:-1], outputs, strict=True):
        tiles = torch.tensor(np.ma.filled(ax.images[0].get_array(), np.nan))
        torch.testing.assert_close(tiles[tiles.isfinite()].sort()[0], maps.flatten().sort()[0])
    assert bars(report.figures) == pytest.approx(logits.softmax(0).tolist(), abs=1e-5)
    low, high = axes[1].images[0].get_clim()  # of the kernels
    assert -low == high == report.saved["model"]["c1.weight"].abs().max()


def test_softmax_in_forward_is_not_applied_twice(report, options, tmp_path):
    class Softmax(LeNet):
        def forward(self, x):
            return super().forward(x).softmax(dim=1)

    utils.save(report.saved | {"logits": report.saved["logits"].softmax(1)}, tmp_path / "new.pt")
    argv = [*options(tmp_path), f"--checkpoint={tmp_path / 'new.pt'}", "--name=new", "--seed=1"]
    out, figures = run(evaluate.main, *argv, network=Softmax)
    assert f"Pictures: {tmp_path / 'images' / 'new'}\n" in out
    expected = report.layers[-1][sample_of(seed=1, count=1)].softmax(1)
    assert bars(figures) == pytest.approx(expected[0].tolist(), abs=1e-5)
    captions, expected = [f["mistakes.png"].axes[0].texts for f in (figures, report.figures)]
    assert [text.get_text() for text in captions] == [text.get_text() for text in expected]


def test_network_that_cannot_be_shown_has_no_page_and_no_features(report, options, tmp_path):
    class Branches(LeNet):
        def forward(self, x):
            return 0.5 * super().forward(x) + 0.5 * super().forward(x)

    directory = shutil.copytree(report.directory, tmp_path / "run")
    (directory / "images" / "Glyphs" / "features.png").touch()  # of an earlier network
    out, figures = run(evaluate.main, *options(directory), network=Branches)
    assert re.search(r"\nPage:     not written, because .* cannot be shown: .+\n$", out)
    assert "features.png" not in figures
    assert {path.suffix for path in (directory / "images" / "Glyphs").iterdir()} == {".csv", ".png"}
    assert not (directory / "images" / "Glyphs" / "features.png").exists()


def test_classes_without_errors_or_images_with_any_matplotlib_settings(
    report, options, tmp_path, capsys
):
    cache, written = tmp_path / "Glyphs" / f"test-v{utils.CACHE_VERSION}.pt", []
    images = report.images[report.predicted == 2][:9]
    utils.save({"images": images, "labels": torch.full([9], 2)}, cache)
    directory = shutil.copytree(report.directory, tmp_path / "run")
    for size, color in ((10, "white"), (30, "black")):
        with matplotlib.rc_context({"font.size": size, "axes.facecolor": color}):
            evaluate.main([*options(directory), f"--data-dir={tmp_path}"])
            compare.main([f"--output-dir={directory}"])
            plots.plot_metrics(report.saved["history"], "Glyphs", directory / "metrics.png")
            assert matplotlib.rcParams["font.size"] == size
        written.append({path.name: path.read_bytes() for path in directory.rglob("*.png")})
    assert written[0] == written[1]
    assert "mistakes.png" not in written[0]
    assert re.search(r"\n2 +100\.0% \(9/9\) +-\n3 +0\.0% \(0/0\) +-\n", capsys.readouterr().out)


def test_runs_are_compared(report, tmp_path, error_of):
    assert "there is no run in" in error_of(compare.main, f"--output-dir={tmp_path}")
    last = checkpoint(report.directory)
    for name, old, new in (("full", "'full': False", "'full': True"),):
        pass
