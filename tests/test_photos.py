"""Your own pictures: they are converted to look like the dataset, and classified or rejected."""

import os
import re
import sys

import numpy as np
import pytest
import torch
from conftest import evaluate
from PIL import Image, ImageDraw
from simulated_photos import classify

import utils
from images import photos, plots


def draw_seven(size=200, ink=0, paper=255, mode="L", width=None):
    picture = Image.new(mode, (size, 2 * size), paper)
    right, top = 3 * size // 4, size // 2
    points = [(size // 4, top), (right, top), (right - size // 3, top + size)]
    ImageDraw.Draw(picture).line(points, ink, width or size // 10, joint="curve")
    return picture


@pytest.fixture
def convert(tmp_path):
    def convert(picture, name="picture.png", dataset="MNIST", **save_options):
        if isinstance(picture, np.ndarray):
            picture = Image.fromarray(picture.clip(0, 255).astype(np.uint8))
        picture.save(tmp_path / name, **save_options)
        return photos.load_picture(tmp_path / name, utils.DATASETS[dataset])

    return convert


@pytest.fixture
def run_test(run_script, tmp_path):
    """Run test.py with the pretrained weights for MNIST; return status, output and error."""
    options = ["--dataset=MNIST", f"--output-dir={tmp_path}"]
    return lambda *argv: run_script(evaluate.main, *options, *argv)


def difference(one, other):
    return (one.float() - other.float()).abs().mean().item()


@pytest.mark.parametrize("size", [60, 200, 600])
def test_object_has_the_size_and_position_of_the_dataset(convert, size):
    for dataset, height, center in (
        ("MNIST", 20, 14),  # of mass
        ("Glyphs", 20, 13.5),  # of the bounding box
        ("FashionMNIST", 28, 13.5),
    ):
        image = convert(draw_seven(size), dataset=dataset)
        assert (image.dtype, image.shape, image.max()) == (torch.uint8, (28, 28), 255)
        rows, columns = (image > 90).nonzero().double().T
        assert height - 1 <= rows.max() - rows.min() + 1 <= height
        centers = [(places.min() + places.max()).item() / 2 for places in (rows, columns)]
        if dataset == "MNIST":
            centers = [np.average(range(28), weights=image.sum(axis)) for axis in (1, 0)]
        assert centers == pytest.approx([center, center], abs=0.51 if center == 13.5 else 0.3)


def test_file_format_orientation_light_and_noise_do_not_matter(convert, recwarn):
    rotated, damaged = Image.Exif(), b"Exif\0\0MM\0*\0\0\0\x08\0\x09\x01\x12"
    rotated[0x0112] = 6
    blue = draw_seven(ink=(0, 0, 60), paper=(250, 250, 230), mode="RGB")
    wide = np.pad(draw_seven(ink=40, paper=230), ((0, 0), (280, 20)), constant_values=230)
    for picture, name, save_options in (
        (draw_seven(ink=255, paper=0), "inverted.png", {}),
        (draw_seven(ink=(0, 0, 0, 255), paper=(0, 0, 0, 0), mode="RGBA"), "transparent.png", {}),
        (blue.convert("P"), "palette.gif", {}),
        (blue.convert("CMYK"), "print.jpg", {}),
        (draw_seven().rotate(90, expand=True), "turned.jpg", {"exif": rotated}),
        (draw_seven(), "damaged.jpg", {"exif": damaged}),
        (draw_seven().resize((2000, 4000)), "large.png", {}),
        (wide + np.random.default_rng(0).normal(0, 6, wide.shape), "noise.png", {}),
        (wide * np.linspace(1, 0.3, 500), "light.png", {}),  # from one side
        (wide * np.where(np.arange(500) < 60, 0.4, 1), "shadow.png", {}),  # at the border
    ):
        assert difference(convert(picture, name, **save_options), convert(draw_seven())) < 6, name
    assert not recwarn.list  # such as of damaged EXIF data


@pytest.mark.parametrize(("dataset", "limit"), [("MNIST", 5), ("FashionMNIST", 1)])
def test_images_of_the_dataset_stay_nearly_as_they_are(real_data, convert, dataset, limit):
    images, _ = utils.load_images(dataset, real_data, "test")
    changes = []
    for i, image in enumerate(images[:100].numpy()):
        picture = image if i % 2 else 255 - image
        changes.append(difference(convert(picture, dataset=dataset), images[i]))
    assert np.quantile(changes, 0.85) < limit


def test_simulated_photos_are_recognized(real_data, tmp_path):
    images, labels = utils.load_images("MNIST", real_data, "test")
    correct = {kind: right.tolist() for kind, right in classify(4, images, labels, tmp_path)}
    assert np.mean(list(correct.values())) >= 0.94, correct


def test_blank_sheet_with_grain_is_rejected(convert):
    for seed in range(12):
        sheet = np.random.default_rng(seed).normal(210, 2 * seed, (600, 800))
        with pytest.raises(utils.Error, match="no object found"):
            convert(sheet, "sheet.bmp")


@pytest.mark.parametrize("size", [14, 50, 200])
def test_thin_strokes_are_recognized(run_test, tmp_path, size):
    draw_seven(size, width=1 + size // 100).save(tmp_path / "thin.png")
    assert "thin.png: 7 (" in run_test("--image", tmp_path)[1]


def test_bad_pictures_are_rejected_in_one_line_each(run_test, tmp_path):
    names = "text.png half.png code.eps empty huge.png nan.tiff blank.png missing.png".split()
    paths = [tmp_path / name for name in names]
    text, half, eps, empty, huge, nan, blank, _ = paths
    text.write_text("not a picture")
    draw_seven().save(half)
    os.truncate(half, half.stat().st_size // 2)
    draw_seven().save(eps)
    empty.mkdir()
    Image.new("1", (20_000, 20_000)).save(huge)
    Image.fromarray(np.float32([[0, 0, np.nan], [0, 1, 0]])).save(nan)
    Image.new("L", (50, 50), 255).save(blank)
    draw_seven().save(tmp_path / "good.png")
    status, out, err = run_test("--image", *paths, tmp_path / "good.png")
    assert re.findall(r"(\w+)\.png: 7 \(", out) == ["good"]
    *lines, last = err.splitlines()
    for line, path in zip(lines, paths, strict=True):
        assert re.fullmatch(rf"Warning: cannot (read|use) {path}: .+", line)
    assert "cannot identify" in lines[2]  # as a program would be started to read EPS
    assert (status, last) == (2, "test.py: error: 8 of 9 pictures could not be used")


def test_pictures_in_directories_and_of_several_options_are_classified(run_test, tmp_path):
    album = tmp_path / "album"
    (album / "inside").mkdir(parents=True)
    single = tmp_path / os.fsdecode(b"\xff.png" if sys.platform == "linux" else b"f.png")
    for path in ("$^$.png", "A.JPG", "c.WebP", ".hidden.png", "notes.eps", "inside/d.png", single):
        draw_seven(60).save(album / path)
    status, out, err = run_test("--image", album, "--image", single)
    assert (status, err) == (0, "")
    _, *lines, last = out.splitlines()
    paths = [album / "$^$.png", album / "A.JPG", album / "c.WebP", single]
    for line, path in zip(lines, paths, strict=True):
        name = re.escape(str(path).encode(errors="backslashreplace").decode())
        pattern = rf"{name}: 7 \((.*)%\), \d \((.*)%\), \d \((.*)%\)"
        percents = [float(percent) for percent in re.fullmatch(pattern, line).groups()]
        assert percents == sorted(percents, reverse=True)
        assert 90 < sum(percents) < 100.2
    assert last == f"Picture: {tmp_path / 'images' / 'own.png'}"


def test_first_64_of_many_pictures_are_drawn(run_test, tmp_path, monkeypatch):
    figures, names = [], [f"{i}.png" for i in range(10, 80)]
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: figures.append(figure))
    for size, name in enumerate(names, start=20):
        draw_seven(size).save(tmp_path / name)
    _, out, _ = run_test("--image", tmp_path)
    results = re.findall(r"(\d\d\.png): (\d \(.*?%\)),", out)
    assert [name for name, _ in results] == names
    captions = [text.get_text() for text in figures[0].axes[0].texts]
    assert captions == ["\n".join(result) for result in results[:64]]
