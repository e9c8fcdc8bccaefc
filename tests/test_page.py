"""The page images/lenet5.html in a real browser: the same function, drawing, no network."""

import math
import os
import re
import shutil

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, judge
from torch import nn

import utils

webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.actions.action_builder import ActionBuilder
from selenium.webdriver.common.actions.pointer_input import PointerInput
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

PAGE = ROOT / "images" / "lenet5.html"
MINUS = "\N{MINUS SIGN}"


def arc(x, y, width, height, start, end):
    """Points on an ellipse around (x, y), from `start` to `end` degrees, clockwise from 3 h."""
    angles = [math.radians(start + (end - start) * i / 12) for i in range(13)]
    return [(x + width * math.cos(a), y + height * math.sin(a)) for a in angles]


STROKES = {  # in a square from -1 to 1; each digit a list of strokes, each a list of points
    0: [arc(0, 0, 0.5, 0.8, -90, 270)],
    1: [[(0.05, -0.8), (0, 0.8)]],
    2: [[*arc(0, -0.4, 0.5, 0.4, -180, 40), (-0.5, 0.8), (0.55, 0.8)]],
    3: [[*arc(0, -0.4, 0.45, 0.38, -160, 90), *arc(0, 0.38, 0.5, 0.42, -90, 160)]],
    4: [[(-0.3, -0.8), (-0.5, 0.1), (0.5, 0.1)], [(0.3, -0.6), (0.2, 0.8)]],
    5: [[(0.5, -0.8), (-0.35, -0.8), (-0.4, -0.1), *arc(-0.05, 0.3, 0.5, 0.45, -110, 150)]],
    6: [[(0.3, -0.85), (-0.2, -0.3), *arc(0, 0.4, 0.42, 0.4, -160, 200)]],
    7: [[(-0.5, -0.8), (0.5, -0.8), (-0.1, 0.8)]],
    8: [[*arc(0, -0.4, 0.36, 0.38, 90, -270), *arc(0, 0.38, 0.42, 0.4, -90, 270)]],
    9: [[*arc(0, -0.35, 0.4, 0.42, 0, -360), (0.4, -0.35), (0.3, 0.85)]],
}


@pytest.fixture(scope="module")
def browser():
    """Chromium, or the browser that LENET_BROWSER names: chromium, firefox or webkit."""
    name = os.environ.get("LENET_BROWSER", "chromium")
    programs = {
        "chromium": ("chromium", "chromedriver"),
        "firefox": ("firefox-esr", "geckodriver"),
        "webkit": ("WebKitWebDriver",) * 2,  # of webkit2gtk; it needs a display, such as Xvfb's
    }
    paths = [shutil.which(program) for program in programs[name]]
    if not all(paths):
        pytest.skip(f"needs {' and '.join(programs[name])}")
    if name == "webkit":
        service = webdriver.WebKitGTKService(paths[1])
        driver = webdriver.WebKitGTK(webdriver.WebKitGTKOptions(), service)
    elif name == "firefox":
        options = webdriver.FirefoxOptions()
        options.binary_location = paths[0]
        options.add_argument("--headless")
        driver = webdriver.Firefox(options, webdriver.FirefoxService(paths[1]))
    else:
        options = webdriver.ChromeOptions()
        options.binary_location = paths[0]
        options.add_argument("--headless")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        for argument in ("no-sandbox", "disable-gpu", "no-first-run", "disable-quic"):
            options.add_argument(f"--{argument}")
        for argument in ("background-networking", "component-update", "sync"):
            options.add_argument(f"--disable-{argument}")
        driver = webdriver.Chrome(options, webdriver.ChromeService(paths[1]))
    driver.set_window_size(1366, 768)
    yield driver
    driver.quit()


@pytest.fixture
def page(browser):
    """The browser with the page and an empty pad; afterwards there was no error, no request."""
    if browser.current_url == PAGE.as_uri():  # opening it takes a second
        browser.execute_script("keep(null); choose(Object.keys(networks)[0])")
    else:
        open_page(browser, PAGE)
    browser.execute_script("load(null)")
    yield browser
    assert browser.execute_script("return window.problems") == []
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0


