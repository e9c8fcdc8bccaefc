"""The data: download, damage, Glyphs, the split, the way into the network, own pictures."""

import gzip
import hashlib
import http.server
import random
import socket
import struct
import threading
import time

import numpy as np
import pytest
import torch
from conftest import ARCHIVES
from PIL import Image
from torchvision import datasets

import utils
from utils import data, glyphs


def idx(array):
    """Encode a uint8 array in the idx format of the MNIST archives."""
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    return header + array.tobytes()


@pytest.fixture
def archives(monkeypatch):
    """Small archives in place of FashionMNIST's: name -> bytes; the sums are theirs."""
    rng = np.random.default_rng(0)
    packed, resources, sums = {}, [], {}
    for name in ARCHIVES:
        count = 200 if name.startswith("train") else 50
        shape = (count, 28, 28) if "images" in name else (count,)
        content = idx(rng.integers(0, 256 if "images" in name else 10, shape, dtype=np.uint8))
        packed[name] = gzip.compress(content)
        resources.append((name, hashlib.md5(packed[name]).hexdigest()))
        sums[name.removesuffix(".gz")] = hashlib.md5(content).hexdigest()
    monkeypatch.setattr(datasets.FashionMNIST, "resources", resources)
    monkeypatch.setitem(data.UNPACKED_MD5, "FashionMNIST", sums)
    monkeypatch.setattr(data, "TIMEOUT", 1)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return packed


@pytest.fixture
def serve(monkeypatch):
    """Serve dicts of files as the mirrors of FashionMNIST; returns the list of requests."""
    servers = []

    def start(*mirrors):
        requests, urls = [], []
        for number, files in enumerate(mirrors):

            class Handler(http.server.BaseHTTPRequestHandler):
                def do_GET(self, number=number, files=files):
                    name = self.path.lstrip("/")
                    requests.append((number, name))
                    if name not in files:
                        return self.send_error(404)
                    self.send_response(200)
                    self.send_header("Content-Length", len(files[name]))
                    self.end_headers()
                    return self.wfile.write(files[name])

                def log_message(self, *args):
                    pass

            server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
            threading.Thread(target=server.serve_forever, daemon=True).start()
            servers.append(server)
            urls.append(f"http://127.0.0.1:{server.server_port}/")
        set_mirrors(monkeypatch, *urls)
        return requests

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def set_mirrors(monkeypatch, first, *others):
    monkeypatch.setattr(datasets.FashionMNIST, "mirrors", [first])
    monkeypatch.setitem(data.SECOND_SOURCES, "FashionMNIST", list(others))


def closed_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"http://127.0.0.1:{server.getsockname()[1]}/"


def fill(folder, archives):
    raw = folder / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for name, content in archives.items():
        (raw / name).write_bytes(content)
    return raw


def expect_good(folder, archives):
    for split, prefix in (("train", "train"), ("test", "t10k")):
        images, labels = data.load_images("FashionMNIST", folder, split)
        assert images.dtype == torch.uint8
        assert labels.dtype == torch.int64
        for tensor, kind in ((images, "images-idx3"), (labels, "labels-idx1")):
            content = gzip.decompress(archives[f"{prefix}-{kind}-ubyte.gz"])
            assert content.endswith(tensor.to(torch.uint8).numpy().tobytes())


def test_download_from_the_first_source(tmp_path, archives, serve):
    requests = serve(archives, {})
    expect_good(tmp_path, archives)
    assert {number for number, _ in requests} == {0}


@pytest.mark.parametrize("damage", ["truncated", "altered", "missing", "text", "no server"])
def test_second_source_takes_over(tmp_path, archives, serve, monkeypatch, damage):
    first = dict(archives)
    if damage == "truncated":
        first[ARCHIVES[0]] = archives[ARCHIVES[0]][:-100]
    elif damage == "altered":
        first[ARCHIVES[1]] = archives[ARCHIVES[1]][:-1] + b"?"
    elif damage == "missing":
        del first[ARCHIVES[2]]
    elif damage == "text":
        first = dict.fromkeys(archives, b"<html>Sign in to the network</html>")
    serve(first, archives)
    if damage == "no server":
        second = data.SECOND_SOURCES["FashionMNIST"][0]
        set_mirrors(monkeypatch, closed_port(), second)
    expect_good(tmp_path, archives)


