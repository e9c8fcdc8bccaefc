"""Build lenet5.html, a page that shows all layers of a network for an image that you draw.

python images/page.py    the page in this repository, with the pretrained networks
"""

import copy
import json
import re
import sys
from base64 import b64encode
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch

import utils
from images.trace import RESHAPES, Unsupported, trace
from model import LeNet

PAGE = utils.ROOT / "images" / "lenet5.html"  # also the template of all other pages


def write(networks, path):
    """Write a copy of lenet5.html that contains `networks`, and its own for all other datasets.

    `networks` is a dict from dataset names to the results of `describe_network`.
    """
    text = PAGE.read_text(encoding="utf-8")
    head, data, tail = re.split(r"(?<=id=\"networks\">)(.*?)(?=</script>)", text, maxsplit=1)
    others = {name: value for name, value in json.loads(data).items() if name not in networks}
    try:
        data = json.dumps(networks | others, allow_nan=False)
    except ValueError as error:
        raise Unsupported("it has values that are infinite or NaN") from error
    data = data.replace("</", "<\\/")  # "</script>" in a name would end the script
    utils.write_file(path, f"{head}{data}{tail}".encode())


def describe_network(run, model, images, labels, logits):
    """Describe a network for the page, as a dict of plain values.

    Args:
        model: on the CPU, with the weights of `run`.
        images: the test split, uint8, N x 28 x 28; labels: int64, N; logits: float, N x classes.
    """
    dataset = utils.DATASETS[run["dataset"]]
    layers = trace(model)
    samples = torch.cat([(labels == label).nonzero()[:10, 0] for label in labels.unique()])
    num_correct = (logits.argmax(dim=1) == labels).sum()
    about = f"{num_correct:,} of {len(labels):,} test images correct"
    return {
        "classes": dataset.classes,
        "mean": run["mean"],
        "std": run["std"],
        "box": dataset.object_size,
        "by_mass": dataset.centered_by_mass,
        "about": f"Run {run['name']}, epoch {run['epoch']}: {about}",
        "layers": [describe_layer(layer) for layer in layers],
        "weights": encode(tensors_of(layers)),
        "history": describe_history(run, model),
        "samples": encode([images[samples]]),
        "labels": labels[samples].tolist(),
        "logits": encode([logits[samples]]),
    }


def describe_layer(layer):
    operations = [
        {
            "kind": operation.op,
            "numbers": operation.attributes,
            "tensors": {name: tensor.shape for name, tensor in operation.tensors.items()},
        }
        for operation in layer.operations
        if operation.op not in RESHAPES
    ]
    shapes = {"input": layer.input_shape, "output": layer.output.shape}
    return {"name": layer.name, "operations": operations} | shapes


def describe_history(run, model):
    """List the snapshots as dicts: their epoch, accuracy and weights quantized to 8 bits."""
    split, name = ("val", "validation") if run["counts"][1] else ("train", "training")
    epochs = []
    for snapshot in run["snapshots"]:
        if snapshot["epoch"] < run["epoch"]:
            earlier = copy.deepcopy(model)
            earlier.load_state_dict(snapshot["weights"], strict=False)  # no integer buffers
            tensors = tensors_of(trace(earlier))
            scales = [max(t.abs().max().item(), 1e-30) / 127 for t in tensors]
            weights = encode([(t / s).round().to(torch.int8) for t, s in zip(tensors, scales)])
            epochs.append({"epoch": snapshot["epoch"], "scales": scales, "weights": weights})
    epochs.append({"epoch": run["epoch"]})  # its weights are those of the network
    for entry in epochs:
        if entry["epoch"] > 0:
            row = run["history"][entry["epoch"] - 1]
            entry |= {"accuracy": row[f"{split}_accuracy"], "of": name}
    return epochs


def tensors_of(layers):
    """Return the tensors of all operations, float, in order."""
    operations = [operation for layer in layers for operation in layer.operations]
    return [t.float() for operation in operations for t in operation.tensors.values()]


def encode(tensors):
    """Encode the concatenated bytes of tensors as base64 text."""
    return b64encode(b"".join(t.contiguous().numpy().tobytes() for t in tensors)).decode()


def main(argv=None):
    utils.Parser("Build images/lenet5.html with the pretrained networks.").parse_args(argv)
    networks = {}
    for dataset in ("FashionMNIST", "MNIST"):
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
