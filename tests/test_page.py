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


class Arithmetic(nn.Conv2d):  # with one value for all maps and with one for each map
    def forward(self, x):
        x = 1.7159 * torch.tanh(super().forward(x + 0.1) * 2 / 3) - self.bias.view(-1, 1, 1)
        return x * self.bias.view(-1, 1, 1)


NETWORKS = {  # together they contain all operations that the page supports
    "LeNet": LeNet,
    "</script>": lambda: nn.Sequential(
        nn.Sequential(Arithmetic(1, 6, 5), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Sequential(nn.Flatten(), nn.Linear(1176, 26)),
    ),
    "Batch norm": lambda: nn.Sequential(
        nn.Sequential(nn.BatchNorm2d(1), nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8, 0.1)),
        nn.Sequential(nn.LeakyReLU(0.2), nn.Dropout2d(), nn.AvgPool2d(3, 2, 1), nn.Flatten()),
        nn.Sequential(nn.BatchNorm1d(1800), nn.Linear(1800, 10), nn.LogSoftmax(dim=1)),
    ),
    "Windows": lambda: nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 8, (3, 5), (2, 1), (1, 0), (1, 2)), nn.MaxPool2d(3, 2, 1)),
        nn.Sequential(nn.Conv2d(8, 12, (3, 5), padding="same", groups=4), nn.Sigmoid()),
        nn.Sequential(nn.Conv2d(12, 9, (8, 12)), nn.Conv2d(9, 9, 1), nn.Softmax(1), nn.Flatten()),
    ),
}


def describe(name, model, snapshots=(), epoch=1):
    model.train()(torch.rand(9, 1, 32, 32))  # for the statistics of batch norm
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
    """A browser with one page of all networks, which include those of the tracked page."""
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
    for argument in ("headless", "no-sandbox", "disable-gpu", "window-size=1366,768"):
        options.add_argument(f"--{argument}")
    driver = webdriver.Chrome(options, webdriver.ChromeService(programs[1]))
    driver.get(path.as_uri())
    yield driver
    driver.quit()


@pytest.fixture
def show(browser):  # and check for errors and network requests after the test
    def show(name):
        buttons = browser.find_elements(By.CSS_SELECTOR, "#sets button")
        next(button for button in buttons if button.text == name).click()
        return browser

    yield show
    assert browser.execute_script("return performance.getEntriesByType('resource')") == []
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


def text(browser, name):
    return browser.find_element(By.ID, name).text


def assert_same_logits(browser, model, mean=0.2, std=0.3):
    images, logits = browser.execute_script(
        "const all = state.net.samples;"
        "return [all.map(s => [...s.image]), all.map(s => [...s.outputs.at(-1)])]"
    )
    expected = utils.predict(model, torch.tensor(images).byte().view(-1, 28, 28), mean, std)
    torch.testing.assert_close(torch.tensor(logits), expected, rtol=0, atol=1e-4)
    return expected


def data_of(path):
    return json.loads(path.read_text("utf-8").split('id="networks">')[1].split("</script>")[0])


@pytest.mark.parametrize("dataset", ["FashionMNIST", "MNIST"])
def test_tracked_page_has_the_pretrained_network(show, dataset):
    run = utils.load_checkpoint(ROOT / "checkpoints" / f"lenet5-{dataset.lower()}.pt")
    model = LeNet()
    model.load_state_dict(run["model"])
    assert_same_logits(show(dataset), model, run["mean"], run["std"])
    weights = b"".join(weight.numpy().tobytes() for weight in run["model"].values())
    assert b64decode(data_of(page.PAGE)[dataset]["weights"]) == weights


@pytest.mark.parametrize("name", NETWORKS)
def test_other_networks_compute_what_pytorch_does(show, models, name):
    browser = show(name)
    expected = assert_same_logits(browser, models[name])
    assert text(browser, "answer") == f"{name} {expected[0].argmax()}"
    shown = [float(word) for word in re.findall(r"([\d.]+) %", text(browser, "bars"))]
    assert shown == pytest.approx((100 * utils.probabilities(expected)[0]).tolist(), abs=0.06)


