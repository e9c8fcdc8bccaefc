"""The page images/lenet5.html, and images/page.py, which writes such pages, in a browser."""

import json
import re
import shutil
from base64 import b64decode

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, checkpoint, evaluate, random_images
from torch import nn

import train
import utils
from images import page
from images.trace import Unsupported, trace
from model import LeNet

webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

STROKES = {  # of digits, in a square from -1 to 1
    1: [[(0.05, -0.8), (0, 0.8)]],
    4: [[(-0.3, -0.8), (-0.5, 0.1), (0.5, 0.1)], [(0.3, -0.6), (0.2, 0.8)]],
    7: [[(-0.5, -0.8), (0.5, -0.8), (-0.1, 0.8)]],
}


class Arithmetic(nn.Module):
    """Arithmetic with one value for all maps, or with one for each."""

    def __init__(self):
        super().__init__()
        self.c1, self.c3, self.fc = nn.Conv2d(1, 6, 5), nn.Conv2d(6, 4, 5), nn.Linear(100, 10)
        self.values = nn.Parameter(torch.rand(2, 6, 1, 1))

    def forward(self, x):
        x = F.avg_pool2d(1.7159 * torch.tanh(self.c1(x - 0.5) * 2 / 3), 2)
        x = self.c3(x * self.values[0] - self.values[1])
        return self.fc(F.avg_pool2d(x, 2).flatten(1)) + torch.arange(10)


NETWORKS = {  # together they contain all operations that the page supports
    "LeNet": LeNet,
    "Arithmetic": Arithmetic,
    "</script>": lambda: nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 9, 5)),
        nn.Sequential(nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(225, 26)),
    ),
    "Batch norm": lambda: nn.Sequential(
        nn.Sequential(nn.BatchNorm2d(1), nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8, 0.1)),
        nn.Sequential(nn.LeakyReLU(0.2), nn.Dropout2d(), nn.AvgPool2d(3, 2, 1), nn.Flatten()),
        nn.Sequential(nn.Linear(1800, 10), nn.LogSoftmax(dim=1)),
    ),
    "Flat": lambda: nn.Sequential(
        nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), nn.BatchNorm1d(256), nn.Linear(256, 10))
    ),
    "Windows": lambda: nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 8, (3, 5), (2, 1), (1, 0), (1, 2)), nn.MaxPool2d(3, 2, 1)),
        nn.Sequential(nn.Conv2d(8, 12, (3, 5), padding="same", groups=4), nn.Sigmoid()),
        nn.Sequential(nn.Conv2d(12, 9, (8, 12)), nn.Conv2d(9, 9, 1), nn.Softmax(1), nn.Flatten()),
    ),
}


