"""LeNet-5, after LeCun et al., "Gradient-based learning applied to document recognition", 1998.

python model.py    print its modules and the number of parameters
"""

from torch import nn

GAINS = {nn.Sigmoid: 4.0, nn.Tanh: 1.0}  # 1 / (slope at 0): keeps the scale of signals
RELU_GAIN = 2**0.5  # for ReLU and its variants; He et al., "Delving deep into rectifiers", 2015


class LeNet(nn.Module):
    """A modern LeNet-5 for 32x32 grayscale images: 61,706 parameters with 10 classes.

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
        """Draw Xavier-uniform weights, scaled by the gain of the activation; zero the biases.

        With AdamW alone, this is more accurate than PyTorch's default; with Muon, about equal.
        Source: Glorot and Bengio, "Understanding the difficulty of training deep feedforward
        neural networks", 2010.
        """
        gain = GAINS.get(type(getattr(self, "sig", None)), RELU_GAIN)  # otherwise: assume ReLU
        layers = [m for m in self.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
        for layer in layers:
            last = layer is layers[-1]  # no activation follows it
            nn.init.xavier_uniform_(layer.weight, gain=1.0 if last else gain)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def forward(self, x):
        """Map images (float, N x 1 x 32 x 32) to logits (N x num_classes)."""
        x = self.sig(self.c1(x))  # N x 6 x 28 x 28
        x = self.s2(x)  # N x 6 x 14 x 14
        x = self.sig(self.c3(x))  # N x 16 x 10 x 10
        x = self.s4(x)  # N x 16 x 5 x 5
        x = self.sig(self.c5(x))  # N x 120 x 1 x 1
        x = self.flatten(x)  # N x 120
        x = self.sig(self.f6(x))  # N x 84
        return self.f7(x)  # N x num_classes; the loss applies the softmax


if __name__ == "__main__":
    model = LeNet()
    print(model)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
