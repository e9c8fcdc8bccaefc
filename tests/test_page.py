"""The page images/lenet5.html in a real browser: the same function, drawing, no network."""

import math
import shutil

import pytest
import torch
from conftest import ROOT, judge

import utils

webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
from selenium.webdriver.common.action_chains import ActionChains  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402

PAGE = ROOT / "images" / "lenet5.html"


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
    paths = shutil.which("chromium"), shutil.which("chromedriver")
    if not all(paths):
        pytest.skip("needs chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = paths[0]
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for argument in ("headless", "no-sandbox", "disable-gpu", "no-first-run", "disable-quic"):
        options.add_argument(f"--{argument}")
    for argument in ("background-networking", "component-update", "sync"):
        options.add_argument(f"--disable-{argument}")
    driver = webdriver.Chrome(options, webdriver.ChromeService(paths[1]))
    yield driver
    driver.quit()


@pytest.fixture
def page(browser):
    """The browser with the page just opened; afterwards there was no error and no request."""
    browser.get(PAGE.as_uri())
    yield browser
    assert not browser.get_log("browser")
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0


def choose(page, dataset):
    for button in page.find_elements(By.CSS_SELECTOR, "#sets button"):
        if button.text == dataset:
            button.click()


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


@pytest.mark.parametrize("dataset", ["FashionMNIST", "MNIST"])
def test_logits_agree_with_the_network(page, dataset):
    """20 test images of each set, by the shipped weights."""
    checkpoint = utils.load_checkpoint(ROOT / "checkpoints" / f"lenet5-{dataset.lower()}.pt")
    model = judge.LeNet()
    model.load_state_dict(checkpoint["model"])
    images, logits = page.execute_script(
        "const net = networks[arguments[0]]; return [net.samples.map(s => Array.from(s.image)),"
        "net.samples.map(s => Array.from(forward(net, normalise(net, s.image)).f7))]",
        dataset,
    )
    images = torch.tensor(images, dtype=torch.uint8).view(20, 28, 28)
    expected = utils.predict(model, images, checkpoint["mean"], checkpoint["std"])
    torch.testing.assert_close(torch.tensor(logits), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("digit", STROKES)
def test_drawn_digits_are_recognised(page, digit):
    choose(page, "MNIST")
    for size, x, y in ((110, 0, 0), (60, -50, 40)):
        page.find_element(By.ID, "clear").click()
        draw(page, STROKES[digit], size, x, y)
        assert text(page, "answer") == str(digit)


def test_drawing_is_fitted_as_own_pictures_are(page, tmp_path):
    choose(page, "MNIST")
    draw(page, [*STROKES[5], [(-1, -1), (-0.99, -1)]], 100, 20, 10)  # and a dot, which is left out
    drawn, seen = page.execute_script(
        "const d = pencil.getImageData(0, 0, 280, 280).data;"
        "return [Array.from({length: 78400}, (_, i) => d[4 * i + 3]), Array.from(state.image)]"
    )
    picture = torch.tensor(drawn, dtype=torch.uint8).view(280, 280)
    judge.Image.fromarray(picture.numpy()).save(tmp_path / "five.png")
    expected = judge.load_picture(tmp_path / "five.png", "MNIST").float()
    assert (torch.tensor(seen).view(28, 28) - expected).abs().mean() < 3
    assert (expected > 60).any(dim=1).sum() == 20  # the digit alone fills the box


def test_samples_keys_and_pointing(page):
    choose(page, "FashionMNIST")
    page.find_elements(By.CSS_SELECTOR, "#samples figure")[2].click()
    assert text(page, "answer") == "Trouser"
    ActionChains(page).send_keys("9").perform()
    assert text(page, "answer") == "Ankle boot"
    for layer in ("input", "c1", "s2", "c3", "s4", "c5", "f6"):
        place = page.find_element(By.ID, layer), -8, -8  # the middle may be between two maps
        ActionChains(page).move_to_element_with_offset(*place).perform()
        assert text(page, "detail").startswith(f"{layer.title()}, ")
    ActionChains(page).send_keys("c").perform()
    assert text(page, "answer") == ""


@pytest.mark.parametrize(("width", "height"), [(1280, 800), (390, 844)])
def test_page_fits_the_screen(page, width, height):
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    wide, high = page.execute_script(
        "const e = document.documentElement; return [e.scrollWidth, e.scrollHeight]"
    )
    page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert wide <= width
    assert high <= height or width < 500  # on a phone the layers are stacked


def test_judged_weights_are_put_into_the_page(glyphs_run, tmp_path):
    checkpoint = utils.load_checkpoint(glyphs_run / "checkpoints" / "Glyphs" / "best.pt")
    images, labels = torch.zeros(40, 28, 28, dtype=torch.uint8), torch.arange(40) % 10
    judge.write_page(checkpoint, "about", images, labels, tmp_path / "page.html")
    written = (tmp_path / "page.html").read_text(encoding="utf-8")
    networks = judge.json.loads(written.split('id="networks">')[1].split("</script>")[0])
    assert next(iter(networks)) == "Glyphs"
    assert {*networks} == {"Glyphs", "FashionMNIST", "MNIST"}
    assert networks["Glyphs"]["labels"] == [digit for digit in range(10) for _ in range(2)]
