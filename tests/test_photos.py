"""Your own pictures: they come to look like the data set, or are refused."""

import os
import re

import numpy as np
import pytest
import torch
from conftest import judge, options, run_dir
from photos import KINDS, recognised
from PIL import Image, ImageDraw, features

import utils

WEIGHTS = utils.ROOT / "checkpoints" / "lenet5-mnist.pt"


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
        return judge.load_picture(tmp_path / name, dataset)[-1]

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
    messages |= {"folder.png": "is a folder without pictures"}
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


@pytest.mark.parametrize(("dataset", "same"), [("MNIST", 98), ("FashionMNIST", 90)])
def test_images_of_the_data_set_come_through_unchanged(real_data, seen, dataset, same):
    images, _ = utils.load_images(dataset, real_data, "test")
    pictures = [
        Image.fromarray(255 * (i % 2) ^ image.numpy()) for i, image in enumerate(images[:100])
    ]
    again = torch.stack([seen(picture, dataset=dataset) for picture in pictures])
    distance = (again.float() - images[:100].float()).abs().mean(dim=(1, 2))
    assert (distance < 2).sum() >= same


@pytest.mark.parametrize(("height", "top"), [(28, 0), (27, 1), (20, 4), (19, 5), (18, 5)])
def test_objects_are_centred_as_the_data_set_is(height, top):
    bar = torch.ones(28, height).T if height < 28 else torch.ones(28, 28)
    rows = judge.fit(bar, 28, by_mass=False).any(dim=1).nonzero()
    assert (rows.min(), rows.max()) == (top, top + height - 1)


def test_centre_of_mass_is_in_the_middle_pixel():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        image = judge.fit(torch.rand(20, 20, generator=generator) ** 4, 20, by_mass=True).double()
        for axis in (0, 1):
            middle = image.sum(dim=1 - axis) @ torch.arange(28.0).double() / image.sum()
            assert 13.5 < middle <= 14.5


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


STROKES = {  # of thin digits, in a square from (0, 0) to (1, 1)
    6: [
        (0.8, 0),
        (0.4, 0.2),
        (0.1, 0.7),
        (0.3, 1),
        (0.7, 1),
        (0.9, 0.75),
        (0.6, 0.6),
        (0.15, 0.75),
    ],
    4: [(0.3, 0), (0.1, 0.55), (0.9, 0.55), (0.7, 0.55), (0.75, 0), (0.7, 1)],
    9: [(0.9, 0.3), (0.5, 0), (0.1, 0.25), (0.4, 0.5), (0.85, 0.3), (0.8, 1)],
    5: [(0.9, 0), (0.3, 0), (0.25, 0.45), (0.7, 0.45), (0.85, 0.75), (0.6, 1), (0.15, 0.95)],
}


def draw_thin(digit, size, width=1):
    picture = Image.new("L", (size, size), 255)
    points = [(size * (0.2 + 0.6 * x), size * (0.1 + 0.8 * y)) for x, y in STROKES[digit]]
    ImageDraw.Draw(picture).line(points, 0, width, joint="curve")
    return picture


