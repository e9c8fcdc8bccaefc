"""The data: download, damage, the cache, Glyphs, the split, the batches."""

import gzip
import hashlib
import http.server
import re
import select
import socket
import sys
import threading
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ARCHIVES, DAMAGE, damage, files, random_images
from torchvision import datasets

import utils
from model import LeNet


def idx_header(*sizes):
    """The start of a file in MNIST's format: of bytes, with a dimension for each of `sizes`."""
    return b"".join(number.to_bytes(4, "big") for number in (0x800 + len(sizes), *sizes))


@pytest.fixture
def archives(monkeypatch):
    """Small archives in place of FashionMNIST's: name -> bytes; the sums are theirs."""
    rng, packed = np.random.default_rng(0), {}
    for name in ARCHIVES:
        count = 200 if name.startswith("train") else 50
        sizes, values = ((count, 28, 28), 256) if "images" in name else ((count,), 10)
        content = rng.integers(values, size=sizes, dtype=np.uint8).tobytes()
        packed[name] = gzip.compress(idx_header(*sizes) + content)
    sums = [(name, hashlib.md5(content).hexdigest()) for name, content in packed.items()]
    monkeypatch.setattr(datasets.FashionMNIST, "resources", sums)
    monkeypatch.setattr(utils, "TIMEOUT", 1)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return packed


def set_mirrors(monkeypatch, first, *others):
    monkeypatch.setattr(datasets.FashionMNIST, "mirrors", [first])
    monkeypatch.setitem(utils.DATASETS["FashionMNIST"], "sources", list(others))


@pytest.fixture
def serve(monkeypatch):
    """Serve two dicts of files as the mirrors; returns the list of requests."""
    requests, mirrors = [], []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            _, number, name = self.path.split("/")
            content = mirrors[int(number)].get(name, "missing")
            if content == "missing":
                return self.send_error(404)
            self.send_response(200)
            self.send_header("Content-Length", 9 if content == "stalls" else len(content))
            self.end_headers()
            if content != "stalls":
                self.wfile.write(content)
            elif select.select([self.connection], [], [], 30)[0]:  # until the client gives up
                self.close_connection = True
            return None

    def start(*contents):
        requests[:], mirrors[:] = [], contents
        set_mirrors(monkeypatch, *(f"http://127.0.0.1:{server.server_port}/{i}/" for i in (0, 1)))
        return requests

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=[0.02], daemon=True).start()
        yield start
        server.shutdown()


@pytest.fixture
def raw(tmp_path, archives, serve):
    """The folder of the archives, which are there; no mirror has any."""
    serve({}, {})
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for name, content in archives.items():
        (raw / name).write_bytes(content)
    return raw


@pytest.fixture
def cache(raw, tmp_path, archives):
    """The file that the train split is cached in, which is there, as are the archives."""
    expect_good(tmp_path, archives)
    return tmp_path / "FashionMNIST" / f"train-v{utils.CACHE_VERSION}.pt"


