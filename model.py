"""LeNet-5 (LeCun et al., "Gradient-based learning applied to document recognition", 1998).

The network with sigmoid activations and average pooling: 61,706 parameters.

    python model.py    print the table of its layers
"""

import torch
from torch import nn


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

    layers = [module for module in model.children() if not isinstance(module, nn.Flatten)]
    hooks = [layer.register_forward_hook(record) for layer in layers]
    with torch.no_grad():
        model(torch.zeros(1, 1, 32, 32))
    for hook in hooks:
        hook.remove()
    rows[-1].update(layer="Output", activation="softmax, inside the loss")
    return rows


def main():
    rows = layer_table(LeNet())
    texts = "{:<8}{:<11}{:<27}{:<10}{:<10}{:<26}"
    print((texts + "{:>10}").format(*rows[0]))
    for row in rows:
        print((texts + "{:>10,}").format(*row.values()))
    total = sum(row["parameters"] for row in rows)
    print((texts + "{:>10,}").format("Total", *[""] * 5, total))


if __name__ == "__main__":
    main()