def describe(name, model, snapshots=(), epoch=1):
    """Return the data of the page for a network with random running statistics."""
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5)
    classes = [f"{name} {i}" for i in range(model.eval()(torch.zeros(1, 1, 32, 32)).numel())]
    images, labels = random_images(2 * len(classes)), torch.arange(2 * len(classes)) // 2
    logits = utils.predict(model, images, 0.2, 0.3)
    history = [{"val_accuracy": accuracy} for accuracy in (0.1, 0.2, 0.3)]
    run = {"name": "own", "dataset": name, "mean": 0.2, "std": 0.3, "epoch": epoch}
    run |= {"counts": (9, 1), "history": history, "snapshots": list(snapshots)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(utils.DATASETS, name, utils.DatasetInfo(classes))
        return page.describe_network(run, model, images, labels, logits)


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    models = {name: make() for name, make in NETWORKS.items()}
    for epoch in range(4):
        models[f"Epoch {epoch}"] = model = LeNet()
        for weight in model.state_dict().values():  # such as 8 bits can hold
            weight.random_(-127, 128).view(-1)[0] = 127
            weight /= 512
    models["Epoch 1"].c5.weight.data *= 2**19  # more than half precision can hold
    return models


@pytest.fixture(scope="module")
def browser(models, tmp_path_factory):
    """A browser with the tracked page in one tab, and with a page of all networks in another."""
    programs = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if not all(programs):
        pytest.skip("needs chromium and chromedriver")
    networks = {name: describe(name, models[name]) for name in NETWORKS}
    snapshots = [train.snapshot(models[f"Epoch {epoch}"], epoch) for epoch in range(4)]
    networks["Epochs"] = describe("Epochs", models["Epoch 3"], snapshots, epoch=3)
    networks["Wrong"] = networks["LeNet"] | {"mean": 0.21}
    path = tmp_path_factory.mktemp("page") / "page.html"
    page.write(networks, path)
    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for argument in ("headless", "no-sandbox", "disable-gpu", "disable-background-networking"):
        options.add_argument(f"--{argument}")
    driver = webdriver.Chrome(options, webdriver.ChromeService(programs[1]))
    driver.set_window_size(1366, 768)
    driver.get(page.PAGE.as_uri())
    driver.switch_to.new_window("tab")
    driver.get(path.as_uri())
    yield driver
    driver.quit()


def use_tab(browser, tab):
    """Switch to a tab and reset it; after the test, check for errors and network requests."""
    browser.switch_to.window(browser.window_handles[tab])
    ActionChains(browser).reset_actions()
    browser.execute_script(
        "document.activeElement.blur(); const [first] = Object.keys(networks); keep(null);"
        "if (state.net !== networks[first]) choose(first);"
        "load(null); Object.assign(state, {pen: {x: 140, y: 140}, stroke: null})"
    )
    yield browser
    assert browser.execute_script("return performance.getEntriesByType('resource')") == []
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


@pytest.fixture
def tracked(browser):
    yield from use_tab(browser, 0)


@pytest.fixture
def generated(browser):
    yield from use_tab(browser, 1)


def choose(browser, dataset):
    for button in browser.find_elements(By.CSS_SELECTOR, "#sets button"):
        if button.text == dataset:
            button.click()


def text(browser, name):
    return browser.find_element(By.ID, name).text


def assert_same_logits(browser, model, mean=0.2, std=0.3):
    """Compare the logits that the page computed for all its test images with PyTorch's."""
    images, logits = browser.execute_script(
        "const all = state.net.samples;"
        "return [all.map(s => [...s.image]), all.map(s => [...s.outputs.at(-1)])]"
    )
    expected = utils.predict(model, torch.tensor(images).byte().view(-1, 28, 28), mean, std)
    torch.testing.assert_close(torch.tensor(logits), expected, rtol=0, atol=1e-4)
    return expected


def data_of(path):
    return json.loads(path.read_text("utf-8").split('id="networks">')[1].split("</script>")[0])


def pretrained(dataset):
    run = utils.load_checkpoint(ROOT / "checkpoints" / f"lenet5-{dataset.lower()}.pt")
    model = LeNet()
    model.load_state_dict(run["model"])
    return run, model.eval()


@pytest.mark.parametrize("dataset", ["FashionMNIST", "MNIST"])
def test_tracked_page_has_the_pretrained_network(tracked, dataset):
    choose(tracked, dataset)
    run, model = pretrained(dataset)
    assert_same_logits(tracked, model, run["mean"], run["std"])
    weights = b"".join(weight.numpy().tobytes() for weight in run["model"].values())
    assert b64decode(data_of(page.PAGE)[dataset]["weights"]) == weights


@pytest.mark.parametrize("name", NETWORKS)
def test_other_networks_compute_what_pytorch_does(generated, models, name):
    choose(generated, name)
    expected = assert_same_logits(generated, models[name])
    generated.execute_script("load(0)")
    assert text(generated, "answer") == f"{name} {expected[0].argmax()}"
    shown = [float(word) for word in re.findall(r"([\d.]+) %", text(generated, "bars"))]
    assert shown == pytest.approx((100 * utils.probabilities(expected)[0]).tolist(), abs=0.06)


def test_snapshots_compute_what_their_weights_do(generated, models):
    choose(generated, "Epochs")
    texts = ["epoch 3, kept: validation 30.0 %", "epoch 2: validation 20.0 %"]
    texts += ["epoch 1: validation 10.0 %", "epoch 0: random weights"]
    for epoch, when in zip((3, 2, 1, 0), texts):
        assert text(generated, "when") == when
        assert_same_logits(generated, models[f"Epoch {epoch}"])
        generated.find_element(By.ID, "epoch").send_keys(Keys.ARROW_LEFT)


def test_network_that_the_page_computes_differently_is_not_shown(generated):
    for name, visible in (("Wrong", False), ("LeNet", True)):
        choose(generated, name)
        assert ("other logits than PyTorch" in text(generated, "problem")) != visible
        assert generated.find_element(By.TAG_NAME, "main").is_displayed() == visible


def test_digits_drawn_with_the_mouse_are_recognized(tracked):
    choose(tracked, "MNIST")
    canvas = tracked.find_element(By.ID, "drawing")
    for digit, strokes in STROKES.items():
        actions = ActionChains(tracked, duration=5)
        for stroke in strokes:
            for i, (x, y) in enumerate(stroke):
                actions.move_to_element_with_offset(canvas, round(90 * x), round(90 * y))
                if i == 0:
                    actions.click_and_hold()
            actions.release()
        actions.perform()
        assert text(tracked, "answer") == str(digit)
        tracked.find_element(By.ID, "clear").click()
        assert text(tracked, "answer") == ""


@pytest.mark.parametrize("dataset", ["FashionMNIST", "MNIST"])
def test_image_drawn_pixel_by_pixel_is_that_image(tracked, dataset):
    choose(tracked, dataset)
    same = tracked.execute_script(
        "return state.net.samples.map(({image}, n) => { if (n % 5) return true; load(n); read();"
        "return image.every((value, i) => Math.abs(value - state.image[i]) < 2); })"
    )
    assert sum(same) >= 98  # of 100; the others do not have the usual object size


def test_everything_can_be_done_with_the_keyboard(tracked):
    tracked.find_element(By.CSS_SELECTOR, "#sets button").send_keys(Keys.SPACE)
    names = []
    while "bars" not in names and len(names) < 20:
        ActionChains(tracked).send_keys(Keys.TAB).perform()
        focus = tracked.switch_to.active_element
        names.append(focus.get_attribute("id") or focus.text or focus.get_attribute("title"))
    layers = [f"layer-{name}" for name in ("input", "c1", "s2", "c3", "s4", "c5", "f6")]
    for name in ("MNIST", "drawing", "clear", "T-shirt/top", *layers, "bars"):
        assert name in names
    tracked.find_element(By.ID, "drawing").send_keys("c", Keys.SHIFT, *5 * [Keys.ARROW_DOWN])
    assert text(tracked, "answer") != ""
    tracked.find_element(By.ID, "layer-c1").send_keys(*2 * [Keys.ARROW_RIGHT], Keys.ENTER)
    assert text(tracked, "title").startswith("C1, map 1, row 1, column 2: ")
    ActionChains(tracked).send_keys(Keys.ESCAPE, "9").perform()
    assert (text(tracked, "title"), text(tracked, "answer")) == ("", "Ankle boot")


def number(text):
    return float(text.replace("\N{MINUS SIGN}", "-"))


@pytest.mark.parametrize("index", [3, 4, 6])  # C3, S4 and F6
def test_one_value_is_explained_in_numbers_that_add_up(tracked, index):
    image = tracked.execute_script("load(3); return [...state.image]")
    run, model = pretrained("FashionMNIST")
    x = torch.tensor(image).byte().view(1, 28, 28)
    layers = trace(model, utils.normalize(F.pad(x, [2] * 4), run["mean"], run["std"]))
    first = layers[index].operations[0](layers[index - 1].output[None]).flatten()
    i = 7 * len(first) // 13
    title, parts, total, windows = tracked.execute_script(
        "keep({layer: state.net.layers[arguments[0]], i: arguments[1]});"
        "const all = (from, query) => [...from.querySelectorAll(query)], detail = element('detail');"
        "const last = each => each.querySelector('.number:last-child').textContent;"
        "const cells = from => all(from, '.grid span').map(each => each.textContent);"
        "const terms = all(detail, '.term').map(last), parts = terms.length ? terms : cells(detail);"
        "return [element('title').firstChild.data, parts, last(all(detail, '.total')[0]),"
        "all(detail, 'details').map(each => [last(each), cells(each)])]",
        *(index, i),
    )
    expected = layers[index].output.flatten()[i].item()
    assert number(title.split(": ")[1]) == pytest.approx(expected, abs=6e-4)
    count = 4 if index == 4 else 1  # the sum of a window of S4 is 4 times its mean
    assert number(total) == pytest.approx(count * first[i].item(), abs=0.006)
    assert sum(map(number, parts)) == pytest.approx(number(total), abs=1e-9)
    assert len(windows) == (6 if index == 3 else 0)
    for part, cells in windows:  # a window, a kernel and their products
        assert sum(map(number, cells[50:])) == pytest.approx(number(part), abs=1e-9)


def test_page_of_a_run_shows_it_first(finished_run, options, data_dir, tmp_path, monkeypatch):
    for module, name in (
        ("plots", "draw_predictions"),
        ("plots", "draw_confusion"),
        ("features", "draw"),
    ):
        monkeypatch.setattr(f"images.{module}.{name}", lambda *args: None)
    shutil.copytree(finished_run, tmp_path, dirs_exist_ok=True)
    evaluate.main(options(tmp_path))
    path = tmp_path / "images" / "Glyphs" / "lenet5.html"
    (name, own), *others = data_of(path).items()
    assert (name, others) == ("Glyphs", list(data_of(page.PAGE).items()))
    run = checkpoint(finished_run, "best.pt")
    images, labels = utils.load_images("Glyphs", data_dir, "test")
    chosen = [i for digit in range(10) for i in (labels == digit).nonzero()[:10, 0].tolist()]
    assert own["labels"] == labels[chosen].tolist()
    assert b64decode(own["samples"]) == images[chosen].numpy().tobytes()
    weights = b"".join(weight.numpy().tobytes() for weight in run["model"].values())
    assert b64decode(own["weights"]) == weights
    shown = [own[name] for name in ("mean", "std", "box", "by_mass")]
    assert shown == [run["mean"], run["std"], 20, False]


def test_tracked_page_has_test_images_of_the_real_datasets(real_data):
    for dataset, network in data_of(page.PAGE).items():
        images, labels = utils.load_images(dataset, real_data, "test")
        chosen = [i for label in range(10) for i in (labels == label).nonzero()[:10, 0].tolist()]
        assert b64decode(network["samples"]) == images[chosen].numpy().tobytes()
        assert (network["box"], network["by_mass"]) == {"MNIST": (20, True)}.get(
            dataset, (28, False)
        )


def test_network_with_nan_is_not_written(tmp_path):
    with pytest.raises(Unsupported, match="infinite or NaN"):
        page.write({"A": {"mean": float("nan")}}, tmp_path / "page.html")
    assert list(tmp_path.iterdir()) == []


def test_tracked_page_is_one_small_file():
    assert page.PAGE.stat().st_size < 2_600_000
    assert not re.search(r"https?://|<link|src=|import |NaN,", page.PAGE.read_text("utf-8"))
