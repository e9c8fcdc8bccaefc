"""Record the layers of a network in one forward pass, for its table, its pictures and the page."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from utils import Error, fixed_image

LETTERS = {"conv2d": "C", "avg_pool2d": "S", "max_pool2d": "S", "linear": "F"}  # LeCun's letters
ARITHMETIC = ("add", "sub", "mul", "div")
RESHAPES = ("flatten", "view", "reshape", "squeeze", "unsqueeze", "contiguous", "clone", "to")
ARGUMENTS = {  # supported operations, and their arguments after the input, in PyTorch's order
    "conv2d": ["weight", "bias", "stride", "padding", "dilation", "groups"],
    "linear": ["weight", "bias"],
    "mm": ["weight"],  # recorded as linear, transposed
    "matmul": ["weight"],
    "avg_pool2d": ["kernel_size", "stride", "padding"],
    "max_pool2d": ["kernel_size", "stride", "padding"],
    "batch_norm": ["running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"],
    "leaky_relu": ["negative_slope"],
    "dropout": ["p"],
    "dropout2d": ["p"],
}
ARGUMENTS |= {op: ["other"] for op in ARITHMETIC}
ARGUMENTS |= {op: [] for op in ("sigmoid", "tanh", "relu", "softmax", "log_softmax", *RESHAPES)}
DEFAULTS = {"padding": (0, 0), "dilation": (1, 1), "groups": 1}  # values that the table omits
DEFAULTS |= {"training": False, "momentum": 0.1, "eps": 1e-5}
RTOL, ATOL = 1e-4, 1e-5  # tolerances for comparing outputs


class Unsupported(Error):
    """The network is not a chain of supported operations, so it cannot be shown."""


@dataclass
class Operation:
    """One operation of the forward pass."""

    op: str  # its name in torch.nn.functional
    attributes: dict  # kernel_size, stride, ...: number, text, or (height, width)
    tensors: dict  # weight, bias, ...
    output_shape: tuple  # without the batch dimension

    def __call__(self, x):
        """Apply the operation to a batch, using only the fields above."""
        arguments = self.attributes | self.tensors
        if self.op in ("input", "dropout", "dropout2d"):
            return x
        if self.op in RESHAPES:
            return x.reshape(len(x), *self.output_shape)
        if self.op in ARITHMETIC:
            other = torch.as_tensor(arguments["other"])
            other = other.reshape(-1, *[1] * (x.ndim - 2))  # one value for each map or unit
            return getattr(torch, self.op)(x, other)
        if self.op == "linear":
            x = x.flatten(1)  # fails if the layer connected only the last dimension
        if self.op == "conv2d":
            del arguments["kernel_size"]
        if self.op in ("softmax", "log_softmax"):
            arguments["dim"] = 1
        return getattr(F, self.op)(x, **arguments)

    def __str__(self):
        words = []
        if self.op == "linear":
            outputs, inputs = self.tensors["weight"].shape
            words.append(f"{inputs} -> {outputs}")
        if "other" in self.tensors:
            words.append(f"{self.tensors['other'].numel()} values")
        for name, value in self.attributes.items():
            text = f"{value:.4g}" if isinstance(value, float) else f"{value}"
            if isinstance(value, tuple):
                height, width = value
                text = f"{height}x{width}" if height != width or name == "kernel_size" else height
            if value != DEFAULTS.get(name):
                words.append(text if name in ("kernel_size", "other") else f"{name} {text}")
        if self.op == "conv2d":
            words[0] = f"{len(self.tensors['weight'])} {words[0]} kernels"
        return ", ".join(words)


@dataclass
class Layer:
    """A convolution, pooling or linear operation, and all operations before the next one."""

    name: str  # Input, C1, S2, ...: LeCun's letter for the kind, and the position; Output
    input_shape: tuple  # without the batch
    operations: list
    output: torch.Tensor  # for the recorded image, without the batch
    parameters: int = 0  # their number, except those shared with an earlier layer

    def activations(self):
        """Describe the operations after the first one, except reshapes."""
        later = [operation for operation in self.operations[1:] if operation.op not in RESHAPES]
        return [f"{operation.op} {operation}".strip() for operation in later]

    def row(self):
        """Return the layer as a row of the table: a dict of str and int."""
        activations = self.activations()
        if self.name == "Output" and "softmax" not in "".join(activations):
            activations.append("softmax, inside the loss")
        return {
            "layer": self.name,
            "type": self.operations[0].op,
            "configuration": str(self.operations[0]) or "-",
            "input": "x".join(map(str, self.input_shape)),
            "output": "x".join(map(str, self.output.shape)),
            "activation": ", ".join(activations) or "-",
            "parameters": self.parameters,
        }


class Recorder(TorchFunctionMode):
    """Record all operations on `image`, whether called as a module, a function or a method."""

    def __init__(self, model, image):
        super().__init__()
        shape = tuple(image.shape[1:])
        self.last = image  # the input that the next operation must use
        self.counted = {(b.data_ptr(), b.shape) for b in model.buffers()}  # are not parameters
        self.layers = [Layer("Input", shape, [Operation("input", {}, {}, shape)], image[0].clone())]

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        x = self.last.clone()  # the operation may work in place
        output = function(*args, **kwargs)
        follows = any(value is self.last for value in tree_leaves((args, kwargs)))
        if follows and torch.is_tensor(output) and output.ndim > 0:  # not a shape or a scalar
            op = function.__name__.strip("_")
            args = [value for value in args if value is not self.last]
            try:
                operation = make_operation(op, args, kwargs, tuple(output.shape[1:]))
                if not torch.allclose(operation(x), output, RTOL, ATOL):
                    raise ValueError
            except (KeyError, RuntimeError, TypeError, ValueError) as error:
                place = f"{op} after {self.layers[-1].name}"
                raise Unsupported(f"{place} is not supported") from error
            self.record(operation, tuple(x.shape[1:]), output[0].clone())
            self.last = output
        return output

    def record(self, operation, input_shape, output):
        """Append an operation to the last layer, or to a new layer if it starts one."""
        if operation.op in LETTERS:
            name = f"{LETTERS[operation.op]}{len(self.layers)}"
            self.layers.append(Layer(name, input_shape, [], output))
        layer = self.layers[-1]
        layer.operations.append(operation)
        if operation.op not in RESHAPES and operation.op not in LETTERS:
            layer.output = output.reshape(layer.output.shape)  # an operation may follow flatten
        for tensor in operation.tensors.values():
            memory = (tensor.data_ptr(), tensor.shape)
            if memory not in self.counted:
                self.counted.add(memory)
                layer.parameters += tensor.numel()


def make_operation(op, args, kwargs, output_shape):
    """Make an `Operation` from a call, without its input. Raise KeyError if it is not supported."""
    names = ARGUMENTS[op]
    attributes, tensors = {}, {}
    for name, value in [*zip(names, args), *kwargs.items()]:
        if name in names and torch.is_tensor(value):
            tensors[name] = value.detach()
        elif name in names and value not in (None, [], ()):
            attributes[name] = value
    if op in ("mm", "matmul"):
        op, tensors = "linear", {"weight": tensors["weight"].mT}
    if op == "conv2d":
        attributes = {"kernel_size": tuple(tensors["weight"].shape[2:]), "stride": 1} | attributes
    if "kernel_size" in attributes:
        attributes.setdefault("stride", attributes["kernel_size"])
    for name in ("kernel_size", "stride", "padding", "dilation"):
        if isinstance(attributes.get(name), (int, tuple, list)):  # not "same"
            attributes[name] = tuple(np.broadcast_to(attributes[name], 2).tolist())
    return Operation(op, attributes, tensors, output_shape)


@torch.no_grad()
def trace(model, image=None):
    """Run `model` on an image (float, 1 x 1 x 32 x 32), and return its layers, the input first.

    Raises:
        Unsupported: the network is not a chain of supported operations.
    """
    first = fixed_image().to(next(model.parameters()).device)
    second = first.flip(3) / 2
    expected = model.eval()(second.clone())
    with Recorder(model, first if image is None else image.clone()) as recorder:
        output = model(recorder.last)
    layers = recorder.layers
    layers[-1].name = "Output"
    for layer in layers:
        for operation in layer.operations:
            second = operation(second)
    if output is not recorder.last or not torch.allclose(second, expected, RTOL, ATOL):
        raise Unsupported("the logits do not follow from a chain of operations")
    return layers


def table(layers):
    """Return the rows of the table (see `Layer.row`). An unchanged input has none."""
    return [layer.row() for layer in layers if layer.name != "Input" or layer.activations()]
