"""The layers recorded by images/trace.py, and the table and the picture of architecture.py."""

import runpy
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from PIL import Image
from torch import nn

import utils
from images import architecture, plots
from images.trace import Unsupported, table, trace
from model import LeNet


class Functions(nn.Module):
    # Steps may follow the input, the convolution and the last layer.
    def __init__(self, start=torch.clone, middle=torch.clone, end=torch.clone):
        super().__init__()
        self.start, self.middle, self.end = start, middle, end
        torch.manual_seed(0)  # with some others, all logits are 0
        self.kernels = nn.Parameter(torch.randn(6, 1, 3, 5) / 4)
        self.bias = nn.Parameter(torch.randn(6, 1, 1))
        self.hidden = nn.Parameter(torch.randn(840, 20) / 30)
        self.output = nn.Parameter(torch.randn(20, 10))
        self.register_buffer("mask", torch.rand(6, 1, 3, 5).round())
        self.register_buffer("mean", torch.tensor([0.2]))

    def forward(self, x):
        x = F.conv2d(self.start(x) / 2 - self.mean, self.kernels * self.mask)
        x = F.avg_pool2d(self.middle(x), [3, 2]) + self.bias
        x = 1.7159 * F.relu(x).view(-1, 840).mm(self.hidden).tanh()
        return self.end(x @ self.output)


def modules():
    conv = nn.LazyConv2d(6, 5, stride=(1, 2), padding=[0, 2], bias=False)
    first = nn.Sequential(conv, nn.BatchNorm2d(6), nn.ReLU(inplace=True))
    second = nn.Sequential(nn.MaxPool2d((4, 2), stride=[4, 2]), nn.Dropout2d(0.3))
    last, shared = nn.LazyConv2d(10, (7, 8)), nn.Conv2d(10, 10, 1)
    return nn.Sequential(first, second, last, shared, shared, nn.LogSoftmax(dim=1), nn.Flatten())


TABLES = {
    LeNet: """
C1 | conv2d | 6 5x5 kernels, stride 1 | 1x32x32 | 6x28x28 | sigmoid | 156
S2 | avg_pool2d | 2x2, stride 2 | 6x28x28 | 6x14x14 | - | 0
C3 | conv2d | 16 5x5 kernels, stride 1 | 6x14x14 | 16x10x10 | sigmoid | 2,416
S4 | avg_pool2d | 2x2, stride 2 | 16x10x10 | 16x5x5 | - | 0
C5 | conv2d | 120 5x5 kernels, stride 1 | 16x5x5 | 120x1x1 | sigmoid | 48,120
F6 | linear | 120 -> 84 | 120 | 84 | sigmoid | 10,164
Output | linear | 84 -> 10 | 84 | 10 | softmax, inside the loss | 850""",
    Functions: """
Input | input | - | 1x32x32 | 1x32x32 | div 2, sub 1 values | 0
C1 | conv2d | 6 3x5 kernels, stride 1 | 1x32x32 | 6x30x28 | - | 90
S2 | avg_pool2d | 3x2, stride 3x2 | 6x30x28 | 6x10x14 | add 6 values, relu | 6
F3 | linear | 840 -> 20 | 840 | 20 | tanh, mul 1.716 | 16,800
Output | linear | 20 -> 10 | 20 | 10 | softmax, inside the loss | 200""",
    modules: """
C1 | conv2d | 6 5x5 kernels, stride 1x2, padding 0x2 | 1x32x32 | 6x28x16 | batch_norm, relu | 162
S2 | max_pool2d | 4x2, stride 4x2 | 6x28x16 | 6x7x8 | dropout2d p 0.3 | 0
C3 | conv2d | 10 7x8 kernels, stride 1 | 6x7x8 | 10x1x1 | - | 3,370
C4 | conv2d | 10 1x1 kernels, stride 1 | 10x1x1 | 10x1x1 | - | 110
Output | conv2d | 10 1x1 kernels, stride 1 | 10x1x1 | 10x1x1 | log_softmax | 0""",
}


@pytest.mark.parametrize("make", TABLES, ids=lambda make: make.__name__)
def test_table_is_that_of_the_network(make):
    model, image = make(), torch.randn(1, 1, 32, 32)
    layers = trace(model, image)
    rows = table(layers)
    assert sum(row["parameters"] for row in rows) == sum(p.numel() for p in model.parameters())
    lines = [row | {"parameters": f"{row['parameters']:,}"} for row in rows]
    assert [" | ".join(line.values()) for line in lines] == TABLES[make].strip().splitlines()
    torch.testing.assert_close(layers[-1].output.flatten(), model(image).flatten())


def test_outputs_are_recorded_although_operations_work_in_place():
    image = torch.ones(1, 1, 32, 32)
    model = Functions(lambda x: x.sub_(2), lambda x: x.sigmoid_(), nn.Softmax(dim=1))
    outputs = [layer.output for layer in trace(model, image)]
    assert image.min() == 1  # unchanged
    x = (image - 2) / 2 - model.mean
    conv = F.conv2d(x, model.kernels * model.mask).sigmoid()
    torch.testing.assert_close(outputs, [x[0], conv[0], *outputs[2:-1], model(image)[0]])