def test_error_names_the_archive_and_each_source(tmp_path, archives, serve):
    damaged = archives | {ARCHIVES[0]: archives[ARCHIVES[0]][:-100]}
    serve(damaged, {})
    with pytest.raises(data.Unavailable) as caught:
        data.load_images("FashionMNIST", tmp_path, "train")
    message = str(caught.value)
    assert ARCHIVES[0] in message
    assert message.count("http://127.0.0.1") == 2
    assert "404" in message
    assert "\n" not in message


def test_server_that_never_answers_is_given_up(tmp_path, archives, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        set_mirrors(monkeypatch, url, url + "second/")
        start = time.monotonic()
        with pytest.raises(data.Unavailable, match="1 seconds"):
            data.load_images("FashionMNIST", tmp_path, "train")
    assert time.monotonic() - start < 10  # two sources, one second each, and much patience


def test_two_silent_sources_are_given_up_within_30_seconds():
    for dataset in ("FashionMNIST", "MNIST"):
        mirrors = [*getattr(datasets, dataset).mirrors, *data.SECOND_SOURCES.get(dataset, [])]
        assert len(mirrors) >= 2
        assert data.TIMEOUT * len(mirrors) < 30


def test_server_that_stops_in_the_middle_is_given_up(tmp_path, archives, monkeypatch):
    def answer_half(server):
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            connections.append(connection)
            connection.recv(4096)
            connection.sendall(b"HTTP/1.0 200 OK\r\nContent-Length: 9999\r\n\r\nhalf")

    connections = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=answer_half, args=[server], daemon=True).start()
        set_mirrors(monkeypatch, f"http://127.0.0.1:{server.getsockname()[1]}/")
        with pytest.raises(data.Unavailable, match=ARCHIVES[0]):
            data.load_images("FashionMNIST", tmp_path, "train")
    for connection in connections:
        connection.close()


def test_archives_on_disk_are_used_without_the_network(tmp_path, archives, serve):
    requests = serve({}, {})
    fill(tmp_path, archives)
    expect_good(tmp_path, archives)
    assert not requests


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty"])
def test_damaged_unpacked_file_is_unpacked_again(tmp_path, archives, serve, damage):
    requests = serve({}, {})
    raw = fill(tmp_path, archives)
    expect_good(tmp_path, archives)
    path = raw / "train-images-idx3-ubyte"
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes({"truncated": content[:999], "flipped": content, "empty": b""}[damage])
    expect_good(tmp_path, archives)
    assert not requests


def test_damaged_archive_is_named_and_fetched_again(tmp_path, archives, serve, capsys):
    requests = serve(archives, {})
    raw = fill(tmp_path, archives | {ARCHIVES[2]: archives[ARCHIVES[2]][:50]})
    expect_good(tmp_path, archives)
    assert {name for _, name in requests} == {ARCHIVES[2]}
    assert f"{ARCHIVES[2]} is damaged" in capsys.readouterr().err
    assert (raw / ARCHIVES[2]).read_bytes() == archives[ARCHIVES[2]]


