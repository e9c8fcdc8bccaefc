"""The network: its layers, its function, its initialisation."""

import math

import numpy as np
import pytest
import torch

from model import LeNet, layer_table, main, trace

SPECIFICATION = [
    ("C1", "conv2d", "6 5x5 kernels, stride 1", "1x32x32", "6x28x28", "sigmoid", 156),
    ("S2", "avg_pool2d", "2x2, stride 2", "6x28x28", "6x14x14", "-", 0),
    ("C3", "conv2d", "16 5x5 kernels, stride 1", "6x14x14", "16x10x10", "sigmoid", 2_416),
    ("S4", "avg_pool2d", "2x2, stride 2", "16x10x10", "16x5x5", "-", 0),
    ("C5", "conv2d", "120 5x5 kernels, stride 1", "16x5x5", "120x1x1", "sigmoid", 48_120),
    ("F6", "linear", "120 -> 84", "120", "84", "sigmoid", 10_164),
    ("Output", "linear", "84 -> 10", "84", "10", "softmax, inside the loss", 850),
]


def test_layers_are_those_of_the_specification():
    assert [tuple(row.values()) for row in layer_table(trace(LeNet()))] == SPECIFICATION


def test_script_prints_the_table(capsys):
    main()
    header, *lines, total = capsys.readouterr().out.splitlines()
    assert header.split()[:2] == ["layer", "type"]
    for line, row in zip(lines, SPECIFICATION, strict=True):
        assert line.split() == " ".join([*row[:-1], f"{row[-1]:,}"]).split()
    assert total.split() == ["Total", "61,706"]


def test_parameters_have_the_names_that_other_lenet_classes_use():
    layers = ("c1", "c3", "c5", "f6", "f7")
    expected = [f"{layer}.{part}" for layer in layers for part in ("weight", "bias")]
    assert list(LeNet().state_dict()) == expected
    children = dict(LeNet().named_children())
    assert list(children) == ["c1", "s2", "c3", "s4", "c5", "flatten", "f6", "f7", "sig"]
    assert sum(p.numel() for p in LeNet().parameters()) == 61_706


def test_num_classes_sets_the_number_of_logits():
    assert LeNet(num_classes=3)(torch.zeros(2, 1, 32, 32)).shape == (2, 3)


def numpy_forward(state, x):
    """The forward pass in plain NumPy, from the definition of each layer."""

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


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("batch", [1, 7])
def test_logits_agree_with_an_independent_forward_pass(batch, layout):
    torch.manual_seed(batch)
    model = LeNet().double()
    for bias in (p for p in model.parameters() if p.ndim == 1):
        torch.nn.init.normal_(bias)
    x = torch.randn(batch, 1, 32, 32, dtype=torch.double)
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    expected = numpy_forward(state, x.numpy())
    logits = model.to(memory_format=layout)(x).detach().numpy()
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-12)


def test_gradients_reach_every_parameter():
    torch.manual_seed(0)
    model = LeNet()
    model(torch.randn(4, 1, 32, 32)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().max() > 0, name


def test_initialisation_is_xavier_uniform_with_the_gain_of_the_sigmoid():
    torch.manual_seed(0)
    model = LeNet()
    fans = {"c1": (25, 150), "c3": (150, 400), "c5": (400, 3000), "f6": (120, 84), "f7": (84, 10)}
    for name, (fan_in, fan_out) in fans.items():
        layer = getattr(model, name)
        bound = (1 if name == "f7" else 4) * math.sqrt(6 / (fan_in + fan_out))
        assert 0.95 * bound < layer.weight.abs().max() <= bound, name
        assert not layer.bias.any(), name
