"""LeNet-5 (LeCun et al., "Gradient-based learning applied to document recognition", 1998).

The network with sigmoid activations and average pooling, 61,706 parameters; and the trace, which
reads from whatever class stands here what the network is, and tells everybody else.

    python model.py    print the table of its layers
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map


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
        """Draw Xavier-uniform weights, larger by the gain of what follows; set biases to zero.

        Source: Glorot and Bengio, "Understanding the difficulty of training deep feedforward
        neural networks", 2010.
        """
        layers = trace(self).layers
        for i, layer in enumerate(layers):
            if layer.kind in ("conv2d", "linear"):
                for parameter in layer.operations[0].parameters:
                    if parameter.ndim > 1:
                        nn.init.xavier_uniform_(parameter, gain(layers[i:]))
                    else:
                        nn.init.zeros_(parameter)

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


# --- The trace: what the network is, read from one forward pass -----------------------------------

LETTERS = {"conv2d": "C", "avg_pool2d": "S", "max_pool2d": "S", "linear": "F"}  # LeCun's names
ARITHMETIC = ("add", "sub", "mul", "div")
RESHAPES = (  # and other operations that leave the numbers, and their order, as they are
    *("flatten", "view", "reshape", "squeeze", "unsqueeze"),
    *("contiguous", "clone", "detach", "to", "float"),
)
OPERATIONS = {  # those that can be followed: their parameters after the input, in PyTorch's order
    "conv2d": "weight bias stride padding dilation groups",
    "linear": "weight bias",
    "avg_pool2d": "kernel_size stride padding ceil_mode count_include_pad divisor_override",
    "max_pool2d": "kernel_size stride padding dilation ceil_mode",
    "batch_norm": "running_mean running_var weight bias training momentum eps",
    "leaky_relu": "negative_slope",
    **dict.fromkeys(ARITHMETIC, "other"),
    **dict.fromkeys(("dropout", "dropout2d"), "p"),
    **dict.fromkeys(("softmax", "log_softmax"), "dim"),
    **dict.fromkeys(("sigmoid", "tanh", "relu", *RESHAPES), ""),
}
USUAL = {"padding 0", "dilation 1", "groups 1", "dim 1"}  # need not be told
USUAL |= {"ceil_mode False", "count_include_pad True", "training False"}


@dataclass
class Operation:
    """One operation of the forward pass."""

    kind: str  # PyTorch's name: conv2d, sigmoid, ...
    numbers: dict  # kernel_size, stride, padding, ...: numbers, or tuples of height and width
    tensors: dict  # weight, bias, ...
    parameters: list  # those of the model of which the tensors are made
    call: Callable  # maps a batch of inputs to a batch of outputs

    def __str__(self):
        if self.kind == "linear":
            return "{1} -> {0}".format(*self.tensors["weight"].shape)
        if "other" in self.tensors:
            return f"{self.tensors['other'].numel()} values"
        words = []
        for name, value in self.numbers.items():
            if isinstance(value, tuple):
                height, width = value
                value = height if height == width else f"{height}x{width}"
            value = f"{value:.4g}" if isinstance(value, float) else value
            words.append(f"{name} {value}".removeprefix("other "))
        if "kernel_size" in self.numbers:  # the first of them
            words[0] = "{}x{}".format(*self.numbers["kernel_size"])
        if self.kind == "conv2d":
            words[0] = f"{len(self.tensors['weight'])} {words[0]} kernels"
        return ", ".join(word for word in words if word not in USUAL)


@dataclass
class Layer:
    """An operation, and what is done to its output before the next layer."""

    name: str  # C1, S2, ...: LeCun's letter for the kind, and the place; or the kind
    operations: list  # of Operation; the first one makes the layer what it is
    parameters: list  # those of the model that it uses, and no layer before it
    input: tuple  # shape without the batch: maps x height x width, or units
    output: torch.Tensor  # for the image of the trace, without the batch

    @property
    def kind(self):
        return self.operations[0].kind

    def row(self):
        """Return the layer as a row of the table: a dict of str and int."""
        first, *others = self.operations
        steps = [f"{each.kind} {each}".strip() for each in others if each.kind not in RESHAPES]
        if self.name == "Output" and "softmax" not in "".join(steps):
            steps.append("softmax, inside the loss")
        return {
            "layer": self.name,
            "type": first.kind,
            "configuration": str(first) or "-",
            "input": "x".join(map(str, self.input)),
            "output": "x".join(map(str, self.output.shape)),
            "activation": ", ".join(steps) or "-",
            "parameters": sum(parameter.numel() for parameter in self.parameters),
        }


def gain(layers):
    """By how much larger to draw the weights of the first layer, for the activation after them.

    Source: the slope of sigmoid and tanh at 0, Glorot and Bengio 2010; for ReLU, which cuts off a
    half, He et al., "Delving deep into rectifiers", 2015, section 2.2.
    """
    for operation in [operation for layer in layers for operation in layer.operations][1:]:
        if operation.kind == "sigmoid":
            return 4
        if operation.kind in ("relu", "leaky_relu"):
            return sqrt(2 / (1 + operation.numbers.get("negative_slope", 0) ** 2))
        if operation.kind in ("tanh", "conv2d", "linear"):
            break
    return 1


class Trace(TorchFunctionMode):
    """The layers of a network, read from its forward pass on one image; made by `trace`.

    As a TorchFunctionMode it sees every operation, whether a module, a function or a method of
    Tensor stands for it in the class.

    Attributes:
        layers: list of Layer, in the order of the forward pass; the first one is the input.
    """

    def __init__(self, model, image):
        super().__init__()
        start = Operation("input", {}, {}, [], lambda x: x)
        self.layers = [Layer("Input", [start], [], tuple(image.shape[1:]), image[0].clone())]
        self.broken = None  # what first breaks the chain, and the layer before it
        self.last = image
        self.data = {image}  # what is made of the image
        self.weights = {p: [p] for p in model.parameters()}  # what is made of which parameters

    @property
    def problem(self):
        """Why the layers are no chain, each fed by the one before it alone; None if they are."""
        return "{}, after {.name}".format(*self.broken) if self.broken else None

    @property
    def softmax(self):
        """The kind of softmax in which the forward pass ends, or None: the loss has its own."""
        kind = self.layers[-1].operations[-1].kind
        return kind if kind in ("softmax", "log_softmax") else None

    def shares(self, logits):
        """Return the share of each class (N x classes) for the outputs of the network."""
        return logits if self.softmax == "softmax" else logits.softmax(dim=1)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        output = function(*args, **kwargs)
        inputs, outputs = tensors_in(args, kwargs), tensors_in(output)
        sources = [p for t in inputs for p in self.weights.get(t, ())]
        if self.data.isdisjoint(inputs):
            self.weights.update(dict.fromkeys(outputs, sources))
        elif outputs:  # the others ask for a size
            if outputs[0].ndim > 0:  # what is one number, such as a sum to be printed, is no layer
                self.record(function, args, kwargs, outputs[0], sources)
            self.data.update(outputs)
        return output

    def record(self, function, args, kwargs, output, sources):
        """Note an operation on something made of the image."""
        x, *joined = dict.fromkeys(t for t in tensors_in(args, kwargs) if t in self.data)
        kind, numbers, tensors = read(function.__name__.strip("_"), x, args, kwargs)

        def call(batch):
            swapped = tree_map(lambda value: batch if value is x else value, (args, kwargs))
            return function(*swapped[0], **swapped[1])

        chained = x is self.last and not joined
        if joined:
            self.complain(f"{kind} joins two branches")
        elif not chained:
            self.complain(f"{kind} goes back to an earlier output")
        elif len(output) != 1:
            self.complain(f"{kind} makes {len(output)} out of one image")
        elif not is_known(kind, numbers | tensors, x, args, kwargs):
            self.complain(f"{kind} is not known here, or not in this use")
        operation = Operation(kind, numbers, tensors, sources, call)
        self.add(operation, x, output[0].clone(), chained)  # a later one may work in place
        self.last = output

    def add(self, operation, x, output, chained):
        """Make an operation on x a layer, or a step of the last one."""
        kind, last = operation.kind, self.layers[-1]
        makes_layer = kind in LETTERS or kind in ("batch_norm", "dropout", "dropout2d")
        if chained and not makes_layer and output.numel() == last.output.numel():
            last.operations.append(operation)
            last.output = output.reshape(last.output.shape)
        else:
            place = 1 + sum(layer.kind in LETTERS for layer in self.layers)
            name = f"{LETTERS[kind]}{place}" if kind in LETTERS else kind
            self.layers.append(Layer(name, [operation], [], tuple(x.shape[1:]), output))
        used = {p for layer in self.layers for p in layer.parameters}
        new = [p for p in dict.fromkeys(operation.parameters) if p not in used]
        self.layers[-1].parameters += new

    def complain(self, text):
        """Note what breaks the chain, unless it is broken."""
        self.broken = self.broken or (text, self.layers[-1])


def tensors_in(*values):
    """Return the tensors in nested lists, tuples and dicts."""
    return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]


def read(kind, x, args, kwargs):
    """Return kind, numbers and tensors of an operation on x, as `Operation` has them."""
    values = [value for value in args if value is not x]
    if kind in ("mm", "matmul") and [t.ndim for t in values] == [2] and args[0] is x:
        kind, values = "linear", [values[0].t()]
    names = OPERATIONS.get(kind, "").split()
    named = dict(zip(names, values)) | kwargs
    named["stride"] = named.get("stride") or named.get("kernel_size", 1)  # PyTorch's default
    known = {name: named[name] for name in names if named.get(name) is not None}
    tensors = {name: t for name, t in known.items() if isinstance(t, torch.Tensor)}
    numbers = {name: value for name, value in known.items() if name not in tensors}
    if kind == "conv2d":
        numbers = {"kernel_size": tuple(tensors["weight"].shape[2:])} | numbers
    for name in ("kernel_size", "stride", "padding", "dilation"):
        if isinstance(numbers.get(name), int):
            numbers[name] = (numbers[name], numbers[name])
    return kind, numbers, tensors


def is_known(kind, known, x, args, kwargs):
    """Tell whether what is `known` of an operation on x (1 x maps x ...) is all there is to it."""
    if kind in ARITHMETIC:  # with a number, or with one for each map or unit
        count = torch.as_tensor(known.get("other", ())).numel()  # of x + x it is 0
        plain = not kwargs and (kind in ("add", "mul") or args[0] is x)
        return plain and count in (1, *x.shape[1:2])
    if kind == "batch_norm":
        return "running_mean" in known
    if kind in ("linear", "softmax", "log_softmax"):
        return x.ndim == 2 and known.get("dim", 1) in (1, -1)
    return kind in OPERATIONS


@torch.no_grad()
def trace(model, image=None):
    """Run `model` once, as it runs when it is judged, and return what it did, as a `Trace`.

    What was seen is also run on another image. If that does not give what the model gives, since
    it does something that cannot be seen, this is the problem of the trace.

    Args:
        model: maps N x 1 x 32 x 32 (float) to logits, whatever class it is.
        image: 1 x 1 x 32 x 32, of the model's dtype, on its device; None: a black one.
    """
    training = model.training
    model.eval()
    parameter = next(model.parameters(), torch.zeros(0))
    other = torch.linspace(0, 30, 1024).sin().view(1, 1, 32, 32).to(parameter)
    expected = model(other.clone())  # after it, lazy layers have their sizes
    image = torch.zeros_like(other) if image is None else image
    with Trace(model, image) as traced:
        output = model(image)
    model.train(training)
    named = [layer for layer in traced.layers if layer.kind in LETTERS]
    if named and named[-1].output.shape == traced.layers[-1].output.shape:
        named[-1].name = "Output"
    if output is not traced.last:
        traced.complain("forward returns something else than the last output")
    if not traced.problem:
        for operation in [each for layer in traced.layers for each in layer.operations]:
            other = operation.call(other)
        if not torch.allclose(other, expected, rtol=1e-4, atol=1e-5):
            traced.complain("what was seen gives other logits than the network")
    return traced


def layer_table(traced):
    """Return the rows, as `Layer.row` makes them, of the layers that do something."""
    return [layer.row() for layer in traced.layers if layer.operations[1:] or layer.name != "Input"]


def main():
    traced = trace(LeNet())
    rows = layer_table(traced)
    total = sum(row["parameters"] for row in rows)
    rows.insert(0, {name: name for name in rows[0]})
    rows.append(dict.fromkeys(rows[0], "") | {"layer": "Total", "parameters": total})
    widths = [max(len(str(row[name])) for row in rows) for name in rows[0]]
    for row in rows:
        *texts, count = row.values()
        texts = [text.ljust(width) for text, width in zip(texts, widths)]
        print("  ".join(texts), f"{count:>10,}" if isinstance(count, int) else count)
    if traced.problem:
        print(f"The layers are not a chain: {traced.problem}")


if __name__ == "__main__":
    main()
