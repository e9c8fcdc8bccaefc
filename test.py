"""Evaluate a trained LeNet-5 on the full test set, or classify your own pictures.

python test.py                            the newest run, or else the weights in this repository
python test.py --dataset MNIST            the newest run on MNIST
python test.py --image shoe.jpg bag.png   your own pictures
"""

import math

import utils  # before torch, whose environment it sets
import torch
import torch.nn.functional as F

from images import features, page, photos, plots
from images.trace import Unsupported
from model import LeNet
from utils import DATASETS, Error, output_path, shown


def parse_args(argv):
    parser = utils.Parser("Evaluate a trained LeNet-5 on the test set, or on your own pictures.")
    add = parser.add_argument
    text = "evaluate the newest run on this dataset, or else its pretrained weights"
    add("--dataset", choices=("auto", *DATASETS), default="auto", help=text)
    parser.add_shared_options()
    add("--checkpoint", type=utils.expand_path, help="evaluate the weights in this file instead")
    add("--seed", type=utils.number(int, 0), default=0, help="seed for choosing 64 images")
    text = "classify these pictures, or all in these directories, instead of the test set"
    add("--image", type=utils.expand_path, nargs="+", action="extend", help=text)
    return parser.parse_args(argv)


def find_checkpoint(args):
    """Return path and contents of the checkpoint that the options select.

    It is the one given by --checkpoint, or best.pt of the newest run, or the pretrained one.
    """
    path = args.checkpoint
    if not path:
        try:
            return utils.newest_checkpoint(args)
        except utils.Unavailable:
            dataset = "FashionMNIST" if args.dataset == "auto" else args.dataset
            path = utils.ROOT / "checkpoints" / f"lenet5-{dataset.lower()}.pt"
            if args.name or not path.exists():
                raise
    run = utils.load_checkpoint(path)
    run["name"] = args.name or run["name"]
    if args.dataset not in ("auto", run["dataset"]):
        raise Error(f"{shown(path)} was trained on {run['dataset']}, not on {args.dataset}")
    return path, run


def main(argv=None):
    args = parse_args(argv)
    path, run = find_checkpoint(args)
    device = utils.choose_device(args.device)
    num_classes = len(DATASETS[run["dataset"]].classes)
    model = utils.to_device(LeNet(num_classes), num_classes, device)
    utils.load_weights(path, run, model)
    full = ", trained on all images" if run["options"]["full"] else ""
    print(f"Weights: {shown(path)}, epoch {run['epoch']} of a run on {run['dataset']}{full}")
    if args.image:
        photos.classify(args, run, model)
        return
    images, labels = utils.load_images(run["dataset"], args.data_dir, "test")
    outputs = utils.predict(model, images.to(device), run["mean"], run["std"]).cpu()
    sample = torch.randperm(len(labels), generator=torch.Generator().manual_seed(args.seed))[:64]
    confusion = print_report(run, labels, outputs, sample)
    directory = output_path(args, run, "predict.png").parent
    plots.draw_predictions(run, images, labels, outputs, sample, directory)
    plots.draw_confusion(run, confusion, directory / "confusion.png")
    print(f"Pictures: {shown(directory)}")
    model.cpu()  # one image at a time from here on
    try:
        features.draw(run, model, images, labels, sample[0].item(), directory / "features.png")
        network = page.describe_network(run, model, images, labels, outputs)
        page.write({run["dataset"]: network}, directory / "lenet5.html")
        print(f"Page:     {shown(directory / 'lenet5.html')}: open it in a browser and draw")
    except Unsupported as error:
        print(f"Page:     none, and no features.png, because it cannot show this network: {error}")


def print_report(run, labels, outputs, sample):
    """Print loss and accuracy: on all images, by class, and on the images in `sample`.

    Args:
        labels: int64, N; outputs: of the network, float, N x classes; sample: indices, int64.

    Returns:
        the confusion matrix, see `confusion_matrix`.
    """
    dataset, classes = run["dataset"], DATASETS[run["dataset"]].classes
    predicted = outputs.argmax(dim=1)
    correct = predicted == labels
    hits, count = correct.sum().item(), len(labels)
    low, high = wilson_interval(hits, count)
    interval = f"95% CI {100 * low:.2f}-{100 * high:.2f}"
    print(f"Test accuracy on {dataset}: {hits / count:.2%} ({hits}/{count}, {interval})")
    print(f"Test loss on {dataset}: {F.cross_entropy(outputs, labels):.4f} ({count})\n")

    confusion = confusion_matrix(labels, predicted, len(classes))
    print(f"{'True class':<13}{'Accuracy':>18}   Most often confused with")
    for label, row in enumerate(confusion):
        hits, count = row[label].item(), row.sum().item()
        errors = row.index_fill(0, torch.tensor(label), 0)
        accuracy = f"{hits / max(count, 1):.1%} ({hits}/{count})"
        other = f"{classes[errors.argmax()]} ({errors.max()})" if errors.any() else "-"
        print(f"{classes[label]:<13}{accuracy:>18}   {other}")

    hits, count = correct[sample].sum().item(), len(sample)
    print(f"\nAccuracy on {count} random test images: {hits / count:.1%} ({hits}/{count})")
    return confusion


def wilson_interval(hits, count, z=1.96):
    """Return the bounds (0 to 1) of the 95% confidence interval of a proportion.

    Source: Wilson, "Probable inference, the law of succession, and statistical inference", 1927.
    """
    p = hits / count
    center = p + z**2 / (2 * count)
    half = z * math.sqrt(p * (1 - p) / count + z**2 / (4 * count**2))
    return (center - half) / (1 + z**2 / count), (center + half) / (1 + z**2 / count)


def confusion_matrix(labels, predicted, num_classes):
    """Count how often each true class (row) was predicted as each class (column); int64."""
    pairs = labels * num_classes + predicted
    return pairs.bincount(minlength=num_classes**2).view(num_classes, num_classes)


if __name__ == "__main__":
    utils.run_script(main)
