"""Your own pictures: they come to look like the data set, or are refused."""

import importlib
import os

import numpy as np
import pytest
import torch
from photos import KINDS, recognised
from PIL import Image

import utils

judge = importlib.import_module("test")


def draw_seven(size=200, ink=0, paper=255, mode="L"):
    picture = Image.new(mode, (size, size * 2), paper)
    x, y, thick = 3 * size // 4, size // 2, size // 10
    picture.paste(ink, (size // 4, y, x, y + thick))
    for down in range(size):
        picture.paste(ink, (x - thick + 1 - down // 3, y + down, x + 1 - down // 3, y + down + 1))
    return picture


@pytest.fixture
def seen(tmp_path):
    def seen(picture, name="picture.png", dataset="MNIST", **how):
        picture.save(tmp_path / name, **how)
        return judge.load_picture(tmp_path / name, dataset)

    return seen


@pytest.fixture
def seven(seen):
    return seen(draw_seven())


def expect_same(image, other):
    assert (image.dtype, image.shape) == (torch.uint8, (28, 28))
    shifts = [other.roll((dy, dx), (0, 1)) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    assert min((image.float() - shifted.float()).abs().mean() for shifted in shifts) < 4


def test_picture_is_bright_on_black_scaled_and_centred_like_mnist(seven):
    rows, columns = (seven > 60).any(1).nonzero(), (seven > 60).any(0).nonzero()
    assert 19 <= rows.max() - rows.min() + 1 <= 20
    assert 8 <= columns.max() - columns.min() + 1 <= 20
    weight = seven.double()
    centre = [(weight * torch.arange(28.0).view(s)).sum() / weight.sum() for s in ((28, 1), (28,))]
    assert all(abs(c - 14) <= 0.5 for c in centre)
    assert seven.max() == 255
    assert not seven[0].any()


def test_article_fills_the_image_like_fashion_mnist(seen):
    assert seen(draw_seven(), dataset="FashionMNIST")[[0, 27]].any(dim=1).all()


def test_mode_of_the_picture_does_not_matter(seen, seven):
    black, white = (0, 0, 0, 255), (255, 255, 255, 255)
    expect_same(seen(draw_seven(ink=255, paper=0)), seven)
    expect_same(seen(draw_seven(ink=black, paper=(255, 0, 0, 0), mode="RGBA")), seven)
    expect_same(seen(draw_seven(ink=white, paper=(0, 0, 0, 0), mode="RGBA")), seven)
    expect_same(seen(Image.fromarray(np.uint16(draw_seven()) * 200 + 3000)), seven)
    expect_same(seen(draw_seven().convert("1")), seven)
    coloured = draw_seven(ink=(0, 0, 60), paper=(250, 250, 230), mode="RGB")
    expect_same(seen(coloured.convert("P"), "palette.gif"), seven)


def test_photo_is_turned_the_right_way_up(seen, seven):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    expect_same(seen(draw_seven().rotate(90, expand=True), "photo.jpg", exif=exif), seven)


def test_neither_size_nor_noisy_paper_matters(seen, seven):
    expect_same(seen(draw_seven().resize((2000, 4000))), seven)
    noisy = np.random.default_rng(0).normal(draw_seven(ink=40, paper=200), 4)
    expect_same(seen(Image.fromarray(noisy.round().astype(np.uint8))), seven)


@pytest.mark.parametrize(("width", "height"), [(2, 2), (1, 3), (3000, 2)])
def test_tiny_and_thin_pictures_work(seen, width, height):
    pixels = np.zeros((height, width), dtype=np.uint8)
    pixels[height // 2, width // 2] = 255
    assert seen(Image.fromarray(pixels)).max() == 255


@pytest.mark.filterwarnings("error")  # which would be lines on standard error
def test_pictures_that_cannot_be_used_are_refused_in_one_line(tmp_path):
    for name, text in (("text.png", "no picture"), ("empty.png", ""), ("page.pdf", "%PDF-1.4\n")):
        (tmp_path / name).write_text(text)
    program = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    (tmp_path / "code.eps").write_text(program)  # which Pillow would hand to Ghostscript
    (tmp_path / "folder.png").mkdir()
    Image.new("1", (20_000, 20_000)).save(tmp_path / "huge.png")
    draw_seven(20).save(tmp_path / "half.png")
    os.truncate(tmp_path / "half.png", (tmp_path / "half.png").stat().st_size // 2)
    messages = {path.name: "is no picture that can be read" for path in tmp_path.iterdir()}
    Image.new("1", (12_000, 12_000)).save(tmp_path / "large.png")
    Image.new("L", (1, 1)).save(tmp_path / "dot.png")
    Image.new("RGB", (50, 50), (9, 80, 200)).save(tmp_path / "plain.png")
    frames = [Image.new("L", (20, 20), shade) for shade in (0, 255)]
    frames[0].save(tmp_path / "film.gif", save_all=True, append_images=frames[1:])
    messages |= {"missing.png": "does not exist", "large.png": "is too large: 12000x12000 pixels"}
    messages |= dict.fromkeys(["dot.png", "plain.png"], "shows nothing that stands out")
    messages |= {"film.gif": "is animated", "code.eps": "cannot identify image file"}
    for name, message in messages.items():
        with pytest.raises(utils.Error, match=f"{name}.* {message}") as caught:
            judge.load_picture(tmp_path / name, "MNIST")
        assert "\n" not in str(caught.value), name


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("side", [40, 1500])
def test_pixels_that_are_no_numbers_are_refused(seen, value, side):
    pixels = np.zeros((side, side), dtype=np.float32)
    pixels[10:30, 10:30] = 1
    assert seen(Image.fromarray(pixels), "good.tiff").max() == 255
    pixels[20, 20] = float(value)
    with pytest.raises(utils.Error, match=r"bad\.tiff has pixels that are no numbers"):
        seen(Image.fromarray(pixels), "bad.tiff")


def test_images_of_mnist_come_through_almost_unchanged(real_data, seen):
    images, _ = utils.load_images("MNIST", real_data, "test")
    for image in images[:50]:
        again = seen(Image.fromarray(255 - image.numpy()))
        assert (again.float() - image.float()).abs().mean() < 2


def test_photographed_digits_are_recognised(real_data, tmp_path):
    """Few of each kind, as it takes time; `python tests/photos.py` makes more."""
    data = utils.load_images("MNIST", real_data, "test")
    right = {kind: recognised(kind, 5, *data, tmp_path).sum().item() for kind in KINDS}
    assert min(right.values()) >= 4, right
    assert sum(right.values()) >= 0.97 * 5 * len(KINDS), right


def test_the_widest_range_of_levels_works(seen, seven):
    pixels = np.where(np.array(draw_seven()) < 128, -3e38, 3e38).astype(np.float32)
    expect_same(seen(Image.fromarray(pixels), "float.tiff"), seven)


def test_digit_cropped_to_its_edges_is_seen_as_without(seen, seven):
    rows, columns = (np.array(draw_seven()) < 128).nonzero()
    box = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
    crop = draw_seven().crop(box)
    crop.paste(0, (4, 150, 9, 155))  # a speck
    expect_same(seen(crop), seven)


@pytest.mark.parametrize("dataset", ["MNIST", "FashionMNIST"])
def test_light_from_one_side_does_not_matter(seen, dataset):
    picture = np.array(draw_seven(ink=40, paper=230), dtype=float)
    light = np.linspace(1, 0.45, picture.shape[1])
    even, uneven = (Image.fromarray(p.astype(np.uint8)) for p in (picture, picture * light))
    one, other = seen(even, dataset=dataset), seen(uneven, dataset=dataset)
    assert (one.float() - other.float()).abs().mean() < (4 if dataset == "MNIST" else 12)


def test_blank_grainy_paper_is_refused(seen):
    grain = np.random.default_rng(0).normal(210, 4, (500, 400)).astype(np.uint8)
    with pytest.raises(utils.Error, match=r"shows nothing that stands out from its background"):
        seen(Image.fromarray(grain), "paper.jpg")


def test_animation_cut_in_its_second_frame_is_refused(tmp_path):
    frames = [draw_seven(40, ink=shade).convert("P") for shade in (0, 90)]
    path = tmp_path / "film.gif"
    frames[0].save(path, save_all=True, append_images=frames[1:])
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(utils.Error, match=r"film\.gif is no picture that can be read"):
        judge.load_picture(path, "MNIST")


@pytest.mark.filterwarnings("error")
def test_damaged_exif_does_not_hide_the_picture(seen, seven):
    cut = b"Exif\0\0MM\0*\0\0\0\x08\0\x09\x01\x12"
    expect_same(seen(draw_seven(), "photo.jpg", exif=cut), seven)
