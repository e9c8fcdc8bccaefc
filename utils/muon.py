"""Muon, the optimizer of the hidden layers' weights."""

import torch


class Muon(torch.optim.Optimizer):
    """Gradient descent with Nesterov momentum, each step of a weight matrix made orthogonal.

    The update of a matrix then has the same size in all directions, where the gradient itself has
    a few large ones and many that are almost lost. A kernel counts as a matrix with one row per
    output map. Weight decay is decoupled, as in AdamW.

    Source: Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024,
    https://kellerjordan.github.io/posts/muon/
    """

    def __init__(self, params, lr, momentum=0.95, weight_decay=0.0):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        """Update all parameters by their gradients."""
        for group in self.param_groups:
            lr, momentum, decay = group["lr"], group["momentum"], group["weight_decay"]
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                average = state["momentum"].lerp_(p.grad, 1 - momentum)
                update = orthogonalise(p.grad.lerp(average, momentum).flatten(1))
                rows, columns = update.shape
                update = update.view_as(p) * max(1, rows / columns) ** 0.5
                p.mul_(1 - lr * decay).sub_(lr * update)


def orthogonalise(matrix, steps=3):
    """Return about U V^T for a matrix U S V^T: all but the smallest singular values near 1.

    A Newton-Schulz iteration with a polynomial of degree 5 that lifts small values quickly and
    keeps the others between about 0.7 and 1.2. Its authors take 5 steps; here 3 did as well.
    """
    x = matrix / (matrix.norm() + 1e-7)
    if len(x) > x.shape[1]:
        return orthogonalise(matrix.t(), steps).t()
    for _ in range(steps):
        square = x @ x.t()
        square = torch.addmm(square, square, square, beta=-4.7750, alpha=2.0315)
        x = torch.addmm(x, square, x, beta=3.4445)
    return x
