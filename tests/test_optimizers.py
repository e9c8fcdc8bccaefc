"""Muon, who trains what by which rate, and the schedule of the rate."""

import math

import pytest
import torch

from model import LeNet
from train import Muon, make_optimizers, one_cycle, orthogonalise


@pytest.mark.parametrize("shape", [(6, 25), (120, 400), (84, 120), (40, 10)])
def test_singular_values_become_about_one(shape):
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    values = torch.linalg.svdvals(orthogonalise(matrix))
    assert values[s > 0.1 * s.max()].min() > 0.6
    assert values.max() < 1.3
    assert torch.allclose(orthogonalise(1000 * matrix), orthogonalise(matrix), atol=1e-4)
    # The same singular vectors: in their basis it is still diagonal.
    inner = u.T @ orthogonalise(matrix) @ v.T
    assert (inner - inner.diag().diag()).abs().max() < 1e-3


def test_gradient_of_zero_moves_nothing():
    assert not orthogonalise(torch.zeros(3, 4)).any()


def test_step_has_the_size_of_the_rate_and_decays_the_weights():
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(16, 6, 5, 5))
    before = weight.detach().clone()
    weight.grad = torch.randn_like(weight)
    Muon([weight], lr=0.1, weight_decay=0.5).step()
    step = (weight.detach() - before * (1 - 0.1 * 0.5)).flatten(1)
    assert torch.linalg.svdvals(step).mean() == pytest.approx(0.1, rel=0.2)
    assert (step * weight.grad.flatten(1)).sum() < 0


def test_momentum_goes_on_after_the_gradient():
    weight = torch.nn.Parameter(torch.zeros(4, 4))
    optimizer = Muon([weight], lr=0.1)
    weight.grad = torch.eye(4)
    optimizer.step()
    first = weight.detach().clone()
    weight.grad = torch.zeros(4, 4)
    optimizer.step()
    assert (weight.detach().diagonal() < first.diagonal()).all()


def test_muon_has_the_hidden_weights_and_adamw_all_others():
    model = LeNet()
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = [
        (type(optimizer), [names[p] for p in group["params"]], group["lr"], group["weight_decay"])
        for optimizer in make_optimizers(model, 0.8, 0.1)
        for group in optimizer.param_groups
    ]
    hidden = [f"{layer}.weight" for layer in ("c1", "c3", "c5", "f6")]
    others = [name for name in names.values() if name not in hidden]
    assert groups == [(Muon, hidden, 0.8, 0.1), (torch.optim.AdamW, others, 0.4, 0.2)]


def test_learning_rate_goes_up_and_down_once():
    rates = [one_cycle(i / 100) for i in range(101)]
    up = [0.04 + 0.96 * math.sin(math.pi * i / 60) ** 2 for i in range(30)]
    down = [math.cos(math.pi * i / 140) ** 2 for i in range(71)]
    assert rates == pytest.approx(up + down, abs=1e-9)
