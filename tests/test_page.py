"""The page images/lenet5.html, and images/page.py, which builds such pages, in a browser."""

import json
import re
import shutil
import subprocess
from base64 import b64decode
from urllib.parse import quote

import pytest
import torch
from conftest import ROOT, checkpoint, evaluate, random_images
from torch import nn

import train
import utils
from images import page
from images.trace import Unsupported
from model import LeNet

webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

SIZES = [(360, 740), (390, 844), (683, 384), (844, 390), (1280, 720), (1366, 768), (2560, 1440)]


class Arithmetic(nn.Conv2d):  # with one value for all maps and with one for each map
    def forward(self, x):
        x = 1.7159 * torch.tanh(super().forward(x + 0.1) * 2 / 3) - self.bias.view(-1, 1, 1)
        return x * self.bias.view(-1, 1, 1)


TITLES = "return [...element('images').children].map(({title}) => title);"
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


def noise(classes):
    brightness = torch.linspace(0.05, 1, 12 * classes).view(-1, 1, 1)
    return (random_images(12 * classes) * brightness).byte(), torch.arange(12 * classes) % classes


def describe(name, model, snapshots=(), epoch=1):
    model.train()(torch.rand(9, 1, 32, 32))  # for the statistics of batch norm
    classes = [f"{name} {i}" for i in range(model.eval()(torch.zeros(1, 1, 32, 32)).numel())]
    images, labels = noise(len(classes))
    logits = utils.predict(model, images, 0.2, 0.3)
    run = {"name": "own", "dataset": name, "mean": 0.2, "std": 0.3, "epoch": epoch}
    run["snapshots"] = list(snapshots)
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
            weight /= 32
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
    networks["Wrong"] = (networks["LeNet"][0] | {"mean": 0.21}, networks["LeNet"][1])
    path = tmp_path_factory.mktemp("page") / "page.html"
    page.write(networks, path)
    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for argument in ("headless", "no-sandbox", "disable-gpu"):
        options.add_argument(f"--{argument}")
    driver = webdriver.Chrome(options, webdriver.ChromeService(programs[1]))
    driver.get(path.as_uri())
    driver.offered = driver.find_element(By.ID, "tour-next").text
    yield driver
    driver.quit()


class Page:
    def __init__(self, browser):
        self.browser = browser
        self.run = browser.execute_script
        self.find = lambda selector: browser.find_element(By.CSS_SELECTOR, selector)
        self.all = lambda selector: browser.find_elements(By.CSS_SELECTOR, selector)
        self.text = lambda selector: self.find(selector).text
        self.place = lambda: self.run("return decodeURIComponent(location.hash.slice(1))")
        self.wait = lambda check: WebDriverWait(browser, 60, 0.05).until(lambda _: check())
        self.act = lambda *keys: ActionChains(browser, 20).send_keys(*keys)

    def move_to(self, element, x, y):
        """Move the mouse to a position, relative to the center, and wait for two frames."""
        self.act().move_to_element_with_offset(element, x, y).perform()
        code = "requestAnimationFrame(() => requestAnimationFrame(() => arguments[0]()))"
        self.browser.execute_async_script(code)

    def resize(self, width, height):
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        self.move_to(self.find("h1"), 0, 0)


@pytest.fixture
def opened(browser):
    """Open an address: opened(place). Check for errors and requests after the test."""
    shown = Page(browser)
    shown.resize(1366, 768)
    shown.run("state.stroke = null; document.getElementById('tour-close').click()")
    if not shown.find("#centered").is_selected():
        shown.find("#centered").click()
    code = """history.replaceState(null, '', '#');
        location.hash = arguments[0];
        addEventListener('hashchange', () => arguments[1](), {once: true});"""
    yield lambda place: browser.execute_async_script(code, place) or shown
    assert shown.run("return performance.getEntriesByType('resource')") == []
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


def data_of(path, name):
    """Return the description of a network in a page, and its arrays as bytes."""
    pattern = r'<script data-network="(.*?)"(.*?)>\n(.*?)</script>'
    blocks = re.findall(pattern, path.read_text("utf-8"), re.DOTALL)
    (_, description), *arrays = [block[1:] for block in blocks if block[0] == name]
    names = [re.search(r'data-array="(.*?)"', attributes)[1] for attributes, _ in arrays]
    return json.loads(description), dict(zip(names, [b64decode(text) for _, text in arrays]))