@pytest.mark.parametrize("size", [28, 100, 400])
def test_thin_strokes_are_recognised(seen, size):
    checkpoint = utils.load_checkpoint(WEIGHTS)
    utils.restore(WEIGHTS, checkpoint, model := judge.LeNet())
    images = torch.stack([seen(draw_thin(digit, size, 1 + size // 200)) for digit in STROKES])
    logits = utils.predict(model, images, checkpoint["mean"], checkpoint["std"])
    assert logits.argmax(dim=1).tolist() == list(STROKES)


def test_shadow_at_the_border_of_a_dim_photo_is_left_out(seen, seven):
    picture = np.array(draw_seven(size=300, ink=30, paper=90), dtype=float)
    picture *= np.linspace(0.7, 1, picture.shape[1])
    corner = np.add.outer(np.arange(600), np.arange(300)) < 120  # as of a hand, darker than the ink
    picture[corner] = 5
    expect_same(seen(Image.fromarray(picture.astype(np.uint8)), "dim.jpg"), seven)


@pytest.mark.parametrize("paper", [255, 0])
def test_patterned_article_is_neither_dim_nor_cut(seen, paper):
    """A shirt of two shades in squares, with one spot that stands out far more than it."""
    squares = np.kron(np.indices((20, 12)).sum(axis=0) % 2, np.ones((10, 10)))
    picture = np.full((300, 300), paper)
    picture[50:250, 90:210] = abs(paper - 120) + (40 * squares - 20)
    picture[50:90, 50:250] = abs(paper - 120)
    picture[120:130, 140:150] = 255 - paper
    image = seen(Image.fromarray(picture.astype(np.uint8)), dataset="FashionMNIST")
    shown = image > 60
    assert shown[:5].all()
    assert shown[:, 10:18].all()
    assert not shown[8:, [0, 1, 26, 27]].any()


def test_avif_is_read_where_pillow_has_it_and_heic_is_refused_in_words(seen, seven, tmp_path):
    if features.check("avif"):
        expect_same(seen(draw_seven().convert("RGB"), "seven.avif"), seven)
    (tmp_path / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(400))
    with pytest.raises(utils.Error, match=r"phone\.heic .*HEIC.*save it as JPEG"):
        judge.load_picture(tmp_path / "phone.heic", "MNIST")


@pytest.fixture
def classify(tmp_path, capsys):
    def classify(*images):
        line = [f"--output-dir={tmp_path}", "--device=cpu", "--image", *map(str, images)]
        return judge.main([f"--checkpoint={WEIGHTS}", *line]), *capsys.readouterr()

    return classify


@pytest.fixture
def album(tmp_path):
    """A folder of readable pictures, of broken ones, and of files that are no pictures."""
    folder = tmp_path / "album"
    folder.mkdir()
    for name in ("b.png", "a.JPG", "c.webp"):
        draw_seven(60).save(folder / name)
    (folder / "broken.png").write_bytes(b"no picture")
    (folder / "phone.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    for name in ("notes.txt", ".hidden.png", "Thumbs.db"):
        (folder / name).write_bytes(b"no picture")
    return folder


def test_all_pictures_of_a_folder_are_judged_though_some_are_broken(classify, album, tmp_path):
    status, out, err = classify(album)
    assert status == 2
    assert re.findall(r"(\S+): \d \(", out) == [
        str(album / n) for n in ("a.JPG", "b.png", "c.webp")
    ]
    assert "Accuracy" not in out
    broken, phone = err.splitlines()
    assert re.fullmatch(
        r"test\.py: error: .*broken\.png is no picture that can be read: .*", broken
    )
    assert "HEIC" in phone
    assert (tmp_path / "images" / "own.png").exists()


def test_patterns_are_expanded_and_what_is_not_there_is_told(classify, album):
    status, out, err = classify(album / "*.[jJ]*", album / "[bc].*", album / "none*.png")
    assert status == 2
    assert re.findall(r"(\w+)\.\w+: \d \(", out) == ["a", "b", "c"]
    assert re.fullmatch(r"test\.py: error: .*none\*\.png does not exist\n", err)


def test_nothing_is_drawn_if_nothing_can_be_read(classify, tmp_path):
    (tmp_path / "empty").mkdir()
    status, _, err = classify(tmp_path / "empty")
    assert status == 2
    assert "is a folder without pictures" in err
    assert not (tmp_path / "images" / "own.png").exists()


def test_folders_named_by_class_are_scored(classify, tmp_path):
    for true, drawn in ((4, 4), (6, 6), (7, 7), (0, 6)):
        folder = tmp_path / "set" / str(true)
        folder.mkdir(parents=True)
        (draw_seven(60) if drawn == 7 else draw_thin(drawn, 60, 4)).save(folder / "picture.png")
    status, out, err = classify(tmp_path / "set")
    assert (status, err) == (0, "")
    assert "Accuracy in folders named by class: 75.0% (3/4)\n" in out
    assert re.search(r"^0 +0\.0% \(0/1\) +6 \(1\)$", out, re.MULTILINE)
    assert "Accuracy" not in classify(*(tmp_path / "set").rglob("*.png"))[1]  # files, not folders


def test_classes_are_found_whatever_their_spelling():
    names = [judge.plain(name.partition("/")[0]) for name in utils.CLOTHES]
    for name in ("T-shirt", "tshirt", "ANKLE_BOOT", "Ankle boot", "ankle-boot"):
        assert judge.plain(name) in names


def test_doubtful_answers_are_called_unsure(classify, album, monkeypatch):
    for threshold, expected in ((0, 0), (1.1, 3)):
        monkeypatch.setattr(judge, "UNSURE", threshold)
        assert classify(album)[1].count("%), unsure\n") == expected


def test_one_picture_is_drawn_step_by_step(classify, album, monkeypatch):
    grids = []
    monkeypatch.setattr(utils, "plot_grid", lambda *args: grids.append(args[0]))
    classify(album / "b.png")
    classify(album / "b.png", album / "a.JPG")
    assert [tuple(grid.shape) for grid in grids] == [(1, 128, 400), (2, 128, 264)]
    as_read, stands_out, _, image = grids[0][0].split((128, 136, 8, 128), dim=1)
    assert (as_read[64, 0], as_read.min()) == (0, 0)  # black beside the upright picture
    assert stands_out.max() == image.max() == 255


def test_own_pictures_are_classified(glyphs_run, tmp_path, glyphs_dir, monkeypatch, capsys):
    grids, plot = [], utils.plot_grid
    monkeypatch.setattr(utils, "plot_grid", lambda *args: [grids.append(args), plot(*args)])
    images, labels = utils.load_images("Glyphs", glyphs_dir, "test")
    clear = images.flatten(1).double().std(dim=1).argsort(descending=True)[:3].tolist()
    paths = [tmp_path / f"digit-{labels[i]}-{i}.png" for i in clear]
    for i, path in zip(clear, paths):
        Image.fromarray(255 - images[i].numpy()).resize((280, 280)).save(path)
    first, *others = map(str, paths)
    line = [*options(tmp_path, glyphs_dir), f"--checkpoint={run_dir(glyphs_run) / 'best.pt'}"]
    assert judge.main([*line, "--image", *others, "--image", first]) == 0
    out = capsys.readouterr().out
    for path in paths:
        line = re.search(rf"{path.name}: (\d) \((.*?)%\), (\d) \((.*?)%\), (\d) \((.*?)%\)\n", out)
        shares = [float(share) for share in line.groups()[1::2]]
        assert shares == sorted(shares, reverse=True)
        assert sum(shares) <= 100.2
        assert line[1] == path.name[6]
    with Image.open(tmp_path / "images" / "own.png") as picture:
        assert picture.width > 300
    [(pairs, captions, title, path, *_)] = grids
    assert path == tmp_path / "images" / "own.png"
    assert "Glyphs" in title
    for pair, caption, file in zip(pairs, captions, [*paths[1:], paths[0]], strict=True):
        assert caption.startswith(f"{file.name}\n{file.name[6]} (")
        seen = judge.load_picture(file, "Glyphs")[-1]
        assert torch.equal(pair[8:120:4, -120:-8:4], seen)  # each pixel is a square of 4 by 4
        shown = Image.open(file).convert("L").resize((128, 128))
        assert (pair[:, :128].float() - torch.tensor(np.array(shown)).float()).abs().mean() < 8


def test_all_of_many_pictures_are_printed_and_64_drawn(
    glyphs_run, glyphs_dir, tmp_path, monkeypatch, capsys
):
    grids, names = [], [tmp_path / f"{i}.png" for i in range(70)]
    monkeypatch.setattr(utils, "plot_grid", lambda *args: grids.append(args))
    for i, name in enumerate(names):  # a stroke, ever longer
        picture = Image.new("L", (64, 128), 255)
        picture.paste(0, (28, 20, 36, 40 + i))
        picture.save(name)
    line = [*options(tmp_path, glyphs_dir), f"--checkpoint={run_dir(glyphs_run) / 'best.pt'}"]
    assert judge.main([*line, "--image", *map(str, names)]) == 0
    out = capsys.readouterr().out
    assert re.findall(r"^.*?(\d+).png: ", out, re.MULTILINE) == [str(i) for i in range(70)]
    assert out.endswith("own.png, the first 64\n")
    [(images, captions, *_)] = grids
    assert len(images) == len(captions) == 64
    dark = (images[:, :, :128] < 128).sum(dim=(1, 2)).tolist()  # the pictures themselves
    assert dark == sorted(dark)
    assert len({*dark}) > 50
    seen = [
        judge.load_picture(name, "Glyphs")[-1] for name in names[:64]
    ]  # and what is seen of them
    assert all(map(torch.equal, images[:, 8:120:4, -120:-8:4], seen))
    assert [caption.split("\n")[0] for caption in captions[:64]] == [n.name for n in names[:64]]
