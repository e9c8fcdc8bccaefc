"""LeNet-5 (LeCun et al., "Gradient-based learning applied to document recognition", 1998).

The network with sigmoid activations and average pooling: 61,706 parameters. `LeNet` is there to be
read, `FastLeNet` is the same network, rearranged for training.

    python model.py    print the layer table and redraw images/architecture.png
"""

import functools
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable


class LeNet(nn.Module):
    """LeNet-5 for grey 32x32 images.

    Args:
        num_classes: number of outputs.
    """

    def __init__(self, num_classes=10):
        super().__init__()
        self.c1 = nn.Conv2d(1, 6, kernel_size=5)
        self.s2 = nn.AvgPool2d(kernel_size=2)
        self.c3 = nn.Conv2d(6, 16, kernel_size=5)
        self.s4 = nn.AvgPool2d(kernel_size=2)
        self.c5 = nn.Conv2d(16, 120, kernel_size=5)
        self.flatten = nn.Flatten()
        self.f6 = nn.Linear(120, 84)
        self.f7 = nn.Linear(84, num_classes)
        self.sig = nn.Sigmoid()
        self.reset_parameters()

    def reset_parameters(self):
        """Draw Xavier-uniform weights and set the biases to zero.

        The gain is 4 where a sigmoid follows: its slope at 0 is 1/4, and the gain makes up for it
        (Glorot and Bengio, "Understanding the difficulty of training deep feedforward neural
        networks", 2010). The output layer is linear and has gain 1.
        """
        for layer in (self.c1, self.c3, self.c5, self.f6, self.f7):
            nn.init.xavier_uniform_(layer.weight, gain=1 if layer is self.f7 else 4)
            nn.init.zeros_(layer.bias)

    def forward(self, x):
        """Map images (N x 1 x 32 x 32, float) to logits (N x num_classes, float)."""
        x = self.sig(self.c1(x))  # N x 6 x 28 x 28
        x = self.s2(x)  # N x 6 x 14 x 14
        x = self.sig(self.c3(x))  # N x 16 x 10 x 10
        x = self.s4(x)  # N x 16 x 5 x 5
        x = self.sig(self.c5(x))  # N x 120 x 1 x 1
        x = self.flatten(x)  # N x 120
        x = self.sig(self.f6(x))  # N x 84
        return self.f7(x)  # N x num_classes; the softmax is in the loss


class FastLeNet(LeNet):
    """LeNet rearranged for speed: the same parameters and the same function, to rounding.

    A convolution with few maps leaves most of a processor idle. Here C1 computes 4x4 neighbouring
    outputs of all its 6 maps at once, 96 numbers, from the 8x8 pixels that any of them sees; C3
    computes 2x2 outputs of 16 maps from 6x6 pixels of S2. Each is one large matrix product. S2 and
    S4 are then means over columns, and C5, whose kernel covers its whole input, is a linear layer.

    Between the layers an image lies as N x height x width x numbers, in blocks of pixels: 4x4
    pixels for C1, 2x2 pixels of 6 maps for C3.
    """

    def forward(self, x):
        """Map images (N x 1 x 32 x 32, float) to logits (N x num_classes, float)."""
        n = len(x)
        x = x.reshape(n, 8, 4, 8, 4).transpose(2, 3).reshape(n, 8, 8, 16)
        x = _ConvSigmoidPool.apply(x, *_as_matrix(self.c1, block=4))  # N x 7 x 7 x 24
        x = _ConvSigmoidPool.apply(x, *_as_matrix(self.c3, block=2))  # N x 5 x 5 x 16
        x = x.permute(0, 3, 1, 2).reshape(n, 400)
        x = self.sig(F.linear(x, self.c5.weight.flatten(1), self.c5.bias))  # N x 120
        x = self.sig(self.f6(x))  # N x 84
        return self.f7(x)  # N x num_classes


@functools.cache
@torch.inference_mode(False)  # or the constant could not take part in training later
def _tap_positions(block, dtype, device):
    """Say where the taps of a 5x5 kernel lie in the window that block x block outputs see.

    Returns:
        25 x pixels of the window x outputs (float): 1 where the output multiplies that pixel by
        that tap, else 0. The pixels go by blocks; the outputs by their place in the 2x2 pooling.
    """
    taps = torch.eye(25, dtype=dtype, device=device).view(25, 5, 5)
    shifts = [(y, x) for y in range(block) for x in range(block)]
    last = block - 1
    positions = torch.stack([F.pad(taps, (x, last - x, y, last - y)) for y, x in shifts], dim=1)
    blocks, pools = (block + 4) // block, block // 2
    positions = positions.view(25, pools, 2, pools, 2, blocks, block, blocks, block)
    positions = positions.permute(0, 5, 7, 6, 8, 2, 4, 1, 3)
    return positions.reshape(25, (block + 4) ** 2, block**2)


