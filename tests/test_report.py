"""test.py and images/compare.py: which runs they take, what they report and what they draw."""

import contextlib
import inspect
import io
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
    m = LeNet().requires_grad_(False)
    m.load_state_dict(saved["model"])
    outputs = [(F.pad(images / 255, [2] * 4)[:, None] - saved["mean"]) / saved["std"]]
    for layer in (m.c1, m.sig, m.s2, m.c3, m.sig, m.s4, m.c5, m.sig, m.flatten, m.f6, m.sig, m.f7):
        outputs.append(layer(outputs[-1]))
    return [outputs[i] for i in (2, 3, 5, 6, 8, 11, 12)]  # after the activations


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
    seeds = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    samples = [torch.randperm(400, generator=seed)[:64].tolist() for seed in seeds]
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
    hits, sampled = sum(correct), sum(correct[i] for i in report.samples[0])
    low, high = [100 * bound for bound in evaluate.wilson_interval(hits, 400)]
    expected = f"""
        Weights: {report.directory}/checkpoints/Glyphs/best.pt, epoch {report.saved["epoch"]}
        of a run on Glyphs
        Test accuracy on Glyphs: {hits / 400:.2%} ({hits}/400, 95% CI {low:.2f}-{high:.2f})
        Test loss on Glyphs: {F.cross_entropy(report.layers[-1], report.labels):.4f} (400 images)
        True class Accuracy Most often confused with {rows}
        Accuracy on 64 random test images: {sampled / 64:.1%} ({sampled}/64)
        Pictures: {report.directory}/images/Glyphs
        Page: {report.directory}/images/Glyphs/lenet5.html: open it in a browser and draw"""
    assert report.out.split() == expected.split()
    ax = report.figures["confusion.png"].axes[0]
    assert (ax.get_ylabel(), ax.get_xlabel()) == ("True class", "Predicted class")
    totals = report.labels.bincount().tolist()
    for text in ax.texts:
        label, guess = text.get_position()[::-1]
        assert int(text.get_text()) == report.pairs.count((label, guess))
        fraction = report.pairs.count((label, guess)) / totals[label]
        assert ax.images[0].get_array()[label, guess] == pytest.approx(fraction)


@pytest.mark.parametrize("dataset", ["FashionMNIST", "MNIST"])
def test_pretrained_weights_are_portable_and_as_good_as_stated(real_data, dataset):
    file = f"checkpoints/lenet5-{dataset.lower()}.pt"
    saved = torch.load(ROOT / file, weights_only=True)
    assert utils.first_change(saved["code"], inspect.getsource(LeNet)) == ""
    for w in saved["model"].values():
        assert (w.is_contiguous(), w.is_cpu, w.dtype) == (True, True, torch.float32)
    images, labels = utils.load_images(dataset, real_data, "test")
    correct = (layer_outputs(saved, images)[-1].argmax(1) == labels).sum()
    results = (ROOT / "tests" / "README.md").read_text(encoding="utf-8")
    stated = int(re.search(rf"{file}.*\((\d+)/10000\)", results)[1])
    assert abs(correct - stated) <= 3  # processors round differently


def test_pretrained_weights_are_taken_only_without_a_matching_run(report, tmp_path, error_of):
    own = tmp_path / "checkpoints" / "mine" / "best.pt"
    utils.save(report.saved, own)
    pretrained = ROOT / "checkpoints" / "lenet5-fashionmnist.pt"
    common = [f"--output-dir={tmp_path}", f"--data-dir={tmp_path / 'data'}"]
    common += [f"--image={ROOT / 'images' / 'lenet5.png'}"]
    for argv, path in ([], own), (["--dataset=FashionMNIST"], pretrained):
        out, _ = run(evaluate.main, *common, *argv)
        assert out.startswith(f"Weights: {utils.shown(path)}, epoch ")
    assert not (tmp_path / "data").exists()  # own pictures do not need the test split
    assert "no run named mine" in error_of(evaluate.main, *common, "--name=mine", "--dataset=MNIST")


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
    errors = report.confidence[report.predicted != report.labels].sort(descending=True)[0][:64]
    expected = report.confidence[report.samples[0]] if name == "predict" else errors
    assert report.confidence[drawn].tolist() == pytest.approx(expected.tolist())