@pytest.mark.parametrize("name", ARCHIVES)
def test_every_damage_of_an_archive_is_found(tmp_path, archives, monkeypatch, name):
    """50 truncations, 200 flipped bits, an empty file, a text: none gets through."""
    monkeypatch.setattr(data, "_ask", lambda url: (_ for _ in ()).throw(OSError("no network")))
    raw, content, rng = fill(tmp_path, archives), archives[name], random.Random(0)
    damaged = [content[: len(content) * i // 50] for i in range(50)] + [b"text\n"]
    for _ in range(200):
        flipped = bytearray(content)
        flipped[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        damaged.append(bytes(flipped))
    for wrong in damaged:
        (raw / name).write_bytes(wrong)
        with pytest.raises(data.Unavailable, match=f"{name} is damaged and cannot be fetched"):
            data.load_images("FashionMNIST", tmp_path, "train" if "train" in name else "test")
    assert (raw / name).read_bytes() == wrong  # nobody has touched it


def test_damaged_unpacked_file_without_its_archive_is_an_error(tmp_path, archives, serve):
    serve({}, {})
    raw = fill(tmp_path, archives)
    expect_good(tmp_path, archives)
    (raw / ARCHIVES[0]).unlink()
    (raw / "train-images-idx3-ubyte").write_bytes(b"short")
    with pytest.raises(data.Unavailable, match="train-images-idx3-ubyte is damaged"):
        data.load_images("FashionMNIST", tmp_path, "train")


def test_file_in_place_of_the_data_folder_is_an_error(tmp_path):
    (tmp_path / "data").write_text("not a folder")
    with pytest.raises(utils.Error, match="data"):
        data.load_images("FashionMNIST", tmp_path / "data", "train")


def test_torchvision_that_does_not_fit_is_an_error_and_no_reason_for_glyphs(tmp_path, monkeypatch):
    def broken(name, *args, **kwargs):
        if name.startswith("torchvision"):
            raise RuntimeError("operator torchvision::nms does not exist")
        return real(name, *args, **kwargs)

    real = __import__
    monkeypatch.setattr("builtins.__import__", broken)
    with pytest.raises(utils.Error, match=r"nms does not exist.*pip install"):
        data.load_train_images("auto", tmp_path)


def test_real_archives_are_read(real_data):
    for dataset, mean in (("FashionMNIST", 0.2860), ("MNIST", 0.1307)):  # of all 60,000 images
        images, labels = data.load_images(dataset, real_data, "train")
        assert images.shape == (60_000, 28, 28)
        assert utils.pixel_statistics(images)[0] == pytest.approx(mean, abs=1e-4)
        train, val = utils.split_train_validation(images, labels)
        assert len(train[1]) == 55_000
        assert val[1].bincount().tolist() == [500] * 10
        assert len(data.load_images(dataset, real_data, "test")[1]) == 10_000


# Glyphs


@pytest.fixture(scope="module")
def test_glyphs():
    return glyphs.draw_glyphs("test")


def test_glyphs_are_the_same_in_every_run(test_glyphs, tmp_path):
    images, labels = test_glyphs
    assert images.dtype == torch.uint8
    assert images.shape == (10_000, 28, 28)
    assert labels.bincount().tolist() == [1000] * 10
    torch.manual_seed(123)  # nothing outside has an influence
    for _ in range(2):  # drawn, then from the cache
        again = data.load_images("Glyphs", tmp_path, "test")
        assert torch.equal(again[0], images)
        assert torch.equal(again[1], labels)


def test_fonts_of_the_test_digits_are_never_trained_on():
    assert not set(glyphs.FONTS["train"]) & set(glyphs.FONTS["test"])
    train_outlines, test_outlines = (glyphs._draw_outlines(f) for f in glyphs.FONTS.values())
    train_outlines, test_outlines = train_outlines.flatten(0, 2), test_outlines.flatten(0, 2)
    for outline in test_outlines:
        assert (train_outlines - outline).abs().amax(dim=(1, 2)).min() > 0.1


def test_damaged_glyph_cache_is_drawn_again(test_glyphs, tmp_path, capsys):
    data.load_images("Glyphs", tmp_path, "test")
    (path,) = (tmp_path / "Glyphs").iterdir()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert torch.equal(data.load_images("Glyphs", tmp_path, "test")[0], test_glyphs[0])
    assert "damaged" in capsys.readouterr().err


def test_named_set_is_never_replaced(tmp_path, archives, serve):
    serve({}, {})
    with pytest.raises(data.Unavailable):
        data.load_train_images("FashionMNIST", tmp_path)


def test_auto_takes_fashion_mnist_where_it_is_there(tmp_path, archives, serve):
    serve({}, {})
    fill(tmp_path, archives)
    assert data.load_train_images("auto", tmp_path)[0] == "FashionMNIST"


def test_auto_says_loudly_that_it_takes_glyphs(glyphs_dir, archives, serve, capsys):
    serve({}, {})
    dataset, images, _ = data.load_train_images("auto", glyphs_dir)
    assert dataset == "Glyphs"
    assert len(images) == 60_000
    err = capsys.readouterr().err
    assert "TRAINING ON GLYPHS" in err
    assert "404" in err


# Splits and the way into the network


def test_validation_split_is_balanced_and_shares_no_image_with_the_train_split():
    labels = torch.randperm(12_000, generator=torch.Generator().manual_seed(0)) % 3
    images = torch.arange(12_000).view(-1, 1, 1)  # each image is its own number
    train, val = utils.split_train_validation(images, labels)
    assert val[1].bincount().tolist() == [500] * 3
    numbers = torch.cat([train[0], val[0]]).flatten()
    assert torch.equal(numbers.sort().values, torch.arange(12_000))
    for split in (train, val):
        assert torch.equal(labels[split[0].flatten()], split[1])
    again = utils.split_train_validation(images, labels)
    assert torch.equal(again[1][0], val[0])


def test_validation_split_leaves_half_of_a_small_class():
    _, val = utils.split_train_validation(torch.zeros(9, 28, 28), torch.tensor([0] * 8 + [1]))
    assert val[1].tolist() == [0] * 4


def test_pixel_statistics():
    images = torch.randint(0, 256, (50, 28, 28), dtype=torch.uint8)
    mean, std = utils.pixel_statistics(images)
    assert mean == pytest.approx((images.double() / 255).mean().item())
    assert std == pytest.approx((images.double() / 255).std(correction=0).item())


def test_preprocess_pads_with_black_then_normalises():
    images = torch.full((3, 28, 28), 255, dtype=torch.uint8)
    x = utils.preprocess(images, 0.25, 0.5)
    assert x.shape == (3, 1, 32, 32)
    assert x.dtype == torch.float32
    assert (x[:, :, 2:-2, 2:-2] == 1.5).all()
    x[:, :, 2:-2, 2:-2] = -0.5
    assert (x == -0.5).all()


@pytest.mark.parametrize(
    ("mirrored", "down", "right"), [(0, 0, 0), (1, 0, 0), (0, 2, -1), (1, -2, 2)]
)
def test_changes_mirror_and_shift(mirrored, down, right):
    image = torch.randint(256, (28, 28), dtype=torch.uint8)
    expected = torch.zeros(32, 32)
    expected[2 + down : 30 + down, 2 + right : 30 + right] = image.flip(1) if mirrored else image
    changes = torch.tensor([[0, 0, 0], [mirrored, down, right]])
    x = utils.preprocess(torch.stack([image, image]), 0.0, 1.0, changes)
    assert torch.equal(x[:1], utils.preprocess(image.unsqueeze(0), 0.0, 1.0))
    assert torch.allclose(x[1, 0], expected / 255)


@pytest.mark.parametrize(("mirror", "shift"), [(False, 0), (True, 1), (False, 2)])
def test_changes_are_drawn_evenly(mirror, shift):
    changes = utils.draw_changes(4000, mirror, shift)
    assert changes.shape == (4000, 3)
    for column, values in zip(changes.T, (range(1 + mirror), *[range(-shift, shift + 1)] * 2)):
        counts = torch.stack([column == value for value in values]).sum(dim=1)
        assert counts.sum() == 4000
        assert counts.min() > 0.8 * 4000 / len(values)


def test_predict_does_not_depend_on_the_batch_size():
    from model import LeNet

    torch.manual_seed(0)
    model, images = LeNet(), torch.randint(0, 256, (25, 28, 28), dtype=torch.uint8)
    whole = utils.predict(model, images, 0.3, 0.3)
    parts = utils.predict(model, images, 0.3, 0.3, batch_size=10)
    torch.testing.assert_close(whole, parts)


# Own pictures


def draw_seven(size=200, ink=0, paper=255, mode="L"):
    picture = Image.new(mode, (size, size * 2), paper)
    for x in range(size // 4, 3 * size // 4):
        for y in range(size // 10):
            picture.putpixel((x, size // 2 + y), ink)
    for y in range(size):
        for x in range(max(1, size // 10)):
            picture.putpixel((3 * size // 4 - x - y // 3, size // 2 + y), ink)
    return picture


@pytest.fixture
def seven(tmp_path):
    draw_seven().save(tmp_path / "seven.png")
    return utils.load_picture(tmp_path / "seven.png", "MNIST")


def expect_same(image, other):
    assert image.dtype == torch.uint8
    assert image.shape == (28, 28)
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


def test_article_fills_the_image_like_fashion_mnist(tmp_path, seven):
    image = utils.load_picture(tmp_path / "seven.png", "FashionMNIST")
    assert image[0].any()
    assert image[27].any()


def test_bright_on_dark_transparent_16_bit_and_palette(tmp_path, seven):
    draw_seven(ink=255, paper=0).save(tmp_path / "dark.png")
    draw_seven(ink=(0, 0, 0, 255), paper=(255, 0, 0, 0), mode="RGBA").save(tmp_path / "clear.png")
    draw_seven(ink=(255, 255, 255, 255), paper=(0, 0, 0, 0), mode="RGBA").save(
        tmp_path / "white.png"
    )
    deep = np.asarray(draw_seven(), dtype=np.uint16) * 200 + 3000
    Image.fromarray(deep).save(tmp_path / "deep.png")
    draw_seven(mode="RGB", ink=(0, 0, 60), paper=(250, 250, 230)).convert("P").save(
        tmp_path / "palette.gif"
    )
    draw_seven().convert("1").save(tmp_path / "bits.png")
    for name in ("dark.png", "clear.png", "white.png", "deep.png", "palette.gif", "bits.png"):
        expect_same(utils.load_picture(tmp_path / name, "MNIST"), seven)


def test_picture_is_turned_the_right_way_up(tmp_path, seven):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    draw_seven().rotate(90, expand=True).save(tmp_path / "photo.jpg", exif=exif, quality=95)
    expect_same(utils.load_picture(tmp_path / "photo.jpg", "MNIST"), seven)


def test_noisy_paper_does_not_matter(tmp_path, seven):
    noise = np.random.default_rng(0).normal(0, 4, (400, 200))
    noisy = np.asarray(draw_seven(ink=40, paper=200)) + noise
    Image.fromarray(noisy.round().astype(np.uint8)).save(tmp_path / "noisy.png")
    expect_same(utils.load_picture(tmp_path / "noisy.png", "MNIST"), seven)


@pytest.mark.parametrize("size", [(2, 2), (1, 3), (3000, 2)])
def test_tiny_and_thin_pictures_work(tmp_path, size):
    picture = Image.new("L", size)
    picture.putpixel((size[0] // 2, size[1] // 2), 255)
    picture.save(tmp_path / "tiny.png")
    assert utils.load_picture(tmp_path / "tiny.png", "MNIST").max() == 255


def test_large_picture_works(tmp_path, seven):
    draw_seven().resize((2000, 4000)).save(tmp_path / "large.png")
    expect_same(utils.load_picture(tmp_path / "large.png", "MNIST"), seven)


def test_pictures_that_cannot_be_used_are_refused_in_one_line(tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "paper.pdf").write_bytes(b"%PDF-1.4\n")
    (tmp_path / "folder.png").mkdir()
    Image.new("L", (1, 1)).save(tmp_path / "dot.png")
    Image.new("RGB", (50, 50), (9, 80, 200)).save(tmp_path / "plain.png")
    Image.new("1", (20_000, 20_000)).save(tmp_path / "huge.png")
    draw_seven(20).save(tmp_path / "half.png")
    content = (tmp_path / "half.png").read_bytes()
    (tmp_path / "half.png").write_bytes(content[: len(content) // 2])
    frames = [Image.new("L", (20, 20), shade) for shade in (0, 255)]
    frames[0].save(tmp_path / "film.gif", save_all=True, append_images=frames[1:])
    names = [path.name for path in tmp_path.iterdir()]
    for name in [*names, "missing.png"]:
        with pytest.raises(utils.Error) as caught:
            utils.load_picture(tmp_path / name, "MNIST")
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)


def test_images_of_mnist_come_through_almost_unchanged(real_data, tmp_path):
    images, _ = data.load_images("MNIST", real_data, "test")
    for image in images[:50]:
        Image.fromarray(255 - image.numpy()).save(tmp_path / "inverted.png")
        seen = utils.load_picture(tmp_path / "inverted.png", "MNIST")
        assert (seen.float() - image.float()).abs().mean() < 2
