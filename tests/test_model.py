"""The network: its layers, its function, its initialisation."""

import math

import numpy as np
import pytest
import torch

from model import FastLeNet, LeNet, layer_table, main
from utils import plot_architecture

SPECIFICATION = [
    ("C1", "Conv2d", "6 5x5 kernels, stride 1", "1x32x32", "6x28x28", "sigmoid", 156),
    ("S2", "AvgPool2d", "2x2, stride 2", "6x28x28", "6x14x14", "-", 0),
    ("C3", "Conv2d", "16 5x5 kernels, stride 1", "6x14x14", "16x10x10", "sigmoid", 2_416),
    ("S4", "AvgPool2d", "2x2, stride 2", "16x10x10", "16x5x5", "-", 0),
    ("C5", "Conv2d", "120 5x5 kernels, stride 1", "16x5x5", "120x1x1", "sigmoid", 48_120),
    ("F6", "Linear", "120 -> 84", "120", "84", "sigmoid", 10_164),
    ("Output", "Linear", "84 -> 10", "84", "10", "softmax, inside the loss", 850),
]


def test_layers_are_those_of_the_specification():
    assert [tuple(row.values()) for row in layer_table(LeNet())] == SPECIFICATION


def test_parameters_have_the_names_that_other_lenet_classes_use():
    layers = ("c1", "c3", "c5", "f6", "f7")
    expected = [f"{layer}.{part}" for layer in layers for part in ("weight", "bias")]
    assert list(LeNet().state_dict()) == expected
    assert [name for name, _ in LeNet().named_children()] == (
        ["c1", "s2", "c3", "s4", "c5", "flatten", "f6", "f7", "sig"]
    )
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


@pytest.mark.parametrize("batch", [1, 7])
def test_logits_agree_with_an_independent_forward_pass(batch):
    torch.manual_seed(batch)
    model = LeNet().double()
    for bias in (p for p in model.parameters() if p.ndim == 1):
        torch.nn.init.normal_(bias)
    x = torch.randn(batch, 1, 32, 32, dtype=torch.double)
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    expected = numpy_forward(state, x.numpy())
    np.testing.assert_allclose(model(x).detach().numpy(), expected, rtol=0, atol=1e-12)


def logits_and_gradients(model, x, labels):
    """The logits, and the gradients of the mean loss, by the parameter's name."""
    logits = model(x)
    loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    (loss / max(len(x), 1)).backward()
    return {"logits": logits.detach()} | {n: p.grad for n, p in model.named_parameters()}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("batch", [0, 1, 2, 37, 128])
def test_fast_network_is_the_same_function(batch, dtype, tolerance):
    torch.manual_seed(batch)
    model, fast = LeNet().to(dtype), FastLeNet().to(dtype)
    for bias in (p for p in model.parameters() if p.ndim == 1):
        torch.nn.init.normal_(bias)
    fast.load_state_dict(model.state_dict())  # so the names and the shapes are the same
    x, labels = torch.randn(batch, 1, 32, 32, dtype=dtype), torch.randint(10, (batch,))
    expected = logits_and_gradients(model, x, labels)
    for name, value in logits_and_gradients(fast, x, labels).items():
        assert torch.allclose(value, expected[name], rtol=0, atol=tolerance), name


def test_fast_network_starts_from_the_same_weights():
    torch.manual_seed(3)
    model = LeNet(num_classes=4).state_dict()
    torch.manual_seed(3)
    fast = FastLeNet(num_classes=4).state_dict()
    assert list(model) == list(fast)
    assert all(torch.equal(model[name], fast[name]) for name in model)


def test_gradients_reach_every_parameter():
    torch.manual_seed(0)
    model = LeNet()
    model(torch.randn(4, 1, 32, 32)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize(
    ("name", "fan_in", "fan_out", "gain"),
    [
        ("c1", 25, 150, 4),
        ("c3", 150, 400, 4),
        ("c5", 400, 3000, 4),
        ("f6", 120, 84, 4),
        ("f7", 84, 10, 1),
    ],
)
def test_initialisation_is_xavier_uniform_with_the_gain_of_the_sigmoid(name, fan_in, fan_out, gain):
    torch.manual_seed(0)
    layer = getattr(LeNet(), name)
    bound = gain * math.sqrt(6 / (fan_in + fan_out))
    assert 0.95 * bound < layer.weight.abs().max() <= bound
    assert not layer.bias.any()


def test_script_prints_the_table_and_draws_the_architecture(tmp_path, monkeypatch, capsys):
    drawn = []
    monkeypatch.setattr("utils.plot_architecture", lambda rows, path: drawn.append((rows, path)))
    main()
    out = capsys.readouterr().out
    for layer, kind, *_ in SPECIFICATION:
        assert any(line.split()[:2] == [layer, kind] for line in out.splitlines())
    assert "61,706" in out

    plot_architecture(drawn[0][0], tmp_path / "architecture.png")
    assert (tmp_path / "architecture.png").read_bytes().startswith(b"\x89PNG")