def test_snapshots_compute_what_their_weights_do(show, models):
    browser = show("Epochs")
    for epoch in (3, 2, 1, 0):
        about = f"validation {epoch}0.0 %" if epoch else "random weights"
        assert text(browser, "when") == f"epoch {epoch}{', kept' if epoch == 3 else ''}: {about}"
        assert_same_logits(browser, models[f"Epoch {epoch}"])
        browser.find_element(By.ID, "epoch").send_keys(Keys.ARROW_LEFT)


def test_network_that_the_page_computes_differently_is_not_shown(show):
    for name, visible in (("Wrong", False), ("LeNet", True)):
        browser = show(name)
        assert ("other logits than PyTorch" in text(browser, "problem")) != visible
        assert browser.find_element(By.TAG_NAME, "main").is_displayed() == visible


def test_digit_drawn_with_the_mouse_is_recognized(show):
    browser = show("MNIST")
    browser.find_element(By.ID, "clear").click()
    assert text(browser, "answer") == ""
    actions, canvas = ActionChains(browser, duration=20), browser.find_element(By.ID, "drawing")
    actions.move_to_element_with_offset(canvas, -45, -72).click_and_hold()
    for point in ((45, -72), (-9, 72)):
        actions.move_to_element_with_offset(canvas, *point)
    actions.release().perform()
    assert text(browser, "answer") == "7"


@pytest.mark.parametrize("dataset", ["FashionMNIST", "MNIST"])
def test_image_drawn_pixel_by_pixel_is_that_image(show, dataset):
    same = show(dataset).execute_script(
        "return state.net.samples.map(({image}, n) => { if (n % 5) return true; load(n); read();"
        "return image.every((value, i) => Math.abs(value - state.image[i]) < 2); })"
    )
    assert sum(same) >= 98  # of 100; the others do not have the usual object size


def test_everything_can_be_done_with_the_keyboard(show):
    browser = show("FashionMNIST")
    browser.find_element(By.ID, "drawing").send_keys("c", Keys.SHIFT, *5 * [Keys.ARROW_DOWN])
    assert text(browser, "answer") != ""
    browser.find_element(By.ID, "layer-c1").send_keys(*2 * [Keys.ARROW_RIGHT], Keys.ENTER)
    assert text(browser, "title").startswith("C1, map 1, row 1, column 2: ")
    ActionChains(browser).send_keys(Keys.ESCAPE, "9").perform()
    assert (text(browser, "title"), text(browser, "answer")) == ("", "Ankle boot")


def test_values_are_explained_in_numbers_that_add_up(show, models):
    places = range(0, 1600, 160)  # in C3
    image, *explanations = show("LeNet").execute_script(
        "const numbers = i => { keep({layer: state.net.layers[3], i});"
        "const rows = document.querySelectorAll('#detail :is(.term, .total) .number:last-child');"
        "return [element('title').firstChild, ...rows].map(each => each.textContent); };"
        "return [[...state.image], ...arguments[0].map(numbers)]",
        list(places),
    )
    x = F.pad(torch.tensor(image).byte().view(1, 28, 28), [2] * 4)
    output = trace(models["LeNet"], utils.normalize(x, 0.2, 0.3))[3].output.flatten()
    for i, words in zip(places, explanations):
        numbers = [word.split(": ")[-1].replace("\N{MINUS SIGN}", "-") for word in words]
        value, *terms, total = map(float, numbers)
        assert value == pytest.approx(output[i].item(), abs=6e-4)
        assert sum(terms) == pytest.approx(total, abs=1e-9)


def test_page_of_a_run_shows_it_first(finished_run, options, data_dir, tmp_path, monkeypatch):
    for name in ("plots.draw_predictions", "plots.draw_confusion", "features.draw"):
        monkeypatch.setattr(f"images.{name}", lambda *args: None)
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


def test_network_with_nan_is_not_written(tmp_path):
    with pytest.raises(Unsupported, match="infinite or NaN"):
        page.write({"A": {"mean": float("nan")}}, tmp_path / "page.html")


def test_tracked_page_is_one_small_file():
    assert page.PAGE.stat().st_size < 2_600_000
    assert not re.search(r"https?://|<link|src=|import |NaN,", page.PAGE.read_text("utf-8"))
