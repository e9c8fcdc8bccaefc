"""The network: its layers, its function and its initialization."""

import math
import runpy

import numpy as np
import pytest
import torch
from conftest import ROOT
from torch import nn

from model import LeNet


def test_layers_have_the_names_that_other_lenet_classes_use():
    model = LeNet()
    assert " ".join(dict(model.named_children())) == "c1 s2 c3 s4 c5 flatten f6 f7 sig"
    layers = ("c1", "c3", "c5", "f6", "f7")
    names = [f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")]
    assert list(model.state_dict()) == names
    assert LeNet(num_classes=3)(torch.zeros(2, 1, 32, 32)).shape == (2, 3)


def test_script_prints_modules_and_number_of_parameters(capsys):
    runpy.run_path(str(ROOT / "model.py"), run_name="__main__")
    assert capsys.readouterr().out == f"{LeNet()}\n61,706 parameters\n"


def numpy_forward(state, x):
    """Compute the logits in plain NumPy, from the definition of each layer."""

    def sigmoid(z):
        return 1 / (1 + np.exp(-z))

    def convolution(x, name):
        windows = np.lib.stride_tricks.sliding_window_view(x, (5, 5), axis=(2, 3))
        product = np.einsum("nchwij,ocij->nohw", windows, state[f"{name}.weight"])
        return product + state[f"{name}.bias"][:, None, None]

    def pooling(x):
        return (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4

    x = pooling(sigmoid(convolution(x, "c1")))
    x = pooling(sigmoid(convolution(x, "c3")))
    x = sigmoid(convolution(x, "c5"))[:, :, 0, 0]
    x = sigmoid(x @ state["f6.weight"].T + state["f6.bias"])
    return x @ state["f7.weight"].T + state["f7.bias"]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("count", [1, 7])
def test_logits_agree_with_an_independent_forward_pass(count, memory_format):
    torch.manual_seed(count)
    model = LeNet().double()
    for bias in (p for p in model.parameters() if p.ndim == 1):
        nn.init.normal_(bias)
    x = torch.randn(count, 1, 32, 32, dtype=torch.double, requires_grad=True)
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    expected = numpy_forward(state, x.detach().numpy())
    logits = model.to(memory_format=memory_format)(x)
    np.testing.assert_allclose(logits.detach().numpy(), expected, rtol=0, atol=1e-12)
    logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize(
    ("activation", "gain"),
    [(nn.Sigmoid, 4), (nn.Tanh, 1), (nn.ReLU, math.sqrt(2)), (None, math.sqrt(2))],
)
def test_initialization_is_xavier_uniform_with_the_gain_of_the_activation(activation, gain):
    torch.manual_seed(0)
    model = LeNet()
    if activation is not nn.Sigmoid:  # the sigmoid is what the constructor initializes
        del model.sig
        if activation:
            model.sig = activation()
        nn.init.ones_(model.c1.bias)
        model.reset_parameters()
    fans = {"c1": (25, 150), "c3": (150, 400), "c5": (400, 3000), "f6": (120, 84), "f7": (84, 10)}
    for name, (fan_in, fan_out) in fans.items():
        weight = getattr(model, name).weight
        bound = (1 if name == "f7" else gain) * math.sqrt(6 / (fan_in + fan_out))
        assert 0.95 * bound < weight.abs().max() <= bound, name
        assert not getattr(model, name).bias.any(), name


class Changed(LeNet):  # color images, layers without bias, and one more layer
    def __init__(self, num_classes=10):
        super().__init__(num_classes)
        self.c1 = nn.Conv2d(3, 6, kernel_size=5, bias=False)
        self.f7 = nn.Sequential(nn.BatchNorm1d(84), nn.Linear(84, num_classes, bias=False))
        self.reset_parameters()


def test_network_without_storage_and_changed_networks_can_be_made():
    with torch.device("meta"):
        assert LeNet().c1.weight.is_meta
    model = Changed()
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert 0.95 < model.f7[1].weight.abs().max() / math.sqrt(6 / 94) <= 1  # the last layer: gain 1
    assert 3.8 < model.c1.weight.abs().max() / math.sqrt(6 / (75 + 150)) <= 4