def open_page(browser, path):
    browser.get(path.as_uri())
    browser.execute_script("window.problems = []; onerror = message => { problems.push(message); }")


class Lenet1998(nn.Module):
    """Scaled tanh, and subsampling with a weight and a bias for each map."""

    def __init__(self):
        super().__init__()
        self.c1, self.c3 = nn.Conv2d(1, 6, 5), nn.Conv2d(6, 16, 5)
        self.c5, self.f6, self.output = nn.Conv2d(16, 120, 5), nn.Linear(120, 84), nn.Linear(84, 10)
        self.w2, self.b2 = (nn.Parameter(torch.rand(6, 1, 1)) for _ in range(2))
        self.w4, self.b4 = (nn.Parameter(torch.rand(1, 16, 1, 1)) for _ in range(2))

    def forward(self, x):
        def squash(x):
            return 1.7159 * torch.tanh(x * 2 / 3)

        x = squash(4 * F.avg_pool2d(squash(self.c1(x)), 2) * self.w2 + self.b2)
        x = squash(4 * F.avg_pool2d(squash(self.c3(x)), 2) * self.w4 + self.b4)
        return self.output(squash(self.f6(squash(self.c5(x)).flatten(1))))


NETWORKS = {  # a few layers each, so that together they have all that the page can show
    "LeNet": judge.LeNet,
    "ReLU, max-pooling, 26 classes": lambda: nn.Sequential(
        *(nn.Conv2d(1, 6, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 26)),
    ),
    "1998": Lenet1998,
    "batch norm, dropout, log_softmax": lambda: nn.Sequential(
        *(nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8), nn.LeakyReLU(0.2), nn.Dropout2d()),
        *(nn.AvgPool2d(3, 2, 1), nn.Flatten(), nn.BatchNorm1d(1800, affine=False)),
        *(nn.Dropout(), nn.Linear(1800, 10), nn.LogSoftmax(dim=1)),
    ),
    "strides, padding, groups, 1x1, softmax": lambda: nn.Sequential(
        *(nn.Conv2d(1, 8, (3, 5), (2, 1), (1, 0), (1, 2)), nn.MaxPool2d(3, 2, 1, ceil_mode=True)),
        *(nn.Tanh(), nn.Conv2d(8, 12, 4, padding="same", groups=4), nn.Sigmoid()),
        *(nn.AvgPool2d(3, 2, 1, True, False), nn.Conv2d(12, 10, (5, 7))),
        *(nn.Conv2d(10, 10, 1), nn.Flatten(), nn.Softmax(dim=1)),
    ),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Write the page of a network with random weights; return its path, the images and logits."""

    def written(model, **more):
        num_classes = judge.trace(model).layers[-1].output.numel()
        checkpoint = {
            **{"name": "Glyphs", "dataset": "Glyphs"},
            "classes": [chr(ord("A") + i) for i in range(num_classes)],
            **{"mean": 0.2, "std": 0.3, "epoch": 1, "options": {}},
            "history": [{"epoch": 1, "train_accuracy": 0.1}],
            **more,
        }
        images = torch.randint(256, (4 * num_classes, 28, 28), dtype=torch.uint8)
        labels = torch.arange(len(images)) % num_classes
        path = tmp_path_factory.mktemp("page") / "lenet5.html"
        judge.write_page(checkpoint, model, "random weights", images, labels, path)
        return path, images, utils.predict(model, images, 0.2, 0.3).flatten(1)

    torch.manual_seed(0)
    return written


def choose(page, dataset):
    for button in page.find_elements(By.CSS_SELECTOR, "#sets button"):
        if button.text == dataset:
            button.click()


def wait_for(page, script):
    WebDriverWait(page, 10).until(lambda page: page.execute_script(script))


def text(page, name):
    return page.find_element(By.ID, name).text


def draw(page, strokes, size, x, y):
    actions, canvas = ActionChains(page, duration=5), page.find_element(By.ID, "drawing")
    for stroke in strokes:
        points = [(round(x + size * px), round(y + size * py)) for px, py in stroke]
        actions.move_to_element_with_offset(canvas, *points[0]).click_and_hold()
        for point in points[1:]:
            actions.move_to_element_with_offset(canvas, *point)
        actions.release()
    actions.perform()


def point_at(page, name, map=0, y=0, x=0):
    """Move the mouse to a value of a layer."""
    script = (
        "const {maps, after} = state.net.layers.find(each => each.name === arguments[0]);"
        "return [maps.children[arguments[1]], after.height, after.width]"
    )
    cell, height, width = page.execute_script(script, name, map)
    size = cell.size
    right = (x + 0.5) * size["width"] / width - size["width"] / 2
    down = (y + 0.5) * size["height"] / height - size["height"] / 2
    actions = ActionChains(page, duration=5)
    actions.move_to_element_with_offset(cell, int(right), int(down)).perform()


def keep(page, layer, i):
    """Keep value `i` of the layer with this number in sight."""
    page.execute_script(
        "state.kept = false; keep({layer: state.net.layers[arguments[0]], i: arguments[1]})",
        *(layer, i),
    )


def logits_of(page, images, what="logits"):
    """What the script of the page computes for images (uint8, N x 28 x 28); or the shares."""
    return torch.tensor(
        page.execute_script(
            "return arguments[0].map(image => {"
            "const logits = forward(state.net, image).at(-1).at(-1);"
            "return Array.from(arguments[1] === 'logits' ? logits : shares(state.net, logits))})",
            *(images.flatten(1).tolist(), what),
        )
    )


@pytest.mark.parametrize("dataset", ["FashionMNIST", "MNIST"])
def test_logits_agree_with_the_network(page, dataset):
    """All test images in the page, by the shipped weights."""
    checkpoint = utils.load_checkpoint(ROOT / "checkpoints" / f"lenet5-{dataset.lower()}.pt")
    model = judge.LeNet()
    model.load_state_dict(checkpoint["model"])
    choose(page, dataset)
    images = page.execute_script("return state.net.samples.map(s => Array.from(s.image))")
    images = torch.tensor(images, dtype=torch.uint8).view(100, 28, 28)
    expected = utils.predict(model, images, checkpoint["mean"], checkpoint["std"])
    torch.testing.assert_close(logits_of(page, images), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", NETWORKS)
def test_other_networks(browser, written, name):
    path, images, expected = written(NETWORKS[name]())
    open_page(browser, path)
    torch.testing.assert_close(logits_of(browser, images[:20]), expected[:20], rtol=0, atol=1e-4)
    probabilities = expected if name.endswith(" softmax") else expected.softmax(dim=1)
    shown = logits_of(browser, images[:20], "shares")
    torch.testing.assert_close(shown, probabilities[:20], rtol=0, atol=1e-4)
    browser.find_elements(By.CSS_SELECTOR, "#samples button")[0].click()
    answers = [chr(ord("A") + i) for i in expected.argmax(dim=1).tolist()]
    assert text(browser, "answer") in answers
    assert len(browser.find_elements(By.CSS_SELECTOR, "#bars div")) == expected.shape[1]
    assert browser.execute_script("return problems") == []


def test_network_that_the_page_does_not_compute_is_not_shown(browser, written):
    path, *_ = written(judge.LeNet(), mean=0.1)  # the page is told another mean than PyTorch
    path.write_text(path.read_text().replace('"mean": 0.1', '"mean": 0.2', 1))
    open_page(browser, path)
    assert "other logits than PyTorch" in text(browser, "problem")
    assert not browser.find_element(By.TAG_NAME, "main").is_displayed()
    choose(browser, "MNIST")
    assert browser.find_element(By.TAG_NAME, "main").is_displayed()
    assert text(browser, "problem") == ""


def test_network_that_is_no_chain_gets_no_page(written):
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other, self.output = (nn.Linear(n, 10) for n in (1024, 1024, 10))

        def forward(self, x):
            x = x.flatten(1)
            return self.output(self.one(x) + self.other(x))

    with pytest.raises(utils.Error, match=r"cannot show this network: .* after "):
        written(Branches())


def test_drawn_digits_are_recognised(page):
    choose(page, "MNIST")
    for digit, strokes in STROKES.items():
        for size, x, y in ((110, 140, 140), (60, 90, 180)):
            lines = [[{"x": x + size * px, "y": y + size * py} for px, py in s] for s in strokes]
            page.execute_script("load(null); arguments[0].forEach(draw)", lines)
            assert text(page, "answer") == str(digit)


def test_drawing_with_the_mouse(page):
    choose(page, "MNIST")
    draw(page, STROKES[7], 100, 0, 0)
    assert text(page, "answer") == "7"


def test_samples_keys_and_pointing(page):
    choose(page, "FashionMNIST")
    page.find_elements(By.CSS_SELECTOR, "#samples button")[10].click()
    assert text(page, "answer") == "Trouser"
    assert text(page, "verdict") == "✓ right"
    ActionChains(page).send_keys("9").perform()
    assert text(page, "answer") == "Ankle boot"
    for layer in ("Input", "C1", "S2", "C3", "S4", "C5", "F6"):
        point_at(page, layer)
        assert text(page, "panel").startswith(f"{layer}, ")
    ActionChains(page).send_keys("c").perform()
    assert text(page, "answer") == ""


@pytest.mark.parametrize(("width", "height"), [(1366, 641), (1024, 768), (390, 844)])
def test_explanation_is_in_sight_on_every_screen(page, width, height):
    """Narrow windows are made by a frame, as windows of browsers have a least width."""
    page.execute_script(
        "document.body.innerHTML = ''; const frame = document.createElement('iframe');"
        "frame.style = `border: 0; width: ${arguments[0]}px; height: ${arguments[1]}px`;"
        "document.body.style = 'padding: 0; display: block'; document.body.append(frame);"
        "frame.srcdoc = arguments[2]",
        *(width, height, PAGE.read_text(encoding="utf-8")),
    )
    page.switch_to.frame(page.find_element(By.TAG_NAME, "iframe"))
    wait_for(page, "return document.readyState === 'complete' && state.net !== null")
    sides = page.execute_script(
        "load(0); const e = document.documentElement;"
        "return [e.scrollWidth, e.scrollHeight, innerWidth, innerHeight]"
    )
    assert sides[0] <= width == sides[2]
    assert sides[1] <= height == sides[3] or width < 500  # on a phone the layers are stacked
    for layer in (0, 1, 3, 7):
        top, bottom, layer_top, left, right = page.execute_script(
            "const layer = state.net.layers[arguments[0]]; layer.maps.scrollIntoView();"
            "keep({layer, i: 0}); const box = element('panel').getBoundingClientRect();"
            "return [box.top, element('title').getBoundingClientRect().bottom,"
            "layer.maps.getBoundingClientRect().top, box.left, box.right]",
            layer,
        )
        assert 0 <= top < bottom <= height
        assert 0 <= left < right <= width
        assert layer_top < top + 1 or width > 500
    page.switch_to.default_content()
    open_page(page, PAGE)


def test_judged_weights_are_put_into_the_page(written):
    path, *_ = written(judge.LeNet(), name="MNIST", dataset="MNIST", classes=utils.DIGITS)
    page = path.read_text(encoding="utf-8")
    networks = judge.json.loads(page.split('id="networks">')[1].split("</script>")[0])
    assert list(networks) == ["MNIST", "FashionMNIST"]
    assert networks["MNIST"]["about"] == "Run on MNIST, epoch 1: random weights"
    assert networks["MNIST"]["labels"] == [digit for digit in range(10) for _ in range(4)]


# --- The pad --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dataset", ["FashionMNIST", "MNIST"])
def test_image_drawn_pixel_by_pixel_is_that_image(page, dataset):
    choose(page, dataset)
    same = page.execute_script(
        "return state.net.samples.filter((sample, n) => n % 3 === 0).map(({image}, n) => {"
        "load(3 * n); read();"
        "return image.every((value, i) => Math.abs(value - state.image[i]) < 2); })"
    )
    assert sum(same) >= 0.95 * len(same)  # the others do not fill the box of their data set


def ink(page, x, y):
    """Whether there is something on the pad, at so many of its pixels from the middle."""
    script = "return pencil.getImageData(...arguments, 1, 1).data[3]"
    scale = 280 / page.find_element(By.ID, "drawing").size["width"]
    return page.execute_script(script, round(140 + x * scale), round(140 + y * scale)) > 0


def test_only_the_main_button_of_the_first_pointer_draws(page):
    pad = page.find_element(By.ID, "drawing")
    ActionChains(page, duration=5).move_to_element(pad).context_click().perform()
    assert page.execute_script("return state.image === null")
    box = pad.rect
    middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    if os.environ.get("LENET_BROWSER") == "webkit":
        pytest.skip("its driver has one pointer alone")
    builder = ActionBuilder(page, mouse=PointerInput("touch", "first"), duration=5)
    second = builder.add_pointer_input("touch", "second")
    first = builder.pointer_inputs[0]
    for number in range(3):  # both fingers go down, 60 pixels apart
        for finger, x in ((first, -60), (second, 60)):
            y = 30 * number - 30
            finger.create_pointer_move(duration=5, x=int(middle[0] + x), y=int(middle[1] + y))
            if number == 0:
                finger.create_pointer_down(button=0)
    for finger in (first, second):
        finger.create_pointer_up(button=0)
    builder.perform()
    assert ink(page, -60, 0)
    assert not ink(page, 60, 0)
    assert not ink(page, 0, 0)


def test_tap_is_a_dot(page):
    ActionChains(page, duration=5).move_to_element(
        page.find_element(By.ID, "drawing")
    ).click().perform()
    assert ink(page, 0, 0)
    assert text(page, "answer") != ""


def test_stroke_may_enter_and_leave(page):
    pad, about = page.find_element(By.ID, "drawing"), page.find_element(By.ID, "about")
    ActionChains(page, duration=5).double_click(about).perform()  # selects text
    actions = ActionChains(page, duration=5).move_to_element(about).click_and_hold()
    actions.move_to_element_with_offset(pad, -40, -100).move_to_element_with_offset(pad, -40, 60)
    actions.move_to_element_with_offset(pad, 300, 60).move_to_element_with_offset(pad, 40, -60)
    actions.release().move_to_element_with_offset(pad, 0, 110).perform()
    assert ink(page, -40, 0)
    assert ink(page, 100, 60)  # it left there, with the button held, and came back
    assert not ink(page, 0, 110)
    selects = [pad.value_of_css_property(f"{maker}user-select") for maker in ("", "-webkit-")]
    assert "none" in selects


# --- What is shown --------------------------------------------------------------------------------


def luminance(colour):
    parts = [part / 255 for part in colour]
    parts = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), parts))


def contrast(one, other):
    """Of two colours, (red, green, blue) or #rrggbb, as WCAG 2 has it."""
    colours = [bytes.fromhex(c.strip()[1:]) if isinstance(c, str) else c for c in (one, other)]
    low, high = sorted(map(luminance, colours))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_contrast(theme):
    sheet = PAGE.read_text(encoding="utf-8").split("</style>")[0]
    themes = re.findall(r":root \{(.*?)\}", sheet, flags=re.DOTALL)
    colours = dict(re.findall(r"--(\w+): (#\w{6})", "".join(themes[: 1 + (theme == "dark")])))
    for ground in ("back", "raised"):
        for name in ("text", "quiet", "right", "wrong"):
            assert contrast(colours[name], colours[ground]) >= 4.5, name
        for mark in ("#4c8dff", "#e5646a", colours["mark"]):  # of contributions, of what is seen
            assert contrast(mark, colours[ground]) >= 3, mark
    assert contrast("#ffffff", colours["bar"]) >= 4.5
    assert contrast(colours["bar"], colours["back"]) >= 3
    for ground in ("#000000", "#ffffff", colours["back"]):
        assert contrast("#808080", ground) >= 3  # the outline of units