def test_what_is_only_looked_at_is_not_a_layer():
    steps = 3 * [lambda x: x if x.sum() < 1e9 and x.shape[0] == x.size(0) == len(x) else None]
    assert table(trace(Functions(*steps))) == table(trace(Functions()))


def hidden(x):
    with torch._C.DisableTorchFunction():
        return x.add_(x.mean())


NO_CHAIN = "the logits do not follow from a chain of operations"
UNSUPPORTED = [  # a step, its place in `Functions`, and the error
    ("middle", lambda x: x.sigmoid() + x.tanh() + x, "add after C1"),
    ("middle", lambda x: torch.cat([x]), "cat after C1"),
    ("middle", lambda x: x * x, "mul after C1"),
    ("middle", nn.Linear(28, 28), "linear after C1"),
    ("middle", nn.BatchNorm2d(6, track_running_stats=False), "batch_norm after C1"),
    ("middle", lambda x: x.reshape(2, 3, 30, 28).view(1, 6, 30, 28), "reshape after C1"),
    ("middle", lambda x: x / x.max(), NO_CHAIN),
    ("start", lambda x: x / x.max(), NO_CHAIN),
    ("end", lambda x: torch.add(x, 1, alpha=2), "add after F4"),
    ("end", lambda x: torch.sub(torch.ones(10), x), "sub after F4"),
    ("end", lambda x: x.softmax(0), "softmax after F4"),
    ("end", lambda x: x @ torch.ones(10), "matmul after F4"),
    ("end", F.dropout, "dropout after F4"),
    ("end", lambda x: (x, x), NO_CHAIN),
    ("end", hidden, NO_CHAIN),
]


@pytest.mark.parametrize(("place", "step", "message"), UNSUPPORTED)
def test_networks_that_are_not_chains_are_reported(place, step, message):
    with pytest.raises(Unsupported, match=rf"^{message}( is not supported)?$"):
        trace(Functions(**{place: step}))


def test_picture_shows_all_layers(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, *args, **_: figures.append(figure))
    architecture.draw(trace(Functions()), tmp_path / "picture.png")
    [ax] = figures[0].axes
    texts = sorted((*text.get_position(), " ".join(text.get_text().split())) for text in ax.texts)
    names = ["INPUT 1x32x32", "C1 6x30x28", "S2 6x10x14", "F3 20", "OUTPUT 10"]
    assert [text for _, y, text in texts if y > 0] == names
    below = "div 2 + sub 1 values + 3x5 convolution|3x2 average pooling + add 6 values + relu"
    below += "|fully connected + tanh + mul 1.716|fully connected"
    assert "|".join(text for _, y, text in texts if y < 0) == below
    maps = [patch.get_bbox() for patch in ax.patches if patch.get_facecolor()[3] > 0]
    windows = [patch.get_bbox() for patch in ax.patches if patch.get_facecolor()[3] == 0]
    sizes = [tuple((box.size / architecture.PIXEL).round()) for box in [*maps[:-2], *windows]]
    assert sizes == [(32, 32), *6 * [(28, 30)], *6 * [(14, 10)], (5, 3), (1, 1), (2, 3), (1, 1)]
    for box, front in zip(windows, (maps[0], maps[6], maps[6], maps[12])):
        assert front.x0 <= box.x0 < box.x1 <= front.x1
        assert front.y0 <= box.y0 < box.y1 <= front.y1


def test_script_prints_the_table_and_draws_the_tracked_picture(tmp_path, monkeypatch, capsys):
    script = ROOT / "images" / "architecture.py"
    monkeypatch.setattr(sys, "argv", [str(script)])
    others = [path for path in sys.path if path not in ("", str(ROOT))]
    monkeypatch.setattr(sys, "path", [str(script.parent), *others])
    monkeypatch.delitem(sys.modules, "model")  # so that the script must find it
    monkeypatch.setattr("utils.ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=r"^0$"):
        runpy.run_path(str(script), run_name="__main__")
    rows = [f"| {row} |" for row in TABLES[LeNet].strip().splitlines()]
    head = "| layer | type | configuration | input | output | activation | parameters |"
    text = "\n".join([head, "|---|---|---|---|---|---|---:|", *rows, "61,706 parameters"])
    assert capsys.readouterr().out.startswith(f"{text}\n")
    drawn, tracked = [Image.open(path / "images/architecture.png") for path in (tmp_path, ROOT)]
    if drawn.info["Software"] != tracked.info["Software"]:
        pytest.skip("another version of matplotlib drew the tracked picture")
    one, other = [np.array(image.convert("RGB").reduce(4), float) for image in (drawn, tracked)]
    assert abs(one - other).max() < 24  # edges of letters may differ


def test_network_that_is_not_a_chain_leaves_the_picture_untouched(tmp_path, monkeypatch, error_of):
    picture = tmp_path / "images" / "architecture.png"
    utils.write_file(picture, b"earlier")
    monkeypatch.setattr("utils.ROOT", tmp_path)
    monkeypatch.setattr(architecture, "LeNet", lambda: Functions(end=F.dropout))
    assert "dropout after F4 is not supported" in error_of(architecture.main)
    assert picture.read_text() == "earlier"
