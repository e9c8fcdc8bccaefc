"""Datasets: downloads, damaged files, caches, Glyphs, the validation split and batches."""

import gzip
import hashlib
import http.server
import re
import select
import socket
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from conftest import evaluate, files, random_images
from torchvision import datasets

import train
import utils
from images import glyphs, plots
from model import LeNet


def idx(tensor):
    """Return the content of a file in MNIST's format."""
    sizes = [0x800 + tensor.ndim, *tensor.shape]
    content = tensor.to(torch.uint8).numpy().tobytes()
    return b"".join(size.to_bytes(4, "big") for size in sizes) + content


def make_files(num_classes):
    """Make unpacked files with 20 training and 5 test images of each class, by name."""
    contents = {}
    for split, count in (("train", 20 * num_classes), ("t10k", 5 * num_classes)):
        contents[f"{split}-images-idx3-ubyte"] = idx(random_images(count))
        contents[f"{split}-labels-idx1-ubyte"] = idx(torch.arange(count) % num_classes)
    return contents


FILES = make_files(num_classes=10)
ARCHIVES = {f"{name}.gz": gzip.compress(content) for name, content in FILES.items()}
IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
OTHER_IMAGES = gzip.compress(FILES[IMAGES][:-1] + b"\0")  # only its checksum is wrong
PROBLEMS = {"missing": None, "damaged": OTHER_IMAGES, "stalls": b"stalls", "cut off": b"part"}


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.requests.append(self.path)
        _, number, name = self.path.split("/")
        content = self.server.mirrors[int(number)].get(name)
        if content is None:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(ARCHIVES[name])))
        self.end_headers()
        self.wfile.write(content)
        if content == b"stalls" and not select.select([self.connection], [], [], 60)[0]:
            self.server.requests.append("the client never gave up")


@pytest.fixture
def server(monkeypatch):
    """The server of two mirrors of FashionMNIST, which have no files unless a test adds some."""
    monkeypatch.setattr(Handler, "log_message", lambda *args: None)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.requests, server.mirrors = [], [{}, {}]
        threading.Thread(target=server.serve_forever, args=[0.02], daemon=True).start()
        first, second = [f"http://127.0.0.1:{server.server_port}/{mirror}/" for mirror in (0, 1)]
        sums = [(name, hashlib.md5(content).hexdigest()) for name, content in ARCHIVES.items()]
        monkeypatch.setattr(datasets.FashionMNIST, "resources", sums)
        monkeypatch.setattr(datasets.FashionMNIST, "mirrors", [first])
        monkeypatch.setattr(utils.DATASETS["FashionMNIST"], "mirrors", (second,))
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        yield server
        server.shutdown()
        assert socket.getdefaulttimeout() is None
        assert datasets.FashionMNIST.mirrors == [first]
        assert "the client never gave up" not in server.requests


def store(directory, contents, dataset="FashionMNIST"):
    (directory / dataset / "raw").mkdir(parents=True)
    for name, content in contents.items():
        (directory / dataset / "raw" / name).write_bytes(content)
    return directory / dataset


def check_loaded(directory):
    splits = [utils.load_images("FashionMNIST", directory, split) for split in ("train", "test")]
    assert [idx(tensor) for split in splits for tensor in split] == list(FILES.values())


@pytest.mark.parametrize("problem", PROBLEMS)
def test_second_mirror_is_used_if_the_first_fails(tmp_path, server, monkeypatch, problem):
    server.mirrors = [{f"{IMAGES}.gz": PROBLEMS[problem]}, ARCHIVES]
    monkeypatch.setattr(utils, "TIMEOUT", 1 if problem == "stalls" else 60)
    check_loaded(tmp_path)


def test_only_auto_falls_back_to_glyphs_after_a_failed_download(data_dir, server, capsys):
    server.mirrors = [ARCHIVES | {f"{LABELS}.gz": b"part"}, {}]
    before = files(data_dir)
    message = r"FashionMNIST is missing and cannot be downloaded \(.*\): put its four \.gz files "
    message += f"into {data_dir}/FashionMNIST/raw"
    with pytest.raises(utils.Unavailable, match=rf"^{message}\Z"):
        utils.load_training_images("FashionMNIST", data_dir)
    assert files(data_dir) == before  # no partial files
    assert utils.load_training_images("auto", data_dir)[0] == "Glyphs"
    assert re.search(f"!!!\n{message}\\.\n\nTRAINING ON GLYPHS INSTEAD: ", capsys.readouterr().err)