def expect_good(folder, archives):
    for split, prefix in (("train", "train"), ("test", "t10k")):
        images, labels = utils.load_images("FashionMNIST", folder, split)
        assert (images.dtype, labels.dtype) == (torch.uint8, torch.int64)
        assert images.shape == (len(labels), 28, 28)
        for tensor, kind, header in ((images, "images-idx3", 16), (labels, "labels-idx1", 8)):
            content = gzip.decompress(archives[f"{prefix}-{kind}-ubyte.gz"])
            assert content[header:] == tensor.to(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("how", ["good", *DAMAGE, "missing", "stalls", "no server"])
def test_second_source_takes_over_where_need_be(tmp_path, archives, serve, monkeypatch, how):
    name = ARCHIVES[1]
    content = damage(archives[name], how) if how in DAMAGE else archives[name]
    requests = serve(archives | {name: how if how in ("missing", "stalls") else content}, archives)
    if how == "no server":
        set_mirrors(monkeypatch, "http://127.0.0.1:9/", *utils.DATASETS["FashionMNIST"]["sources"])
    expect_good(tmp_path, archives)
    assert (f"/1/{name}" in requests) == (how != "good")


def test_named_set_is_not_replaced_and_the_error_tells_what_failed(tmp_path, archives, serve):
    serve(archives | {ARCHIVES[0]: archives[ARCHIVES[0]][:-100]}, {})
    message = rf"^{ARCHIVES[0]} is missing.*http://127\.0\.0\.1:\d+/0/: .*/1/: .*404[^\n]*$"
    with pytest.raises(utils.Unavailable, match=message):
        utils.load_train_images("FashionMNIST", tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(utils.Error, match="file/FashionMNIST"):
        utils.load_train_images("FashionMNIST", tmp_path / "file")


def test_silent_servers_are_given_up(tmp_path, archives, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        set_mirrors(monkeypatch, url, url + "second/")
        with pytest.raises(utils.Unavailable, match=r"timed out.*second/: .*timed out"):
            utils.load_images("FashionMNIST", tmp_path, "train")
    assert socket.getdefaulttimeout() is None


@pytest.mark.parametrize("dataset", ["FashionMNIST", "MNIST"])
def test_each_data_set_has_a_second_source_and_both_are_tried_with_a_timeout(
    tmp_path, monkeypatch, dataset
):
    asked = []

    def silent(url, *_):
        asked.append((url, socket.getdefaulttimeout()))
        raise TimeoutError("timed out")

    monkeypatch.setattr("torchvision.datasets.utils.download_url", silent)
    with pytest.raises(utils.Unavailable, match=r"timed out.*timed out"):
        utils.load_images(dataset, tmp_path, "train")
    urls, patience = zip(*asked)
    assert len({url.split("/")[2] for url in urls}) == len(urls) >= 2
    assert 1 < sum(patience) < 30


def test_disk_that_cannot_be_read_is_no_traceback(raw, tmp_path, monkeypatch):
    def fail(path):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("pathlib.Path.read_bytes", fail)
    with pytest.raises(utils.Unavailable, match=f"cannot use {tmp_path}: .*Input/output error"):
        utils.load_images("FashionMNIST", tmp_path, "train")


def test_archives_on_disk_are_used_offline_and_not_unpacked(raw, tmp_path, archives, serve):
    requests, before = serve({}, {}), files(tmp_path)
    expect_good(tmp_path, archives)
    assert not requests
    caches = [raw.parent / f"{split}-v{utils.CACHE_VERSION}.pt" for split in ("train", "test")]
    assert files(tmp_path) == before | {path: path.read_bytes() for path in caches}


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("name", ARCHIVES)
def test_damaged_archive_is_refused_then_fetched(raw, tmp_path, archives, serve, capsys, name, how):
    good = files(tmp_path)
    (raw / name).write_bytes(damage(archives[name], how))
    damaged = files(tmp_path)
    with pytest.raises(utils.Unavailable, match=f"{name} is damaged .*cannot be fetched"):
        utils.load_images("FashionMNIST", tmp_path, "train" if "train" in name else "test")
    assert files(tmp_path) == damaged
    requests = serve(archives, {})
    expect_good(tmp_path, archives)
    assert set(requests) == {f"/0/{name}"}
    assert f"{name} is damaged" in capsys.readouterr().err
    assert files(raw) == good


def test_torchvision_that_does_not_fit_is_an_error_and_no_reason_for_glyphs(tmp_path, monkeypatch):
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torchvision")
    with pytest.raises(utils.Error, match=r"nms does not exist.*pip install"):
        utils.load_train_images("auto", tmp_path)


def test_real_archives_are_read(real_data):
    for dataset, mean in (("FashionMNIST", 0.2860), ("MNIST", 0.1307)):  # of all 60,000 images
        images, labels = utils.load_images(dataset, real_data, "train")
        assert images.shape == (60_000, 28, 28)
        assert utils.pixel_statistics(images)[0] == pytest.approx(mean, abs=1e-4)
        (_, train), (_, val) = utils.split_train_validation(images, labels)
        assert (len(train), val.bincount().tolist()) == (55_000, [500] * 10)
        assert len(utils.load_images(dataset, real_data, "test")[1]) == 10_000


def test_second_load_needs_neither_archives_nor_torchvision(cache, tmp_path, archives, monkeypatch):
    (cache.parent / "raw").rename(tmp_path / "elsewhere")
    monkeypatch.setitem(sys.modules, "torchvision", None)  # an import of it fails
    expect_good(tmp_path, archives)
    assert utils.load_train_images("auto", tmp_path)[0] == "FashionMNIST"


def test_damaged_cache_is_made_again(cache, tmp_path, archives, capsys):
    good = cache.read_bytes()
    cache.write_bytes(damage(good, "flipped bit"))
    expect_good(tmp_path, archives)
    assert f"{cache} is damaged" in capsys.readouterr().err
    assert cache.read_bytes() == good


def test_auto_takes_fashion_mnist_and_warns_where_it_cannot_be_cached(cache, tmp_path, capsys):
    data = utils.load_images("FashionMNIST", tmp_path, "train")
    cache.unlink()
    cache.mkdir()  # so that no file can be written there
    name, *again = utils.load_train_images("auto", tmp_path)
    assert name == "FashionMNIST"
    assert all(map(torch.equal, again, data))
    assert f"Warning: cannot write {cache}" in capsys.readouterr().err


def test_glyphs_are_the_same_in_every_run(tmp_path):
    images, labels = drawn = utils.draw_glyphs("test")
    assert (images.dtype, images.shape) == (torch.uint8, (10_000, 28, 28))
    assert labels.bincount().tolist() == [1000] * 10
    torch.manual_seed(123)  # nothing outside has an influence
    for _ in range(2):  # drawn, then from the cache
        assert all(map(torch.equal, utils.load_images("Glyphs", tmp_path, "test"), drawn))


def test_fonts_of_the_test_digits_are_never_trained_on():
    assert not set(utils.FONTS["train"]) & set(utils.FONTS["test"])
    train, test = (utils.draw_outlines(fonts).flatten(0, 1) for fonts in utils.FONTS.values())
    assert all((train - outline).abs().amax(dim=(1, 2)).min() > 0.1 for outline in test)


def test_auto_says_loudly_that_it_takes_glyphs(glyphs_dir, archives, serve, capsys):
    serve({}, {})
    dataset, images, _ = utils.load_train_images("auto", glyphs_dir)
    assert (dataset, len(images)) == ("Glyphs", 60_000)
    assert re.search(r"(?s)had: .*404.*TRAINING ON GLYPHS", capsys.readouterr().err)


def test_validation_split_is_balanced_and_shares_no_image_with_the_train_split():
    labels = torch.randperm(12_000, generator=torch.Generator().manual_seed(0)) % 3
    images = torch.arange(12_000).view(-1, 1, 1)  # each image is its own number
    train, val = utils.split_train_validation(images, labels)
    assert val[1].bincount().tolist() == [500] * 3
    numbers = torch.cat([train[0], val[0]]).flatten()
    assert torch.equal(numbers.sort().values, torch.arange(12_000))
    assert torch.equal(labels[numbers], torch.cat([train[1], val[1]]))
    assert torch.equal(utils.split_train_validation(images, labels)[1][0], val[0])


def test_validation_split_leaves_half_of_a_small_class():
    _, val = utils.split_train_validation(torch.zeros(9, 28, 28), torch.tensor([0] * 8 + [1]))
    assert val[1].tolist() == [0] * 4


def test_validation_split_takes_every_kth_image_of_each_class():
    labels = torch.arange(3000) % 3
    (train, _), (val, _) = utils.split_train_validation(torch.arange(3000), labels, per_class=250)
    assert sorted(val.tolist()) == [i for i in range(3000) if i // 3 % 4 == 0]
    assert train.tolist() == [i for i in range(3000) if i // 3 % 4]


def test_pixel_statistics():
    images = random_images(50)
    share = images.numpy() / 255
    assert utils.pixel_statistics(images) == pytest.approx((share.mean(), share.std()))


def test_epoch_has_every_image_once_with_its_label_in_an_order_set_by_the_seed():
    def epoch(seed):
        torch.manual_seed(seed)
        xs, ys = zip(*utils.batches(images, torch.arange(1000), 0.3, 0.4, batch_size=300))
        assert [len(y) for y in ys] == [300, 300, 300, 100]
        order = torch.cat(ys)
        assert torch.equal(order.sort().values, torch.arange(1000))
        torch.testing.assert_close(torch.cat(xs), expected[order])
        return order.tolist()

    images = random_images(1000)
    expected = (F.pad(images, [2] * 4).unsqueeze(1).float() / 255 - 0.3) / 0.4
    assert sorted(epoch(0)) != epoch(0) == epoch(0) != epoch(1)


@pytest.mark.parametrize(("mirror", "shift"), [(True, 0), (False, 1), (True, 1), (False, 2)])
def test_augmentation_takes_all_mirrorings_and_shifts_equally_often(mirror, shift):
    (image,) = random_images(1)
    expected = {
        F.pad(x, [2] * 4).roll((down, right), (0, 1)).float().numpy().tobytes()
        for x in (image, image.flip(1))[: 1 + mirror]
        for down in range(-shift, shift + 1)
        for right in range(-shift, shift + 1)
    }
    torch.manual_seed(0)
    copies = image.expand(400 * len(expected), 28, 28)
    batches = utils.batches(copies, torch.zeros(len(copies)), 0.0, 1 / 255, 256, mirror, shift)
    seen = Counter(x.numpy().tobytes() for batch, _ in batches for x in batch)
    assert seen.keys() == expected
    assert 320 < min(seen.values()) <= max(seen.values()) < 480


def test_a_third_of_the_strokes_is_thinned_and_a_third_thickened():
    image = torch.zeros(28, 28, dtype=torch.uint8)
    image[8:20, 13:16] = 255
    padded = F.pad(image, [2] * 4).float()
    torch.manual_seed(0)
    copies = image.expand(900, 28, 28)
    (batch, _), *_ = utils.batches(copies, torch.zeros(900), 0.0, 1 / 255, 900, strokes=True)
    thicker, thinner = torch.zeros_like(padded), torch.zeros_like(padded)
    thicker[9:23, 14:19] = 255
    thinner[11:21, 16] = 255
    grown = batch.sum(dim=(1, 2, 3)) - padded.sum()
    for some, most in ((grown > 0, thicker), (grown < 0, thinner)):
        assert 240 < some.sum() < 360
        share = (batch[some, 0] - padded).abs().amax(dim=(1, 2)) / 255
        assert share.max() > 0.95
        assert abs(share.mean() - 0.5) < 0.06
        expected = padded + share.view(-1, 1, 1) * (most - padded)
        torch.testing.assert_close(batch[some, 0], expected)
    assert (batch[grown == 0, 0] == padded).all()


def test_clothes_are_batched_as_ever_with_no_random_number_more():
    images, states = random_images(50), []
    for strokes in (False, True):
        torch.manual_seed(0)
        (x, _), *_ = utils.batches(images, torch.zeros(50), 0.0, 1 / 255, 50, True, 1, strokes)
        states.append((x, torch.get_rng_state()))
    torch.manual_seed(0)
    order, mirrored, moved = torch.randperm(50), torch.rand(50) < 0.5, torch.randint(3, (2, 50))
    assert torch.equal(states[0][1], torch.get_rng_state())
    assert not torch.equal(states[1][1], torch.get_rng_state())
    for x, i, mirror, top, left in zip(states[0][0], order, mirrored, *moved):
        image = images[i].flip(1) if mirror else images[i]
        expected = F.pad(image, [3] * 4)[top : top + 32, left : left + 32]
        assert torch.equal(x[0], expected.float())


def test_predict_does_not_depend_on_the_batch_size():
    torch.manual_seed(0)
    model, images = LeNet(), random_images(25)
    whole = utils.predict(model, images, 0.3, 0.3)
    torch.testing.assert_close(utils.predict(model, images, 0.3, 0.3, batch_size=10), whole)