def _as_matrix(conv, block):
    """Return the weights of `conv` as a matrix, window to outputs, and the bias of each column."""
    taps = _tap_positions(block, conv.weight.dtype, conv.weight.device)
    maps, channels = conv.weight.shape[:2]
    _, pixels, outputs = taps.shape
    weight = conv.weight.view(maps * channels, 25) @ taps.flatten(1)
    weight = weight.view(maps, channels, pixels, outputs).permute(2, 1, 3, 0)
    return weight.reshape(pixels * channels, outputs * maps), conv.bias.repeat(outputs)


class _ConvSigmoidPool(torch.autograd.Function):
    """Convolution as a matrix product, sigmoid, and the mean over the four quarters of the columns.

    Autograd would do the same, but in more and slower steps.
    """

    @staticmethod
    def forward(ctx, x, weight, bias):
        """Map x (N x H x W x C) to N x (H-k+1) x (W-k+1) x columns/4; weight: k*k*C x columns."""
        n, h, w, c = x.shape
        k = round((len(weight) / c) ** 0.5)  # side of the window
        windows = x.unfold(1, k, 1).unfold(2, k, 1).permute(0, 1, 2, 4, 5, 3)
        ctx.shapes = x.shape, windows.shape
        h, w = windows.shape[1:3]
        windows = windows.reshape(n * h * w, len(weight))
        s = torch.addmm(bias, windows, weight).sigmoid_().unflatten(1, (4, -1))
        ctx.save_for_backward(windows, weight, s)
        return s.mean(dim=1).unflatten(0, (n, h, w))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        windows, weight, s = ctx.saved_tensors
        x_shape, (n, h, w, k, _, c) = ctx.shapes
        grad = (grad / 4).flatten(0, 2).unsqueeze(1)
        grad = torch.addcmul(s, s, s, value=-1).mul_(grad).flatten(1)  # s - s*s is the slope
        x_grad = None
        if ctx.needs_input_grad[0]:
            parts = (grad @ weight.t()).view(n, h, w, k, k * c)
            rows = grad.new_zeros(n, h + k - 1, w, k * c)
            for i in range(k):
                rows[:, i : i + h] += parts[:, :, :, i]
            x_grad = grad.new_zeros(x_shape)
            for j in range(k):
                x_grad[:, :, j : j + w] += rows[..., j * c : (j + 1) * c]
        return x_grad, windows.t() @ grad, grad.sum(dim=0)


def layer_table(model):
    """Run `model` on one blank image and describe each layer that it went through.

    Returns:
        A list of dicts of str and int with the keys layer, type, configuration, input, output,
        activation and parameters, in the order of the forward pass.
    """
    names = {module: name for name, module in model.named_modules()}
    rows = []

    def record(module, inputs, output):
        if isinstance(module, nn.Sigmoid):
            rows[-1]["activation"] = "sigmoid"
            return
        if isinstance(module, nn.Flatten):
            return
        if isinstance(module, nn.Conv2d):
            kernel = "x".join(map(str, module.kernel_size))
            configuration = f"{module.out_channels} {kernel} kernels, stride {module.stride[0]}"
        elif isinstance(module, nn.AvgPool2d):
            configuration = f"{module.kernel_size}x{module.kernel_size}, stride {module.stride}"
        else:
            configuration = f"{module.in_features} -> {module.out_features}"
        rows.append(
            {
                "layer": names[module].upper(),
                "type": type(module).__name__,
                "configuration": configuration,
                "input": "x".join(map(str, inputs[0].shape[1:])),
                "output": "x".join(map(str, output.shape[1:])),
                "activation": "-",
                "parameters": sum(p.numel() for p in module.parameters()),
            }
        )

    hooks = [m.register_forward_hook(record) for m in model.modules() if m is not model]
    with torch.no_grad():
        model(torch.zeros(1, 1, 32, 32))
    for hook in hooks:
        hook.remove()
    rows[-1].update(layer="Output", activation="softmax, inside the loss")
    return rows


def main():
    from utils import plot_architecture  # only here: the network itself needs nothing but torch

    rows = layer_table(LeNet())
    header = {key: key.capitalize() for key in rows[0]}
    total = dict.fromkeys(header, "") | {
        "layer": "Total",
        "parameters": sum(row["parameters"] for row in rows),
    }
    table = [
        [f"{v:,}" if isinstance(v, int) else v for v in row.values()]
        for row in [header, *rows, total]
    ]
    widths = [max(map(len, column)) for column in zip(*table)]
    for *cells, parameters in table:
        text = "  ".join(c.ljust(w) for c, w in zip(cells, widths))
        print(f"{text}  {parameters:>{widths[-1]}}")

    path = Path(__file__).resolve().parent / "images" / "architecture.png"
    plot_architecture(rows, path)
    print(f"\nDrawn: {path}")


if __name__ == "__main__":
    main()
