"""Muon, the parameters and learning rates of both optimizers, and the learning rate schedule."""

import math

import pytest
import torch

from model import LeNet
from train import Muon, make_optimizers, newton_schulz, one_cycle


@pytest.mark.parametrize("shape", [(6, 25), (120, 400), (84, 120), (40, 10)])
def test_newton_schulz_makes_singular_values_about_one_and_keeps_the_vectors(shape):
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    values = s / s.norm()
    for _ in range(3):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    assert values[s > 0.1 * s.max()].min() > 0.6 and values.max() < 1.3
    for scaled in (matrix, 1000 * matrix):
        torch.testing.assert_close(newton_schulz(scaled), u * values @ v, rtol=0, atol=1e-4)
    assert not newton_schulz(torch.zeros(shape)).any()


@pytest.mark.parametrize(("shape", "size"), [((16, 6, 5, 5), 0.1), ((80, 20), 0.2)])
def test_step_of_muon_has_the_size_of_the_learning_rate_and_descends(shape, size):
    """With more rows than columns, it is larger: by the square root of their ratio."""
    torch.manual_seed(0)
    before, grad = torch.randn(2, *shape)
    weights = [torch.nn.Parameter(before.clone()) for _ in range(2)]
    for weight, decay in zip(weights, (0.0, 0.5)):
        weight.grad = grad
        Muon([weight], lr=0.1, weight_decay=decay).step()
    change, decayed = [weight.detach() - before for weight in weights]
    assert torch.linalg.svdvals(change.flatten(1)).mean() == pytest.approx(size, rel=0.2)
    assert (change * grad).sum() < 0
    torch.testing.assert_close(decayed, change - 0.1 * 0.5 * before)


def test_muon_uses_nesterov_momentum():
    torch.manual_seed(0)
    first, second = torch.randn(2, 6, 8)
    weight = torch.nn.Parameter(torch.zeros(6, 8))
    optimizer = Muon([weight], lr=0.1, momentum=0.8)
    for grad in (first, second):
        before = weight.detach().clone()
        weight.grad = grad
        optimizer.step()
    average = 0.8 * 0.2 * first + 0.2 * second
    expected = -0.1 * newton_schulz(0.8 * average + 0.2 * second)
    torch.testing.assert_close(weight.detach() - before, expected)


def test_muon_takes_a_closure_and_skips_parameters_without_gradient():
    weight, unused = [torch.nn.Parameter(torch.ones(2, 2)) for _ in range(2)]
    optimizer = Muon([weight, unused], lr=0.1, weight_decay=0.1)

    def closure():
        loss = weight.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 4
    assert weight.lt(1).all() and unused.eq(1).all()


def test_muon_has_the_hidden_weights_and_adamw_the_other_trainable_parameters():
    model = LeNet()
    model.c3.requires_grad_(False)
    muon, adamw = make_optimizers(model, lr=0.8, weight_decay=0.1)
    assert (type(muon), type(adamw)) == (Muon, torch.optim.AdamW)
    hidden = ["c1.weight", "c5.weight", "f6.weight"]
    others = ["c1.bias", "c5.bias", "f6.bias", "f7.bias", "f7.weight"]
    names = {parameter: name for name, parameter in model.named_parameters()}
    for optimizer, expected, lr, decay in ((muon, hidden, 0.8, 0.1), (adamw, others, 0.4, 0.2)):
        (group,) = optimizer.param_groups
        assert sorted(names[parameter] for parameter in group["params"]) == expected
        assert (group["lr"], group["weight_decay"]) == (lr, decay)


def test_learning_rate_rises_for_three_tenths_of_the_run_and_falls_to_zero():
    rise = [0.04 + 0.96 * math.sin(math.pi * i / 60) ** 2 for i in range(30)]
    fall = [math.cos(math.pi * i / 140) ** 2 for i in range(71)]
    assert [one_cycle(i / 100) for i in range(101)] == pytest.approx(rise + fall, abs=1e-9)