def test_tracked_page_is_one_small_file_built_from_the_sources(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "PAGE", shutil.copy(page.PAGE, tmp_path / "page.html"))
    tracked = page.PAGE.read_bytes()
    page.main(["--script-only"])
    assert page.PAGE.read_bytes() == tracked
    source, _, data = tracked.decode().partition("<script data-network=")
    assert len(tracked) < 3_000_000
    assert not re.search(r"https?://|<link|src=|import[ (]|url\(", source + data)
    assert max(map(len, data.splitlines())) <= 120
    assert not re.search(r"<(?!/?script\b|/body>|/html>)", data)  # the data come last
    assert data.startswith('"MNIST"')


def assert_same_logits(shown, model, mean=0.2, std=0.3):
    """Compare the logits of 50 test images with PyTorch's, and return those."""
    images, logits = shown.run("""
        const images = state.net.images.slice(0, 50).map(({image}) => image);
        return [images.map(image => [...image]),
          images.map(image => [...forward(state.net, image).at(-1).at(-1)])];""")
    expected = utils.predict(model, torch.tensor(images).byte().view(-1, 28, 28), mean, std)
    torch.testing.assert_close(torch.tensor(logits), expected, rtol=0, atol=1e-4)
    return expected


@pytest.mark.parametrize("dataset", ["FashionMNIST", "MNIST"])
def test_tracked_page_has_the_pretrained_network_and_test_images(opened, dataset):
    path = ROOT / "checkpoints" / f"lenet5-{dataset.lower()}.pt"
    run, model = utils.load_checkpoint(path), LeNet()
    utils.load_weights(path, run, model)
    assert_same_logits(opened(dataset), model, run["mean"], run["std"])
    _, arrays = data_of(page.PAGE, dataset)
    weights = torch.cat([weight.flatten() for weight in run["model"].values()])
    assert arrays["weights"] == weights.numpy().tobytes()
    assert list(arrays["classes"][:100]) == [n // 10 for n in range(100)]


def test_page_of_a_run_shows_it_first(finished_run, options, data_dir, tmp_path, monkeypatch):
    for name in ("plots.draw_predictions", "plots.draw_confusion", "features.draw"):
        monkeypatch.setattr(f"images.{name}", lambda *args: None)
    shutil.copytree(finished_run, tmp_path, dirs_exist_ok=True)
    evaluate.main(options(tmp_path))
    path = tmp_path / "images" / "Glyphs" / "lenet5.html"
    names = re.findall(r'data-network="(.*?)" type="application', path.read_text("utf-8"))
    assert names == ["Glyphs", "MNIST", "FashionMNIST"]
    assert data_of(path, "MNIST") == data_of(page.PAGE, "MNIST")
    description, arrays = data_of(path, "Glyphs")
    run = checkpoint(finished_run, "best.pt")
    weights = torch.cat([weight.flatten() for weight in run["model"].values()])
    assert arrays["weights"] == weights.numpy().tobytes()
    assert (description["mean"], description["std"]) == (run["mean"], run["std"])
    with pytest.raises(Unsupported, match="infinite or NaN"):
        page.write({"Glyphs": (description | {"std": float("nan")}, {})}, path)


CHECK = """
const near = (exact, shown, decimals) => Math.abs(exact - shown) <= 0.5 * 10 ** -decimals + 1e-9;
const number = text => Number(text.replace("\N{MINUS SIGN}", "-"));
const evaluate = text => new Function("leaky", "relu", "sigmoid", "tanh", "dropout2d", "exp", "log",
  "return " + text.replace(/pixel |^[a-z ]+: /g, "").replaceAll("\N{MINUS SIGN}", "-")
    .replaceAll("\N{MULTIPLICATION SIGN}", "*").replaceAll("÷", "/").replace("leaky relu", "leaky")
    .replace("e^", "exp"))(x => Math.max(x / 5, x), x => Math.max(0, x),
  x => 1 / (1 + Math.exp(-x)), Math.tanh, x => x, Math.exp, Math.log);
const check = { // return what the step shows as its result, or NaN if that is wrong
  line({text, total}, before) {
    const shown = text.match(/\N{MINUS SIGN}?[\\d.]+/g).map(number);
    if (before !== null && !shown.includes(before)) return NaN;
    const decimals = total.match(/\\.(\\d*)/)?.[1].length ?? 0;
    return near(evaluate(text), number(total), decimals) ? number(total) : NaN;
  },
  pool({values, max, by, result, digits}) {
    const numbers = values.map(value => round(value, digits.inputs));
    const exact = max ? Math.max(...numbers) : sum(numbers) / by;
    const shown = round(result, digits.result);
    return near(exact, shown, digits.result) ? shown : NaN;
  },
  sum({terms, bias, rounding, total, digits: {inputs, weights, result}}) {
    const right = terms.every(({window, kernel, products, total}) => near(sum(products), total, 8)
      && products.every((product, k) =>
        near(round(window[k], inputs) * round(kernel[k], weights), product, result)));
    const all = sum([...terms.map(({total}) => total), bias, rounding]);
    return right && near(all, total, 8) ? total : NaN;
  },
};
const {net, steps} = state, last = net.layers.at(-1);
const score = i => round(steps.at(-1)[0][i], last.decimals);
"""


@pytest.mark.parametrize("name", NETWORKS)
def test_explanations_give_the_shown_result_on_a_calculator(opened, name):
    code = """return net.layers.flatMap(layer => {
      const every = Math.ceil(layer.after.size / 12);
      return count(Math.floor(layer.after.size / every), n => n * every).flatMap(i => {
        const explained = explain(net, steps, {layer, i});
        const result = explained.reduce((before, step) =>
          (isNaN(before) ? NaN : check[step.kind](step, before)), null);
        const value = round(steps[layer.index].at(-1)[i], layer.decimals);
        const sources = layer.windows?.slides ? sourcesOf(layer, i) : [];
        const places = sources.flatMap(({indices}) => indices.filter(index => index >= 0));
        const from = places.map(index => coordinates(layer.before, index));
        const ends = name => [Math.min, Math.max].map(end => end(...from.map(at => at[name])));
        const box = from.length && receptiveField(net.layers, {layer, i}).at(-2);
        const right = !box || `${["map", "row", "column"].map(ends)}` === `${[box.first, box.last,
          box.top, box.top + box.height - 1, box.left, box.left + box.width - 1]}`;
        return right && result === (layer === last ? result : value) ? []
          : [[layer.name, i, explained.map(({text, total}) => [text, total])]];
      });
    });"""
    shown = opened(quote(name, safe=""))
    assert shown.run(CHECK + code) == []
    code = """const step = canCompare(net) && explainDifference(net, steps, 3, 8);
        return !step || near(check.sum(step), score(3) - score(8), 8);"""
    assert shown.run(CHECK + code)


@pytest.mark.parametrize("name", NETWORKS)
def test_other_networks_compute_what_pytorch_does(opened, models, name):
    shown = opened("Wrong")
    assert [each.is_displayed() for each in shown.all("#problem, main")] == [True, False]
    opened(quote(name, safe=""))
    expected = assert_same_logits(shown, models[name])
    assert shown.text("#answer") == f"{name} {expected[0].argmax()}"
    percentages = map(float, re.findall(r"([\d.]+)%", shown.text("#classes")))
    chances = 100 * utils.probabilities(expected)[0]
    assert list(percentages) == pytest.approx(chances.tolist(), abs=0.06)


def test_every_epoch_shows_what_its_weights_do(opened, models):
    """Its results on the test images, in a sentence, in the table and as red corners."""
    shown = opened("Epochs")
    images, labels = noise(10)
    tops = set()  # of what is below the network: it does not jump
    for epoch in (3, 2, 1, 0):
        shown.all("#images input")[epoch].click()
        tops.add(shown.find("#training").rect["y"])
        answers = utils.predict(models[f"Epoch {epoch}"], images, 0.2, 0.3).argmax(dim=1)
        correct = answers == labels
        assert f"{100 * correct.float().mean():.1f}% of 120 test images" in shown.text("#when")
        assert shown.text("#when").startswith(f"Epoch {epoch}" if epoch else "Before training")
        assert shown.find("#epoch").get_attribute("aria-valuetext") == shown.text("#when")
        predicted = assert_same_logits(shown, models[f"Epoch {epoch}"]).argmax(dim=1).tolist()
        titles = shown.run(TITLES)[:50]
        marked = ["classified as" in title for title in titles]
        assert marked == [answer != n // 10 for n, answer in enumerate(predicted)]
        cells = shown.all(f"#strip label:nth-of-type(4n + {epoch + 1})")
        shares = [100 * correct[labels == label].float().mean() for label in range(10)]
        texts = shown.run("return arguments[0].map(cell => cell.textContent)", cells)
        assert texts == [f"{share:.0f}" for share in shares]
        cells[2].click()
        counts = answers[labels == 2].bincount(minlength=10)
        counts[2] = 0
        assert str(counts.max().item()) in shown.text("#confused")
        shown.find("#epoch").send_keys(Keys.ARROW_LEFT)
    assert len(tops) == 1


def test_drawing_is_recognized_centered_if_wanted_and_spoken_at_the_end(opened):
    shown = opened("MNIST/epoch-150/drawing")
    shown.run("""window.spoken = []; const region = element("spoken");
        new MutationObserver(() => spoken.push([Boolean(state.stroke), region.textContent]))
          .observe(region, {childList: true});""")
    canvas, actions = shown.find("#drawing"), shown.act()
    for n, (x, y) in enumerate([(-72, -90), (0, -90), (-43, 24)]):
        actions.move_to_element_with_offset(canvas, x, y)
        actions.pause(0.8) if n else actions.click_and_hold()
    actions.release().perform()
    assert shown.text("#answer") == "7"
    assert shown.run("return argmax(valuesOf(lastLayer()).with(7, -99)) === rivalOf(7)")
    shown.wait(lambda: shown.run("return spoken.length"))
    assert [[stroke, text[:2]] for stroke, text in shown.run("return spoken")] == [[False, "7,"]]
    row = """const values = [...state.image], total = sum(values);
        return sum(values.map((value, i) => value * Math.floor(i / 28))) / total;"""
    assert 13.5 <= shown.run(row) < 14.5
    assert shown.find("#crop").size["height"] == pytest.approx(133, abs=4)
    shown.find("#centered").click()
    assert shown.run(row) < 9


def test_lost_pointer_ends_the_stroke(opened):
    assert opened("MNIST/epoch-150/drawing").run("""
        const canvas = element("drawing"), {left, top, width} = canvas.getBoundingClientRect();
        for (const [type, x, y, buttons] of [["down", 0.2, 0.2, 1], ["move", 0.2, 0.4, 1],
            ["move", 0.5, 0.5, 0], ["down", 0.8, 0.6, 1], ["move", 0.8, 0.8, 1]])
          canvas.dispatchEvent(new PointerEvent(`pointer${type}`, {pointerId: 1, isPrimary: true,
            buttons, clientX: left + x * width, clientY: top + y * width}));
        return [[56, 100], [140, 140], [224, 200]].map(at => pad.getImageData(...at, 1, 1).data[0]);
        """) == [255, 0, 255]


def test_everything_can_be_done_with_the_keyboard(opened):
    shown = opened("MNIST/epoch-150/image-12")
    shown.find("#clear").send_keys(Keys.ENTER)
    shown.find("[aria-label^='C1,']").send_keys(*2 * [Keys.ARROW_RIGHT], Keys.ENTER)
    assert shown.text("#title").startswith("C1, map 1, row 1, column 2: ")
    shown.act(Keys.ESCAPE).perform()
    assert shown.place() == "MNIST/epoch-150/drawing"
    shown.find("#images input").send_keys(*2 * [Keys.ARROW_RIGHT])
    shown.find("#epoch").send_keys(Keys.ARROW_LEFT)
    assert shown.place() == "MNIST/epoch-128/image-3"


def test_pinned_value_survives_other_images_epochs_and_strokes(opened):
    shown = opened("Epochs/epoch-3/image-1/C3-2-6-6")
    shown.find("#explanation summary").click()
    for change in (
        lambda: shown.all("#images input")[40].click(),
        lambda: shown.all("#strip input")[1].click(),
        lambda: shown.run("draw([{x: 140, y: 140}, {x: 140, y: 180}])"),
    ):
        before = shown.place()
        change()
        assert shown.place() != before
        assert shown.place().endswith("/C3-2-6-6")
        value = shown.run("return show(state.steps[3].at(-1)[155], state.net.layers[3].decimals)")
        assert shown.text("#title") == f"C3, map 2, row 6, column 6: {value}"
        assert shown.text("#explanation details[open] .equation")


def test_remainder_of_a_sum_can_be_opened(opened):
    shown = opened("MNIST/epoch-150/image-1/F6-3")
    code = """return [...document.querySelectorAll(`#explanation ${arguments[0]} .number`)].map(
        each => Number(each.textContent.replace("\N{MINUS SIGN}", "-")));"""
    assert shown.text("#explanation summary").startswith("112 smaller terms together")
    (rest,) = shown.run(code, "summary")
    shown.find("#explanation summary").click()
    parts = shown.run(code, "details .term")
    assert (len(parts), sum(parts)) == (112, pytest.approx(rest))
    assert rest + sum(shown.run(code, "> .term")) == pytest.approx(shown.run(code, "> .row")[0])


def test_why_compares_a_wrong_answer_with_the_true_class(opened):
    shown = opened("FashionMNIST")
    shown.find("#show-errors").click()
    title = shown.find("#images label:not([hidden])").get_attribute("title")
    label, answer = re.match(r"(.*?) \d+, classified as (.*)", title).groups()
    assert shown.text("#why") == f"Why {answer} and not {label}?"
    shown.find("#why").click()
    names = utils.DATASETS["FashionMNIST"].classes
    others = [name for name in names if name != answer]
    assert shown.text("h3").split("\n") == [f"Why {answer} and not", *others, "?"]
    classes = f"Output-{names.index(answer) + 1}-{names.index(label) + 1}"
    assert shown.place().endswith(f"/image-101/{classes}")
    shown.find("#strip input").click()  # the errors are those of the final epoch
    assert shown.place() == f"FashionMNIST/epoch-0/image-1/{classes}"
    assert not shown.find("#show-errors").is_enabled()


def test_window_slides_and_can_be_moved(opened):
    shown = opened("LeNet/epoch-1/image-1/C1-2-6-6")
    button = shown.find("#play-slide")
    button.click()
    titles = set()
    shown.wait(lambda: titles.add(shown.text("#title")) or len(titles) > 3)
    assert "Pause" in button.text
    button.click()
    row, column = shown.place().split("-")[-2:]
    shown.find("#maps [tabindex]").send_keys(Keys.ARROW_DOWN)
    shown.act(Keys.ARROW_DOWN).perform()  # it still has the focus
    assert shown.place() == f"LeNet/epoch-1/image-1/C1-2-{int(row) + 2}-{column}"


def test_pointer_recomputes_nothing_without_need(opened):
    shown = opened("LeNet")
    layer = shown.find("[aria-label^='C3,']")
    shown.move_to(layer, -20, -20)
    first = shown.text("#title")
    shown.run("""window.counts = {forward: 0, explain: 0};
        for (const name in counts) {
          const original = window[name];
          window[name] = (...given) => { counts[name]++; return original(...given); };
        }""")
    shown.move_to(layer, -20, -20)
    shown.move_to(shown.find("h1"), 0, 0)
    assert shown.run("return counts") == {"forward": 0, "explain": 0}
    shown.move_to(layer, 20, 30)
    second = shown.text("#title")
    assert "" != first != second
    assert shown.run("return counts") == {"forward": 0, "explain": 1}
    shown.act().click().perform()
    pinned = shown.text("#title")
    shown.move_to(layer, -20, -20)
    assert shown.text("#title") == pinned


def test_tour_has_six_steps_and_can_be_left(opened):
    shown = opened("Epochs")
    assert shown.browser.offered == "Start the tour"  # on the first visit
    shown.find("#start-tour").click()
    for step in range(1, 7):
        assert f"{step} of 6" in shown.text("#tour")
        assert (re.search("[CSF]\\d-|Output-", shown.place()) is not None) == (1 < step < 6)
        shown.find("#tour-next").click()
    assert not shown.find("#tour").is_displayed()
    shown.find("#start-tour").click()
    shown.find("#tour-close").click()
    assert not shown.find("#tour").is_displayed()


def test_address_restores_the_state_without_nonsense(opened):
    place = "Epochs/epoch-2/image-33/C3-2-6-6"
    shown = opened(place)
    for _ in range(2):
        assert shown.place() == place
        assert shown.text("#title").startswith("C3, map 2, row 6, column 6: ")
        assert shown.find("#epoch").get_attribute("value") == "2"
        assert shown.all("#images input")[32].is_selected()
        shown.run("location.hash = 'MNIST/epoch-8/image-2/Output-4-9'")
        shown.wait(lambda: shown.text("#when").startswith("Epoch 8"))
        assert shown.text("#explanation option:checked") == "8"
        shown.browser.back()
        shown.wait(lambda: shown.text("#when").startswith("Epoch 2"))
    for nonsense in ("7/image-0", "x/image-1.5/C3", "3/image-999/C3-9-99-99", "3/a/b/c-d", "3/%"):
        assert opened(f"Epochs/epoch-{nonsense}").place() == "Epochs/epoch-3/image-1"


PROBLEMS = """
const all = [...document.querySelectorAll("header, main > section, #layers figure, #output, "
  + "button, select, summary, input")].filter(each => each.checkVisibility()), problems = [];
const boxes = all.map(each => { // without what is scrolled out of the panel
  const {left, right, top, bottom} = each.getBoundingClientRect();
  const panel = each.closest("#panel")?.getBoundingClientRect() ?? {top, bottom};
  return [left, right, Math.max(top, panel.top), Math.min(bottom, panel.bottom)];
});
all.forEach((a, i) => {
  const {width, height, right} = a.getBoundingClientRect(), name = a.id || a.title || a.textContent;
  if (a.matches("button, select, summary, [type=radio]") && Math.min(width, height) < 24)
    problems.push([name, "small"]);
  if (right > innerWidth) problems.push([name, "ends outside"]);
  all.slice(0, i).forEach((b, k) => {
    const common = [0, 2].map(side => Math.min(boxes[i][side + 1], boxes[k][side + 1])
      - Math.max(boxes[i][side], boxes[k][side]));
    if (!b.contains(a) && Math.min(...common) > 1) problems.push([name, "overlaps", b.textContent]);
  });
});
for (const each of [document.documentElement, document.getElementById("panel")])
  if (each.scrollWidth > each.clientWidth) problems.push([each.id, "scrolls sideways"]);
return problems;
"""


@pytest.mark.parametrize("place", ["C3-2-6-6", "F6-2"])
def test_nothing_overlaps_is_cut_off_or_too_small_to_tap(opened, place):
    shown = opened(f"MNIST/epoch-150/image-33/{place}")
    shown.find("#explanation summary").click()
    for size in SIZES:
        shown.resize(*size)
        assert shown.run(PROBLEMS) == [], size


def test_axe_finds_no_violation(opened, tmp_path):
    command = ["npm", "install", "--no-save", "--prefix", tmp_path, "axe-core"]
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        pytest.skip("needs npm, and axe-core from its registry")
    shown = opened("MNIST/epoch-8/image-33/C3-2-6-6")
    shown.find("#explanation summary").click()
    shown.run((tmp_path / "node_modules" / "axe-core" / "axe.min.js").read_text("utf-8"))
    code = """axe.run({runOnly: ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"]}).then(
        ({violations}) => arguments[0](violations.map(({id, nodes}) =>
          [id, nodes.length, nodes[0].html])));"""
    for scheme in ("dark", "light"):
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        shown.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        assert shown.browser.execute_async_script(code) == [], scheme
    assert len(set(shown.run(TITLES))) == 150  # no two have the same name
