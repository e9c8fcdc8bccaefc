"""Build lenet5.html, a page that shows all layers of a network for an image that you draw.

python images/page.py                  the page in this repository, with the pretrained networks
python images/page.py --script-only    insert changed sources into it; this needs no dataset
"""

import copy
import html
import json
import re
import sys
import textwrap
from base64 import b64encode
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
import torch.nn.functional as F

import utils
from images.trace import RESHAPES, Unsupported, trace
from model import LeNet

PAGE = utils.ROOT / "images" / "lenet5.html"
SOURCES = utils.ROOT / "images" / "page"


def write(networks, path):
    """Write a page with `networks`, followed by the pretrained ones of all other datasets.

    `networks` is a dict from dataset names to the results of `describe_network`.
    """
    data = {name: encode(name, *network) for name, network in networks.items()}
    tracked = PAGE.read_text(encoding="utf-8")
    for block in re.finditer(r'<script data-network="(.*?)".*?</script>\n', tracked, re.DOTALL):
        name = html.unescape(block[1])
        if name not in networks:
            data[name] = data.get(name, "") + block[0]
    page = (SOURCES / "page.html").read_text(encoding="utf-8")
    for name in ("style.css", "network.js", "page.js"):
        page = page.replace(f"/* {name} */\n", (SOURCES / name).read_text(encoding="utf-8"))
    utils.write_file(path, page.replace("<!-- data -->\n", "".join(data.values())).encode())


def encode(name, description, arrays):
    """Encode a network as elements of the page: its description as JSON, its arrays as base64."""
    try:
        text = json.dumps(description, indent=1, allow_nan=False)
    except ValueError as error:
        raise Unsupported("it has values that are infinite or NaN") from error
    name, text = html.escape(name), text.replace("</", "<\\/")  # not the end of the element
    elements = [f'<script data-network="{name}" type="application/json">\n{text}\n</script>\n']
    for key, tensor in arrays.items():
        array = tensor.contiguous().numpy()
        attributes = f'data-network="{name}" data-array="{key}" data-type="{array.dtype}"'
        text = "\n".join(textwrap.wrap(b64encode(array.tobytes()).decode(), 120))
        elements.append(f'<script {attributes} type="text/plain">\n{text}\n</script>\n')
    return "".join(elements)


def describe_network(run, model, images, labels, logits):
    """Describe a network for the page.

    Args:
        model: on the CPU, with the weights of `run`.
        images: the test split, uint8, N x 28 x 28; labels: int64, N; logits: float, N x classes.

    Returns:
        a dict of plain values and a dict of tensors, which page/network.js reads.
    """
    dataset = utils.DATASETS[run["dataset"]]
    layers = trace(model)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    samples = torch.cat([order[labels[order] == label][:10] for label in labels.unique()])
    errors = order[(logits.argmax(dim=1) != labels)[order]][:50]  # in the same random order
    shown = torch.cat([samples, errors])
    epochs = list(quantized_epochs(run, model, images))
    predictions = [epoch[3] for epoch in epochs] + [logits.argmax(dim=1)]
    num_classes = len(dataset.classes)
    confusion = [utils.confusion_matrix(labels, p, num_classes) for p in predictions]
    x = utils.normalize(F.pad(images[samples[::5]], [2] * 4), run["mean"], run["std"])
    description = {"classes": dataset.classes, "object_size": dataset.object_size}
    description |= {"centered_by_mass": dataset.centered_by_mass, "samples": len(samples)}
    description |= {"mean": run["mean"], "std": run["std"], "layers": describe_layers(layers, x)}
    description["epochs"] = [epoch[0] for epoch in epochs] + [run["epoch"]]
    arrays = {
        "weights": concatenate(tensors_of(layers)),
        "snapshots": concatenate(tensor for epoch in epochs for tensor in epoch[2]).to(torch.int8),
        "scales": concatenate(epoch[1] for epoch in epochs),
        "confusion": torch.stack(confusion).int(),
        "images": images[shown],
        "classes": torch.stack([labels, *predictions])[:, shown].to(torch.uint8),  # truth first
        "logits": logits[shown],
    }
    return description, arrays


def describe_layers(layers, x):
    """List the layers as dicts, with the range of their values for the inputs `x`."""
    descriptions = []
    for layer in layers:
        operations = []
        for operation in layer.operations:
            x = operation(x)
            if operation.op not in RESHAPES:
                shapes = {name: tensor.shape for name, tensor in operation.tensors.items()}
                attributes = {"attributes": operation.attributes, "tensors": shapes}
                operations.append({"op": operation.op} | attributes)
        margin = 0.005 if descriptions else 0.0  # a few values may lie outside
        low, high = x.flatten().float().quantile(torch.tensor([margin, 1 - margin])).tolist()
        description = {"name": layer.name, "operations": operations}
        description |= {"input": layer.input_shape, "output": layer.output.shape}
        description["range"] = [low, high] if low < high else [low - 1, low + 1]
        descriptions.append(description)
    return descriptions


def quantized_epochs(run, model, images):
    """Quantize the snapshots before the run's own weights to 8 bits, and classify with them.

    Yields:
        epoch, int; scales of the tensors, float; their weights, -127 to 127, as a list of float
        tensors; predicted classes of `images`, int64, N.
    """
    for snapshot in run["snapshots"]:
        if snapshot["epoch"] < run["epoch"]:
            earlier = copy.deepcopy(model)
            earlier.load_state_dict(snapshot["weights"], strict=False)  # no integer buffers
            tensors = tensors_of(trace(earlier))
            scales = torch.tensor([max(t.abs().max().item(), 1e-30) / 127 for t in tensors])
            integers = [(tensor / scale).round() for tensor, scale in zip(tensors, scales)]
            for tensor, integer, scale in zip(tensors, integers, scales):
                tensor.copy_(scale * integer)  # changes `earlier`
            logits = utils.predict(earlier, images, run["mean"], run["std"])
            yield snapshot["epoch"], scales, integers, logits.argmax(dim=1)


def tensors_of(layers):
    """Return the tensors of all operations, in order."""
    return [t for layer in layers for op in layer.operations for t in op.tensors.values()]


def concatenate(tensors):
    """Return all values of the tensors, float, of which there may be none."""
    return torch.cat([torch.empty(0), *(tensor.flatten() for tensor in tensors)])


def main(argv=None):
    parser = utils.Parser("Build images/lenet5.html with the pretrained networks.")
    text = "keep the data of the page, and insert the sources in images/page"
    parser.add_argument("--script-only", action="store_true", help=text)
    datasets = [] if parser.parse_args(argv).script_only else ["MNIST", "FashionMNIST"]
    networks = {}
    for dataset in datasets:
        path = utils.ROOT / "checkpoints" / f"lenet5-{dataset.lower()}.pt"
        run = utils.load_checkpoint(path)
        model = LeNet(len(utils.DATASETS[dataset].classes))
        utils.load_weights(path, run, model)
        images, labels = utils.load_images(dataset, utils.ROOT / "data", "test")
        logits = utils.predict(model, images, run["mean"], run["std"])
        networks[dataset] = describe_network(run, model, images, labels, logits)
    write(networks, PAGE)
    print(f"Page: {utils.shown(PAGE)}")


if __name__ == "__main__":
    utils.run_script(main)