DAMAGE = {
    "archive": (ARCHIVES | {f"{IMAGES}.gz": OTHER_IMAGES}, "damaged .*: put its four"),
    "truncated": (FILES | {IMAGES: FILES[IMAGES][:-9]}, "damaged .*: put its four"),
    "empty": (FILES | {LABELS: b""}, "damaged: delete this directory"),
    "not a class": (FILES | {LABELS: idx(torch.arange(200) % 11)}, "28x28 .* 10 classes: delete"),
    "size": (FILES | {IMAGES: idx(torch.ones(200, 32, 32))}, "28x28 .* 10 classes: delete"),
}


@pytest.mark.parametrize(("contents", "message"), DAMAGE.values(), ids=DAMAGE)
def test_damaged_files_never_lead_to_glyphs(tmp_path, server, contents, message):
    directory = store(tmp_path, contents)
    with pytest.raises(utils.Error, match=message) as error:
        utils.load_training_images("auto", tmp_path)
    assert str(directory) in str(error.value)


def test_runs_at_once_share_one_download_of_what_is_not_on_disk(tmp_path, server, monkeypatch):
    monkeypatch.setattr(utils.DATASETS["FashionMNIST"], "mirrors", ())
    server.mirrors = [ARCHIVES, {}]
    for name in ("single", "shared"):
        store(tmp_path / name, ARCHIVES | {f"{IMAGES}.gz": OTHER_IMAGES})
    check_loaded(tmp_path / "single")
    expected = server.requests.copy()
    assert set(expected) == {f"/0/{IMAGES}.gz"}
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(check_loaded, [tmp_path / "shared"] * 4))
    socket.setdefaulttimeout(None)  # threads share it, unlike processes
    assert server.requests == 2 * expected


def test_real_archives_have_the_known_means(real_data):
    for dataset, mean in (("FashionMNIST", 0.2860), ("MNIST", 0.1307)):
        images, _ = utils.load_images(dataset, real_data, "train")
        assert utils.mean_and_std(images)[0] == pytest.approx(mean, abs=1e-4)


def test_added_dataset_is_trained_and_evaluated(tmp_path, monkeypatch, run_script, no_plots):
    store(tmp_path, make_files(num_classes=26), "Letters")
    monkeypatch.setattr(plots, "save_figure", lambda *args: None)
    monkeypatch.setattr(datasets, "Letters", type("Letters", (datasets.MNIST,), {}), raising=False)
    info = utils.DatasetInfo([chr(ord("A") + label) for label in range(26)])
    monkeypatch.setitem(utils.DATASETS, "Letters", info)
    options = ["--dataset=Letters", f"--data-dir={tmp_path}", f"--output-dir={tmp_path}"]
    status, out, _ = run_script(train.main, *options, "--epochs=1")
    assert (status, "Letters: 260 images to train on, 260 for validation\n" in out) == (0, True)
    status, out, _ = run_script(evaluate.main, *options)
    rows = re.findall(r"^([A-Z]) +\S+% \(\d/5\)  ", out, re.MULTILINE)
    assert (status, rows) == (0, info.classes)


def test_cache_is_used_unless_it_is_damaged_foreign_or_old(tmp_path, server, monkeypatch, capsys):
    directory = store(tmp_path, FILES)
    (directory / f"test-v{utils.CACHE_VERSION}.pt").mkdir()  # cannot be written
    check_loaded(tmp_path)
    assert "; the next start will be slow" in capsys.readouterr().err
    (cache,) = directory.glob("train*.pt")
    good = cache.read_bytes()
    utils.save([1, 2], cache)
    for content in (good[:5000] + bytes(9) + good[5009:], b"text", cache.read_bytes()):
        cache.write_bytes(content)
        check_loaded(tmp_path)
        assert f"; creating {cache} again\n" in capsys.readouterr().err
        assert cache.read_bytes() == good
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torchvision")
    assert utils.load_training_images("auto", tmp_path)[0] == "FashionMNIST"  # from the cache
    monkeypatch.setattr(utils, "CACHE_VERSION", utils.CACHE_VERSION + 1)
    with pytest.raises(utils.Error, match=r"nms does not exist.* pip install .*torch torchvision"):
        utils.load_training_images("auto", tmp_path)