def test_numbers_on_colours_can_be_read(page):
    keep(page, 3, 0)
    shown = page.execute_script(
        "return [...document.querySelectorAll('[open] .grid span')].map(cell =>"
        "[cell.style.backgroundColor, cell.style.color])"
    )
    assert len(shown) == 3 * 25
    for ground, colour in shown:
        text = (0, 0, 0) if colour == "black" else (255, 255, 255)
        assert contrast(tuple(map(int, re.findall(r"\d+", ground)[:3])), text) >= 4.5


def test_sigmoid_of_large_sums_shows_them(browser, written):
    model = judge.LeNet()
    with torch.no_grad():
        model.c1.weight.mul_(1000)
    path, *_ = written(model)
    open_page(browser, path)
    keep(browser, 1, 40)
    assert "Infinity" not in text(browser, "panel")
    assert "NaN" not in text(browser, "panel")
    assert abs(number(browser.find_element(By.CSS_SELECTOR, ".total .number").text)) > 100


def test_units_of_the_output_are_classes_and_weights_have_a_scale(page):
    page.execute_script("load(0)")
    keep(page, 7, 5)
    assert text(page, "panel").startswith("Output, Sandal: ")
    sizes = page.execute_script(
        "const all = [element('detail').querySelector('.maps'), state.net.layers[6].maps];"
        "return all.map(maps => maps.getBoundingClientRect()).map(box => box.width / box.height)"
    )
    assert abs(sizes[0] - sizes[1]) < 0.05
    low, high = page.execute_script(
        "const [low, , high] = document.querySelector('#detail .scale').childNodes;"
        "return [low.data, high.data]"
    )
    assert number(low) == -number(high) < 0


