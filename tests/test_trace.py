"""The trace: what it tells of networks as people write them, and what follows from it."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import expect_same_run, files, judge, load, options, picture_dir, run_dir
from torch import nn

import train
import utils
from model import LeNet, gain, layer_table, main, trace


class Functional(nn.Module):
    """Written with functions, `view` and a tuple as window."""

    def __init__(self, num_classes=10):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 6, 5), nn.Conv2d(6, 16, 5, padding=1)
        self.fc1, self.fc2 = nn.Linear(576, 84), nn.Linear(84, num_classes)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), (2, 2))
        x = F.max_pool2d(F.leaky_relu(self.conv2(x), 0.1), 2)
        x = x.view(-1, 576)
        return self.fc2(F.relu(self.fc1(x)))


class InSequential(nn.Module):
    def __init__(self, num_classes=10):
        super().__init__()
        first = nn.Sequential(nn.Conv2d(1, 6, 5), nn.BatchNorm2d(6), nn.ReLU(inplace=True))
        second = nn.Sequential(nn.AvgPool2d(2, stride=2), nn.Dropout2d(0.3), nn.Flatten())
        self.net = nn.Sequential(first, second, nn.Linear(1176, num_classes))

    def forward(self, x):
        return self.net(x)


class Methods(nn.Module):
    """No modules: parameters, methods of Tensor, and a weight made of another."""

    def __init__(self, num_classes=10):
        super().__init__()
        self.kernels = nn.Parameter(0.1 * torch.randn(6, 26))
        self.scale, self.shift = (
            nn.Parameter(torch.ones(6, 1, 1)),
            nn.Parameter(torch.zeros(6, 1, 1)),
        )
        self.out = nn.Parameter(0.1 * torch.randn(1177, num_classes))

    def forward(self, x):
        x = F.conv2d(x, self.kernels[:, :-1].view(6, 1, 5, 5), bias=self.kernels[:, -1])
        x = F.avg_pool2d(x, 2) * self.scale + self.shift
        x = 1.7159 * (x * 2 / 3).tanh()
        return x.reshape(-1, 1176).mm(self.out[:-1]) + self.out[-1]


class Lazy(nn.Module):
    def __init__(self, num_classes=10):
        super().__init__()
        self.conv, self.fc = nn.LazyConv2d(6, 5), nn.LazyLinear(num_classes)

    def forward(self, x):
        return self.fc(F.max_pool2d(self.conv(x), 2).sigmoid().flatten(1))


class Softmaxed(Functional):
    def forward(self, x):
        return F.softmax(super().forward(x), dim=1)


class TwoBranches(Functional):
    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = self.conv2(x)
        x = F.max_pool2d(torch.sigmoid(x) + x, 2)
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


class Concatenated(Functional):
    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = torch.cat([F.max_pool2d(self.conv2(x), 2)], dim=1)
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


class AlwaysDropout(Functional):
    """F.dropout is at work in eval mode too, unless it is told."""

    def forward(self, x):
        return F.dropout(super().forward(x), 0.5)


class OutOfSight(Functional):
    """Changes values where no operation is seen."""

    def forward(self, x):
        logits = super().forward(x)
        with torch._C.DisableTorchFunction():
            logits[:, 0] += x.abs().mean()
        return logits


class Dropped(Functional):
    """Makes something that it does not use."""

    def forward(self, x):
        x = self.conv1(x)
        x.relu()
        x = F.max_pool2d(F.max_pool2d(self.conv2(F.max_pool2d(x, 2)), 1), 2)
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


class Pools(Functional):
    """Two branches from one output, of which the second begins with an activation."""

    def forward(self, x):
        x = self.conv1(x)
        x = F.max_pool2d(x, 2) + F.avg_pool2d(x.sigmoid(), 2)
        return self.fc2(F.relu(self.fc1(F.max_pool2d(self.conv2(x), 2).flatten(1))))


class Halves(Functional):
    """Makes two images of one, and one of two."""

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), 2).reshape(-1, 3, 14, 14)
        x = F.max_pool2d(self.conv2(torch.cat([x, x], dim=1)), 2)
        return self.fc2(self.fc1(x.flatten(1))).view(-1, 2, 10).mean(dim=1)


class AlongRows(nn.Module):
    """A full connection of the pixels of each row."""

    def __init__(self, num_classes=10):
        super().__init__()
        self.conv, self.row = nn.Conv2d(1, 6, 5), nn.Linear(28, 4)
        self.out = nn.Linear(672, num_classes)

    def forward(self, x):
        return self.out(self.row(self.conv(x)).flatten(1))


class Printing(Functional):
    """Looks at its values, as one does to find a fault."""

    def forward(self, x):
        x = super().forward(x)
        assert x.sum().abs() < 1e9 and x.max() > -1e9
        return x


class OddOnes(nn.Module):
    """Scaled first; windows that are no squares; two outputs of one size; written with @."""

    def __init__(self, num_classes=10):
        super().__init__()
        self.conv = nn.Conv2d(1, 6, (3, 5), stride=(1, 2), padding=(0, 2))
        self.weight = nn.Parameter(torch.randn(6 * 10 * 8, num_classes))
        self.out = nn.Linear(num_classes, num_classes)

    def forward(self, x):
        x = F.avg_pool2d(self.conv(x / 2 - 1).tanh(), (3, 2))
        return self.out((x.flatten(1) @ self.weight).sigmoid())


class Squared(Functional):
    def forward(self, x):
        x = super().forward(x)
        return x * x


class TimesAVector(Functional):
    def forward(self, x):
        return super().forward(x) @ torch.ones(10)


class Weighted(Functional):
    def forward(self, x):
        return torch.add(super().forward(x), 1, alpha=2)


class Reversed(Functional):
    def forward(self, x):
        return torch.sub(torch.ones(10), super().forward(x))


class SoftmaxOverTheBatch(Functional):
    def forward(self, x):
        return super().forward(x).softmax(0)


class BatchStatistics(Functional):
    def __init__(self, num_classes=10):
        super().__init__(num_classes)
        self.conv1 = nn.Sequential(self.conv1, nn.BatchNorm2d(6, track_running_stats=False))


class Tuple(Functional):
    def forward(self, x):
        return super().forward(x), x


class Maps(Functional):
    def forward(self, x):
        return super().forward(x)[:, :, None, None]


class Frozen(LeNet):
    def __init__(self, num_classes=10):
        super().__init__(num_classes)
        self.c1.requires_grad_(False)
        self.unused = nn.Linear(3, 3)


CHAINS = {
    Functional: [
        ("C1", "conv2d", "6 5x5 kernels, stride 1", "relu", 156),
        ("S2", "max_pool2d", "2x2, stride 2", "-", 0),
        (
            "C3",
            "conv2d",
            "16 5x5 kernels, stride 1, padding 1",
            "leaky_relu negative_slope 0.1",
            2416,
        ),
        ("S4", "max_pool2d", "2x2, stride 2", "-", 0),
        ("F5", "linear", "576 -> 84", "relu", 48_468),
        ("Output", "linear", "84 -> 10", "softmax, inside the loss", 850),
    ],
    InSequential: [
        ("C1", "conv2d", "6 5x5 kernels, stride 1", "-", 156),
        ("batch_norm", "batch_norm", "momentum 0.1, eps 1e-05", "relu", 12),
        ("S2", "avg_pool2d", "2x2, stride 2", "-", 0),
        ("dropout2d", "dropout2d", "p 0.3", "-", 0),
        ("Output", "linear", "1176 -> 10", "softmax, inside the loss", 11_770),
    ],
    Methods: [
        ("C1", "conv2d", "6 5x5 kernels, stride 1", "-", 156),
        (
            *("S2", "avg_pool2d", "2x2, stride 2"),
            "mul 6 values, add 6 values, mul 2, div 3, tanh, mul 1.716",
            12,
        ),
        ("Output", "linear", "1176 -> 10", "add 10 values, softmax, inside the loss", 11_770),
    ],
    OddOnes: [
        ("Input", "input", "-", "div 2, sub 1", 0),
        ("C1", "conv2d", "6 3x5 kernels, stride 1x2, padding 0x2", "tanh", 96),
        ("S2", "avg_pool2d", "3x2, stride 3x2", "-", 0),
        ("F3", "linear", "480 -> 10", "sigmoid", 4800),
        ("Output", "linear", "10 -> 10", "softmax, inside the loss", 110),
    ],
    Lazy: [
        ("C1", "conv2d", "6 5x5 kernels, stride 1", "-", 156),
        ("S2", "max_pool2d", "2x2, stride 2", "sigmoid", 0),
        ("Output", "linear", "1176 -> 10", "softmax, inside the loss", 11_770),
    ],
}
PROBLEMS = {
    TwoBranches: "add joins two branches, after C3",
    Concatenated: "cat is not known here, or not in this use, after S4",
    Dropped: "max_pool2d goes back to an earlier output, after C1",
    Pools: "sigmoid goes back to an earlier output, after S2",
    Halves: "reshape makes 2 out of one image, after S2",
    AlongRows: "linear is not known here, or not in this use, after C1",
    Squared: "mul is not known here, or not in this use, after Output",
    TimesAVector: "matmul is not known here, or not in this use, after F6",
    Weighted: "add is not known here, or not in this use, after Output",
    Reversed: "sub is not known here, or not in this use, after Output",
    SoftmaxOverTheBatch: "softmax is not known here, or not in this use, after Output",
    BatchStatistics: "batch_norm is not known here, or not in this use, after C1",
    AlwaysDropout: "what was seen gives other logits than the network, after dropout",
    OutOfSight: "what was seen gives other logits than the network, after Output",
    Tuple: "forward returns something else than the last output, after Output",
}


def named(classes):
    return pytest.mark.parametrize("network", classes, ids=lambda network: network.__name__)


@named(CHAINS)
def test_layers_are_those_of_the_class(network):
    model = network()
    model.train()
    traced = trace(model)
    assert traced.problem is None
    rows = layer_table(traced)
    keys = ("layer", "type", "configuration", "activation", "parameters")
    assert [tuple(row[key] for key in keys) for row in rows] == CHAINS[network]
    assert sum(row["parameters"] for row in rows) == sum(p.numel() for p in model.parameters())
    assert model.training


@named(CHAINS)
def test_outputs_are_those_of_the_image(network):
    model, image = network().eval(), torch.randn(1, 1, 32, 32)
    logits = model(image)
    layers = trace(model, image).layers
    scaled = image / 2 - 1 if network is OddOnes else image
    assert torch.equal(layers[0].output, scaled[0])
    torch.testing.assert_close(layers[-1].output.flatten(), logits[0])
    for before, after in itertools.pairwise(layers):
        assert tuple(after.input) in (tuple(before.output.shape), (before.output.numel(),))


def test_operations_that_work_in_place_do_not_change_what_was_seen_before():
    torch.manual_seed(0)
    layers = trace(InSequential(), torch.randn(1, 1, 32, 32)).layers
    assert layers[1].output.min() < 0 == layers[2].output.min()  # before and after ReLU


def test_sum_that_works_in_place_does_not_change_what_was_seen_before():
    class Residual(LeNet):
        def forward(self, x):
            y = self.c1(x)
            z = self.sig(y)
            z += y
            x = self.s4(self.sig(self.c3(self.s2(z))))
            return self.f7(self.f6(self.c5(x).flatten(1)))

    model, image = Residual(), torch.randn(1, 1, 32, 32)
    traced = trace(model, image)
    assert traced.problem == "add joins two branches, after C1"
    torch.testing.assert_close(traced.layers[1].output, model.c1(image)[0].sigmoid())


def test_what_is_only_looked_at_is_no_layer():
    rows = [layer_table(trace(network())) for network in (Printing, Functional)]
    assert rows[0] == rows[1]
    assert trace(Printing()).problem is None


def test_only_what_gives_the_logits_is_called_the_output():
    class Repeated(Functional):
        def forward(self, x):
            x = super().forward(x)
            return torch.cat([x, -x], dim=1)

    assert [row["layer"] for row in layer_table(trace(Repeated(5)))][-2:] == ["F6", "cat"]


def test_shares_are_the_softmax_of_the_logits_whether_forward_takes_it_or_the_loss():
    class LogSoftmaxed(Functional):
        def forward(self, x):
            return super().forward(x).log_softmax(dim=1)

    images, model = torch.randn(5, 1, 32, 32), Functional()
    shares = model(images).softmax(dim=1)
    for network, softmax in (
        (Functional, None),
        (Softmaxed, "softmax"),
        (LogSoftmaxed, "log_softmax"),
    ):
        other = network()
        other.load_state_dict(model.state_dict())
        traced = trace(other)
        assert traced.softmax == softmax
        torch.testing.assert_close(traced.shares(other(images)), shares)
        activation = softmax or "softmax, inside the loss"
        assert layer_table(traced)[-1]["activation"] == activation


def test_script_says_what_is_no_chain(monkeypatch, capsys):
    monkeypatch.setattr("model.LeNet", TwoBranches)
    main()
    assert capsys.readouterr().out.endswith("not a chain: add joins two branches, after C3\n")


@named(PROBLEMS)
def test_what_is_no_chain_is_said(network):
    traced = trace(network())
    assert traced.problem == PROBLEMS[network]
    assert len(layer_table(traced)) >= 3  # but told all the same


@pytest.mark.parametrize(
    ("activation", "expected"),
    [
        (nn.Sigmoid(), 4),
        (nn.Tanh(), 1),
        (nn.ReLU(), math.sqrt(2)),
        (nn.LeakyReLU(0.5), math.sqrt(2 / 1.25)),
        (nn.Identity(), 1),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_gain_belongs_to_the_activation(activation, expected):
    model = LeNet()
    model.sig = activation
    layers = trace(model).layers
    assert [gain(layers[i:]) for i in (1, 3, 5, 6)] == pytest.approx([expected] * 4)
    assert gain(layers[7:]) == 1  # of the output


def test_gain_looks_beyond_the_pooling_but_not_beyond_the_next_weights():
    assert gain(trace(Lazy()).layers[1:]) == 4
    model = nn.Sequential(nn.Conv2d(1, 2, 5), nn.Conv2d(2, 2, 5), nn.Flatten())
    model.extend([nn.Linear(1152, 9), nn.Linear(9, 9), nn.Sigmoid(), nn.Linear(9, 9)])
    layers = trace(model).layers
    assert [gain(layers[i:]) for i in (1, 2, 3, 4, 5)] == [1, 1, 1, 4, 1]


def test_reset_parameters_follows_the_activation():
    model = LeNet()
    model.sig = nn.ReLU()
    torch.manual_seed(0)
    model.reset_parameters()
    bound = math.sqrt(2) * math.sqrt(6 / (120 + 84))
    assert 0.95 * bound < model.f6.weight.abs().max() <= bound


@pytest.fixture
def use(monkeypatch):
    """Put another class in place of LeNet."""

    def use(network):
        monkeypatch.setattr(train, "LeNet", network)
        monkeypatch.setattr(judge, "LeNet", network)

    return use


ANY = (Functional, InSequential, Methods, Lazy, Softmaxed, TwoBranches, Concatenated, Frozen)


@named(ANY)
def test_any_class_trains_resumes_and_is_judged(network, use, tmp_path, few_glyphs, start, capsys):
    use(network)
    line = ["--dataset=Glyphs", "--epochs=2", "--batch-size=100", f"--data-dir={few_glyphs}"]
    assert start(tmp_path / "straight", *line) == 0
    assert ("forward ends in softmax" in capsys.readouterr().err) == (network is Softmaxed)
    assert start(tmp_path / "stopped", *line, stop_at=8) == 130
    assert start(tmp_path / "stopped", *line, "--resume") == 0
    expect_same_run(tmp_path / "straight", tmp_path / "stopped")
    capsys.readouterr()
    assert judge.main(options(tmp_path / "straight", few_glyphs)) == 0
    out = capsys.readouterr().out
    problem = PROBLEMS.get(network)
    assert (f"none, as it could not show this network: {problem}" in out) == (problem is not None)
    folder = picture_dir(tmp_path / "straight")
    assert (folder / "lenet5.html").exists() == (problem is None)
    assert (folder / "features.png").exists()


def test_frozen_parameters_stay_and_optimizers_leave_them_alone(use, tmp_path, few_glyphs, start):
    use(Frozen)
    assert start(tmp_path, "--dataset=Glyphs", "--epochs=1", f"--data-dir={few_glyphs}") == 0
    torch.manual_seed(0)
    before, after = Frozen().c1.weight, load(tmp_path, "last.pt")["model"]["c1.weight"]
    assert torch.equal(before, after)
    model = Frozen()
    model.requires_grad_(False)
    with pytest.raises(utils.Error, match=r"all parameters in model\.py are frozen"):
        train.make_optimizers(model, 0.1, 0.1)


def test_network_knows_whether_it_trains_or_is_judged(use, tmp_path, few_glyphs, start):
    """Dropout and batch normalisation ask for it, in every epoch."""
    seen = []

    class Noting(LeNet):
        def forward(self, x):
            seen.append((torch.is_grad_enabled(), self.training))
            return super().forward(x)

    use(Noting)
    assert start(tmp_path, "--dataset=Glyphs", "--epochs=3", f"--data-dir={few_glyphs}") == 0
    assert judge.main(options(tmp_path, few_glyphs)) == 0
    assert {*seen} == {(True, True), (False, False)}
    assert seen.count((True, True)) == 3 * 2  # of 300 images, 256 in a step


def relu(num_classes=10):
    model = LeNet(num_classes)
    model.sig = nn.ReLU()
    return model


def test_weights_of_another_network_are_refused(use, small_run, tmp_path, glyphs_dir, start):
    """Of the same shapes, so that only the layers tell."""
    use(relu)
    before = files(small_run)
    expected = r"(best|last).pt does not fit .* C1 has the activation relu, not sigmoid; change"
    with pytest.raises(utils.Error, match=expected):
        start(small_run, "--resume")
    checkpoint = f"--checkpoint={run_dir(small_run) / 'best.pt'}"
    with pytest.raises(utils.Error, match=expected):
        judge.main([checkpoint, *options(tmp_path, glyphs_dir)])
    assert files(small_run) == before


@named([Tuple, Maps])
def test_output_that_is_not_n_x_classes_is_refused(network, use, tmp_path, few_glyphs):
    use(network)
    with pytest.raises(utils.Error, match=r"forward in model\.py must return logits, N x 10, and"):
        train.main(["--dataset=Glyphs", *options(tmp_path, few_glyphs)])