def test_glyphs_are_fixed_and_the_test_fonts_are_never_trained_on(data_dir, monkeypatch):
    images, labels = utils.load_images("Glyphs", data_dir, "train")  # of the test split
    assert labels[:10].tolist() == [5, 0, 2, 1, 3, 8, 5, 3, 5, 1]
    means = [49.62, 33.57, 27.17, 38.43, 17.82, 34.29, 32.33, 13.06, 19.51, 28.59]
    assert images[:10].float().mean(dim=(1, 2)).tolist() == pytest.approx(means, abs=0.3)
    fonts = []
    monkeypatch.setattr(glyphs, "render_digits", fonts.extend)
    with pytest.raises(TypeError):  # nothing is rendered; all 60,000 images would take long
        glyphs.draw_glyphs("train")
    assert len(fonts) == 16 and not set(fonts) & set(glyphs.TEST_FONTS)


def test_validation_split_takes_evenly_spaced_images_of_each_class():
    numbers = torch.arange(3000)
    (train, _), (val, _) = utils.split_train_validation(numbers, numbers % 3, per_class=250)
    assert torch.equal(val, numbers[numbers // 3 % 4 == 0])
    assert torch.equal(train, numbers[numbers // 3 % 4 != 0])
    _, (_, labels) = utils.split_train_validation(torch.zeros(9), torch.tensor([0] * 8 + [1]))
    assert labels.tolist() == [0] * 4  # at most half of a class


def test_epoch_contains_every_image_once_in_an_order_set_by_the_seed():
    images, numbers, orders = random_images(301), torch.arange(301), []
    mean, std = utils.mean_and_std(images)
    pixels = images.double() / 255
    assert (mean, std) == pytest.approx((pixels.mean().item(), pixels.std().item()), rel=1e-4)
    expected = (F.pad(images, [2] * 4).unsqueeze(1).float() / 255 - mean) / std
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        xs, ys = zip(*utils.batches(images, numbers, mean, std, batch_size=100))
        assert [len(y) for y in ys] == [100, 100, 101]  # batch norm may need two images
        assert torch.equal(torch.cat(ys).sort().values, numbers)
        torch.testing.assert_close(torch.cat(xs), expected[torch.cat(ys)])
        orders.append(torch.cat(ys).tolist())
    assert numbers.tolist() != orders[0] == orders[1] != orders[2]
    state = torch.get_rng_state()
    torch.manual_seed(1)
    list(utils.batches(images.to("meta"), numbers.to("meta"), mean, std, batch_size=100))
    assert torch.equal(torch.get_rng_state(), state)  # every device sees the same batches


def test_flips_and_shifts_are_equally_frequent():
    torch.manual_seed(0)
    image = F.pad(random_images(1), [2] * 4)
    offsets = [(down, right) for down in (-1, 0, 1) for right in (-1, 0, 1)]
    versions = [x.roll(offset, (1, 2)) for offset in offsets for x in (image, image.flip(2))]
    images = random_images(1).expand(400 * 18, 28, 28)
    ((x, _),) = utils.batches(images, images[:, 0, 0], 0.0, 1 / 255, 400 * 18, flip=True, shift=1)
    counts = [(x == version).flatten(1).all(dim=1).sum() for version in versions]
    assert sum(counts) == len(images)
    assert 300 < min(counts) <= max(counts) < 500


def test_strokes_become_up_to_one_pixel_thicker_or_thinner():
    line, thick, thin = torch.zeros(3, 1, 1, 9, 9)
    line[..., 3:6] = thin[..., 4] = thick[..., 2:7] = 1.0
    for amount, expected in ((0.0, line), (1.0, thick), (-1.0, thin), (0.5, (line + thick) / 2)):
        assert torch.equal(utils.vary_stroke_width(line, torch.tensor([amount])), expected)


def test_predict_checks_its_input_and_depends_neither_on_batch_size_nor_dropout():
    model = torch.nn.Sequential(LeNet(), torch.nn.Dropout())
    logits = utils.predict(model, random_images(25), 0.3, 0.3)
    torch.testing.assert_close(utils.predict(model, random_images(25), 0.3, 0.3, 10), logits)
    (logits * torch.ones(25, 10, requires_grad=True)).sum().backward()  # allows gradients
    for images in (torch.rand(2, 28, 28), random_images(1)[0], random_images(2).numpy()):
        with pytest.raises(ValueError, match=r"^images must be a uint8 tensor, N x 28 x 28, not a"):
            utils.predict(model, images, 0.3, 0.3)
    images = random_images(2).float()
    utils.normalize(images, 0.3, 0.3)
    assert torch.equal(images, random_images(2).float())  # is not modified
    for outputs in (logits, logits.softmax(dim=1)):
        torch.testing.assert_close(utils.probabilities(outputs), logits.softmax(dim=1))