def test_all_can_be_done_by_keyboard(page):
    open_page(page, PAGE)  # so that the tabulator key starts at the top
    names, keys = [], ActionChains(page, duration=5)
    for _ in range(16):
        keys.send_keys(Keys.TAB).perform()
        focus = page.switch_to.active_element
        names.append(focus.get_attribute("id") or focus.text or focus.get_attribute("title"))
        assert focus.value_of_css_property("outline-style") == "solid"
        if names[-1] == "bars":
            break
    layers = "c1", "s2", "c3", "s4", "c5", "f6"
    sample = page.execute_script("return state.net.classes[state.net.samples[0].label]")
    wanted = [
        "FashionMNIST",
        "MNIST",
        "drawing",
        "clear",
        sample,
        *(f"layer-{name}" for name in layers),
    ]
    assert [name for name in names if name in wanted] == wanted
    assert names[-1] == "bars"
    page.find_element(By.ID, "drawing").send_keys(Keys.SHIFT, *(Keys.ARROW_DOWN * 5))
    assert ink(page, 0, 40)
    assert text(page, "answer") != ""
    page.find_element(By.CSS_SELECTOR, "#samples button").send_keys(Keys.ARROW_DOWN)
    page.switch_to.active_element.send_keys(Keys.ENTER)
    assert page.execute_script("return state.sample") == 10
    page.find_element(By.ID, "layer-c1").send_keys(
        *(Keys.ARROW_RIGHT * 2), Keys.ARROW_DOWN, Keys.ENTER
    )
    ActionChains(page, duration=5).move_to_element(page.find_element(By.ID, "layer-f6")).perform()
    assert text(page, "panel").startswith("C1, map 1, row 2, column 2: ")  # it is kept
    page.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert text(page, "panel").startswith("Point at")
    for name in ("answer", "verdict", "title"):
        assert page.find_element(By.ID, name).get_attribute("aria-live") == "polite"


