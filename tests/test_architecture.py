"""The picture of the layers, drawn by images/architecture.py from the network itself."""

import importlib
import itertools
import runpy
import shutil
import sys

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from torch import nn

import utils
from model import trace

LAYERS = ["INPUT\n1@32x32", "C1\n6@28x28", "S2\n6@14x14", "C3\n16@10x10", "S4\n16@5x5"]
LAYERS += ["C5\n120", "F6\n84", "OUTPUT\n10"]
ACTIONS = ["5x5\nconvolution\n+ sigmoid", "2x2\naverage pooling"] * 2
ACTIONS += ["5x5\nconvolution\n+ sigmoid", "full\nconnection\n+ sigmoid", "full\nconnection"]
SIDES, COUNTS = [32, 28, 14, 10, 5], [1, 6, 6, 16, 16]


@pytest.fixture
def drawn(tmp_path, figures, monkeypatch):
    """The figure and the picture that the script makes in a copy of the checkout."""
    (tmp_path / "images").mkdir()
    monkeypatch.setattr(sys, "path", [*sys.path])  # which the script adds to
    monkeypatch.setattr(sys, "argv", ["architecture.py"])
    script = shutil.copy(ROOT / "images" / "architecture.py", tmp_path / "images")
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(script), run_name="__main__")
    assert not end.value.code
    return figures["architecture.png"], tmp_path / "images" / "architecture.png"


@pytest.fixture
def architecture(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "images")
    return importlib.import_module("architecture")


def texts_of(figure):
    """Return what stands above and below the layers, each from left to right."""
    texts = sorted((*text.get_position(), text.get_text()) for text in figure.axes[0].texts)
    above, below = [(x, t) for x, y, t in texts if y > 0], [(x, t) for x, y, t in texts if y < -2]
    return above, below


def box(patch):
    return patch.get_path().get_extents()


def test_every_layer_and_every_step_is_named_in_its_order(drawn):
    above, below = texts_of(drawn[0])
    assert [text for _, text in above] == LAYERS
    assert [text for _, text in below] == ACTIONS
    for (x, _), (left, _), (right, _) in zip(below, above, above[1:]):
        assert left < x < right + 1.5


def test_stacks_have_the_sizes_of_the_maps_and_windows_lie_within_them(drawn):
    ax = drawn[0].axes[0]
    squares = [box(patch) for patch in ax.patches if np.isclose(*box(patch).size)]
    scale = squares[0].width / 32
    sides = [round(square.width / scale) for square in squares]
    planes = [side for side, count in zip(SIDES, COUNTS) for _ in range(count)]
    assert sides[: len(planes)] == planes
    # A window in each stack of maps, and the pixel of the next one that sees it.
    assert sides[len(planes) :] == [5, 1, 2, 1, 5, 1, 2, 1, 5]
    fronts = [squares[sum(COUNTS[: i + 1]) - 1] for i in range(5)]
    for plane, (window, *_) in zip(fronts, (squares[sum(COUNTS) + 2 * i :] for i in range(5))):
        assert plane.x0 <= window.x0 < window.x1 <= plane.x1
        assert plane.y0 <= window.y0 < window.y1 <= plane.y1
    for left, right in itertools.pairwise(fronts):
        assert left.x1 < right.x0
    colours = [patch.get_facecolor() for patch in ax.patches[: sum(COUNTS)]]
    assert len({colours[0], colours[1], colours[7]}) == 3 == len({*colours})  # a kind, a colour
    assert {colours[1], colours[7]} == {colours[13], colours[29]}


def test_tracked_picture_is_the_one_that_the_script_draws(drawn):
    """Averages over 4 by 4 pixels, as processors may differ in the edges of letters."""
    shown = [Image.open(path) for path in (drawn[1], ROOT / "images" / "architecture.png")]
    if shown[0].info["Software"] != shown[1].info["Software"]:
        pytest.skip("another version of matplotlib drew the tracked picture")
    assert shown[0].size == shown[1].size
    one, other = (np.array(picture.convert("RGB").reduce(4), dtype=float) for picture in shown)
    assert np.abs(one - other).max() < 24


def test_another_network_is_drawn_with_its_own_layers(architecture, figures, tmp_path):
    """Windows and maps that are no squares, and layers that have no maps of their own."""
    network = nn.Sequential(
        *(nn.Conv2d(1, 3, (3, 7)), nn.BatchNorm2d(3), nn.ReLU(), nn.Dropout2d(0.2)),
        *(nn.MaxPool2d(2, (2, 1)), nn.Flatten(), nn.Linear(3 * 15 * 25, 12)),
        *(nn.Dropout(), nn.Tanh(), nn.Linear(12, 26)),
    )
    architecture.draw(trace(network).layers, tmp_path / "other.png")
    above, below = texts_of(figures["other.png"])
    names = ["INPUT\n1@32x32", "C1\n3@30x26", "S2\n3@15x25", "F3\n12", "OUTPUT\n26"]
    assert [text for _, text in above] == names
    after = "batch_norm momentum 0.1, eps 1e-05", "relu", "dropout2d p 0.2"
    assert [text for _, text in below] == [
        "\n+ ".join(["3x7\nconvolution", *after]),
        "2x2\nmax-pooling",
        "full\nconnection\n+ dropout p 0.5\n+ tanh",
        "full\nconnection",
    ]
    sizes = [
        np.round(box(patch).size / 0.1).astype(int)
        for patch in figures["other.png"].axes[0].patches
    ]
    maps = [[32, 32], *[[26, 30]] * 3, *[[25, 15]] * 3]
    assert [list(size) for size in sizes[:7]] == maps  # across, and up
    assert [7, 3] in [list(size) for size in sizes[9:]]  # the window of C1


def test_network_that_is_no_chain_is_refused_and_no_picture_touched(architecture, monkeypatch):
    class Branches(nn.Sequential):
        def forward(self, x):
            x = super().forward(x)
            return x + x.tanh()

    before = (ROOT / "images" / "architecture.png").read_bytes()
    network = Branches(nn.Flatten(), nn.Linear(1024, 10))
    monkeypatch.setattr(architecture, "LeNet", lambda: network)
    with pytest.raises(utils.Error, match="layers of this network cannot be drawn: add joins two"):
        architecture.main([])
    assert (ROOT / "images" / "architecture.png").read_bytes() == before