def test_features_are_the_outputs_of_all_layers(report):
    *outputs, logits = [layer[report.samples[0][0]] for layer in report.layers]
    axes = report.figures["features.png"].axes
    for ax, maps in zip(axes[2:-1], outputs, strict=True):
        tiles = torch.tensor(np.ma.filled(ax.images[0].get_array(), np.nan))
        torch.testing.assert_close(tiles[tiles.isfinite()].sort()[0], maps.flatten().sort()[0])
        height, width = (*maps.shape, 1, 1)[1:3]
        torch.testing.assert_close(tiles[:height, :width], maps[0].view(height, width))
    bars = [bar.get_width() for bar in axes[-1].patches]
    assert bars == pytest.approx((100 * logits.softmax(0)).tolist(), abs=1e-3)
    low, high = axes[1].images[0].get_clim()  # of the kernels
    assert -low == high == report.saved["model"]["c1.weight"].abs().max()


def test_changed_network_is_shown_correctly_or_not_at_all(report, options, tmp_path):
    class Softmax(LeNet):
        def forward(self, x):
            return super().forward(x).softmax(dim=1)

    class Branches(LeNet):
        def forward(self, x):
            return 0.5 * super().forward(x) + 0.5 * super().forward(x)

    path, pictures = tmp_path / "last.pt", tmp_path / "images" / "new"
    argv = [*options(tmp_path), f"--checkpoint={path}", "--name=new", "--seed=1"]
    utils.save(report.saved | {"logits": report.saved["logits"].softmax(1)}, path)
    out, figures = run(evaluate.main, *argv, network=Softmax)
    bars = [bar.get_width() for bar in figures["features.png"].axes[-1].patches]
    expected = 100 * report.layers[-1][report.samples[1][0]].softmax(0)  # not applied twice
    assert bars == pytest.approx(expected.tolist(), abs=1e-3)
    captions, expected = [f["mistakes.png"].axes[0].texts for f in (figures, report.figures)]
    assert [text.get_text() for text in captions] == [text.get_text() for text in expected]
    utils.save(report.saved, path)
    (pictures / "features.png").touch()
    out, figures = run(evaluate.main, *argv, network=Branches)
    assert re.search(r"\nPage:     not written, because .* cannot be shown: .+\n$", out)
    assert "features.png" not in figures
    assert list(pictures.iterdir()) == []


def test_perfect_classes_with_odd_matplotlib_settings(report, options, tmp_path, capsys):
    cache, written = tmp_path / "Glyphs" / f"test-v{utils.CACHE_VERSION}.pt", []
    plot = report.directory / "images" / "Glyphs" / "metrics.png"  # is already drawn once
    images = report.images[report.predicted == 2][:9]
    utils.save({"images": images, "labels": torch.full([9], 2)}, cache)
    for size, family in ((10, "sans-serif"), (30, "monospace")):
        with matplotlib.rc_context({"font.size": size, "font.family": family}):
            evaluate.main([*options(report.directory), f"--data-dir={tmp_path}"])
            compare.main([f"--output-dir={report.directory}"])
            if size == 30:
                plots.plot_metrics(checkpoint(report.directory)["history"], "Glyphs", plot)
            assert matplotlib.rcParams["font.size"] == size
        written.append({path.name: path.read_bytes() for path in report.directory.rglob("*.png")})
    assert written[0] == written[1]
    assert re.search(r"\n2 +100\.0% \(9/9\) +-\n3 +0\.0% \(0/0\) +-\n", capsys.readouterr().out)


def test_runs_are_compared_and_drawn_by_validation_set(report, tmp_path, error_of):
    assert "there is no run in" in error_of(compare.main, f"--output-dir={tmp_path}")
    saved = report.saved
    code, options = saved["code"].replace("Sigmoid", "ReLU"), saved["options"] | {"limit": 9}
    for name, changes in ("plain", {}), ("relu", {"code": code}), ("short", {"options": options}):
        utils.save(saved | changes, tmp_path / "checkpoints" / name / "last.pt")
    out, figures = run(compare.main, f"--output-dir={tmp_path}")
    losses, accuracies = [[row[name] for row in saved["history"]] for name in utils.METRICS[4:]]
    assert out.count(f" Glyphs   2 of 4  {max(accuracies):.2%} ") == 3
    assert [line.split("  ")[-1] for line in out.splitlines()[1:-1]] == [
        "limit 1500; self.sig = nn.Sigmoid()",
        "limit 1500; self.sig = nn.ReLU()",
        "limit 9; self.sig = nn.Sigmoid()",
    ]
    axes = figures["compare.png"].axes
    curves = [{line.get_label(): line.get_ydata().tolist() for line in ax.lines} for ax in axes]
    assert curves[:2] == [{"plain": values, "relu": values} for values in (losses, accuracies)]
    assert curves[2:] == [{"short": losses}, {"short": accuracies}]