# --- One step in numbers, what a unit answers to, watch it learn ----------------------------------


def number(text):
    return float(text.replace(MINUS, "-").removesuffix(" %"))


two_networks = pytest.mark.parametrize("name", ["LeNet", "ReLU, max-pooling, 26 classes"])


def open_network(browser, written, name):
    """Open the page of a network that is not the same everywhere; return it and its inputs."""
    model = NETWORKS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.ndim > 1 else 1)
    path, *_ = written(model)
    open_page(browser, path)
    images = browser.execute_script("return state.net.samples.map(s => Array.from(s.image))")
    images = torch.tensor(images, dtype=torch.uint8).view(-1, 28, 28)
    return model, utils.normalise(F.pad(images, [2] * 4), 0.2, 0.3)


@two_networks
def test_one_step_in_numbers(browser, written, name):
    """What is shown adds up to the digits shown, and is what PyTorch has."""
    model, images = open_network(browser, written, name)
    x = images[3:4]
    browser.execute_script("load(3)")
    for index, layer in enumerate(judge.trace(model, x).layers):
        first = layer.operations[0].call(x.reshape(1, *layer.input))[0].flatten()
        x = layer.output[None]
        place = 7 * len(first) // 13
        keep(browser, index, place)
        title, terms, cells, totals, windows = browser.execute_script(
            "const all = (query, from = element('detail')) => [...from.querySelectorAll(query)];"
            "const last = each => each.querySelector('.number:last-child').textContent;"
            "const cells = from => all('.grid span', from).map(each => each.textContent);"
            "return [element('title').firstChild.data, all('.term').map(last), cells(),"
            "all('.total').map(last), all('details').map(each => [last(each), cells(each)])]"
        )
        value = number(title.split(": ")[1])
        assert value == pytest.approx(layer.output.flatten()[place].item(), abs=6e-4)
        if index == 0:
            continue
        cells, (total,) = list(map(number, cells)), map(number, totals)
        count = 4 if layer.kind == "avg_pool2d" else 1
        assert total == pytest.approx(count * first[place].item(), abs=0.006)
        exactly = pytest.approx(total, abs=1e-9)
        assert bool(windows) == (layer.kind == "conv2d")
        for shown, numbers in windows:  # those of the window, the kernel, and their products
            products = map(number, numbers[2 * len(numbers) // 3 :])
            assert sum(products) == pytest.approx(number(shown), abs=1e-9)
        if layer.kind in ("conv2d", "linear"):
            assert sum(map(number, terms)) == exactly
        else:
            assert (sum if layer.kind == "avg_pool2d" else max)(cells) == exactly


def test_softmax_in_numbers(page):
    page.execute_script("load(0)")
    keep(page, 7, 0)
    line = page.find_elements(By.CSS_SELECTOR, "#detail .row")[-1]
    how, share = (each.text for each in line.find_elements(By.TAG_NAME, "span"))
    values = re.fullmatch(rf"softmax: e\^\((\S+) {MINUS} (\S+)\) / (\S+)", how).groups()
    logit, most, total = map(number, values)
    assert 100 * math.exp(logit - most) / total == pytest.approx(number(share), abs=0.2)
    assert page.find_element(By.CSS_SELECTOR, "#bars .marked .number").text == share


@two_networks
def test_what_a_unit_answers_to(browser, written, name):
    model, x = open_network(browser, written, name)
    with torch.no_grad():
        for index, layer in enumerate(judge.trace(model).layers):
            for operation in layer.operations:
                x = operation.call(x)
            if index == 0:
                continue
            values = x.view(len(x), len(layer.output), -1)  # images x maps x pixels
            map, area = 4, values.shape[2]
            strongest = values[:, map].amax(dim=1)
            keep(browser, index, map * area + area // 2)
            button = browser.find_element(By.CSS_SELECTOR, "#answers button")
            assert number(button.get_attribute("title").split(": ")[-1]) == pytest.approx(
                strongest.max().item(), abs=6e-4
            )
            button.click()
            assert strongest[browser.execute_script("return state.sample")] == strongest.max()


def test_test_images_are_marked_where_the_network_is_wrong(page):
    marked, expected = page.execute_script(
        "return [[...element('samples').children].map(button => button.className === 'wrong'),"
        "state.net.samples.map(({image, label}, n) => { load(n);"
        "return element('answer').textContent !== state.net.classes[label]; })]"
    )
    assert marked == expected
    assert 10 <= sum(marked) <= 30
    page.find_elements(By.CSS_SELECTOR, "#samples button")[marked.index(True)].click()
    assert text(page, "verdict").startswith("✗ wrong, it is: ")
    page.find_elements(By.CSS_SELECTOR, "#samples button")[marked.index(False)].click()
    assert text(page, "verdict") == "✓ right"


@two_networks
def test_watch_it_learn(browser, written, name):
    """At each place of the slider the page computes what the weights of that epoch do."""
    models, snapshots = [NETWORKS[name]() for _ in range(4)], []
    for epoch, model in zip((0, 1, 2), models):
        for weight in model.state_dict().values():  # such as half precision and int8 can hold
            weight.random_(-127, 128).view(-1)[0] = 127
            weight /= 512
        weights = {name: weight.half() for name, weight in model.state_dict().items()}
        snapshots.append({"epoch": epoch, "weights": weights})
    history = [{"epoch": i, "val_accuracy": 0.1 * i} for i in (1, 2, 3)]
    how = {"epoch": 3, "history": history, "copies": snapshots}
    path, images, _ = written(models[3], **how)
    open_page(browser, path)
    browser.find_elements(By.CSS_SELECTOR, "#samples button")[2].click()
    slider, shown = browser.find_element(By.ID, "epoch"), []
    assert text(browser, "when") == "epoch 3, kept: validation 30.0 %"
    for model in models[::-1]:
        expected = utils.predict(model, images[:10], 0.2, 0.3)
        tolerance = {"rtol": 0, "atol": 1e-4}
        torch.testing.assert_close(logits_of(browser, images[:10]), expected, **tolerance)
        shown.append(browser.find_element(By.CSS_SELECTOR, "#bars .number").text)
        slider.send_keys(Keys.ARROW_LEFT)
    assert text(browser, "when") == "epoch 0: random weights"
    assert len(set(shown)) > 1  # the drawing stays, and what is said of it follows
    choose(browser, "MNIST")
    choose(browser, "Glyphs")
    assert text(browser, "when") == "epoch 3, kept: validation 30.0 %"
    expected = utils.predict(models[3], images[:10], 0.2, 0.3)
    torch.testing.assert_close(logits_of(browser, images[:10]), expected, rtol=0, atol=1e-4)
    browser.execute_script("element('epoch').value = 1")
    browser.find_element(By.ID, "play").click()
    wait_for(browser, "return element('epoch').value === '3' && !state.playing")
    assert text(browser, "when") == "epoch 3, kept: validation 30.0 %"
    assert browser.execute_script("return problems") == []


def test_page_opens_with_a_test_image(browser):
    open_page(browser, PAGE)
    assert text(browser, "answer") == "T-shirt/top"
    assert text(browser, "verdict") == "✓ right"


def test_page_that_comes_along_shows_how_both_networks_have_learnt(page):
    for dataset in ("MNIST", "FashionMNIST"):
        choose(page, dataset)
        shown = []
        for place in range(10):
            page.execute_script("element('epoch').value = arguments[0]; goToEpoch()", place)
            shown.append(text(page, "when"))
        assert shown[0] == "epoch 0: random weights"
        epochs = [int(re.match(r"epoch (\d+)", each)[1]) for each in shown]
        assert epochs == [0, 1, 2, 4, 8, 16, 32, 64, 128, 150]
        accuracies = [float(re.search(r"training (.+) %", each)[1]) for each in shown[1:]]
        assert accuracies[-1] == max(accuracies) > accuracies[0]


def test_page_without_copies_of_weights_has_no_slider(browser, written):
    path, *_ = written(judge.LeNet())
    open_page(browser, path)
    assert not browser.find_element(By.ID, "epochs").is_displayed()


def test_page_is_one_small_file():
    page = PAGE.read_text(encoding="utf-8")
    assert PAGE.stat().st_size < 2_500_000
    assert not re.search(r"https?://|<link|src=|import ", page)
