"""Evaluate a trained LeNet-5 on the full test set, or classify your own pictures.

python test.py                            the newest run, or else the pretrained weights
python test.py --dataset MNIST            the newest run on MNIST
python test.py --image shoe.jpg bag.png   your own pictures
"""

import math

import utils  # must come first: it sets an environment variable for torch
import torch
import torch.nn.functional as F

from images import features, page, photos, plots
from images.trace import Unsupported
from model import LeNet
from utils import DATASETS, Error, output_path, shown


def parse_args(argv):
    parser = utils.Parser("Evaluate a trained LeNet-5 on the test set, or on your own pictures.")
    add = parser.add_argument
    text = "the newest run trained on this dataset, or its pretrained weights; auto: any dataset"
    add("--dataset", choices=("auto", *DATASETS), default="auto", help=text)
    parser.add_shared_options()
    add("--checkpoint", type=utils.expand_path, help="evaluate the weights in this file instead")
    text = "seed of the random sample of 64 test images"
    add("--seed", type=utils.number_type(int, 0), default=0, help=text)
    text = "classify these pictures, or those in these directories, instead of the test set"
    add("--image", type=utils.expand_path, nargs="+", action="extend", help=text)
    return parser.parse_args(argv)


def find_checkpoint(args):
    """Return the path and contents of the checkpoint that the options select.

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
    note = ", trained on the validation split, too" if run["options"]["full"] else ""
    print(f"Weights: {shown(path)}, epoch {run['epoch']} of a run on {run['dataset']}{note}")
    if args.image:
        photos.classify(args, run, model)
        return
    images, labels = utils.load_images(run["dataset"], args.data_dir, "test")
    logits = utils.predict(model, images.to(device), mean=run["mean"], std=run["std"]).cpu()
    sample = torch.randperm(len(labels), generator=torch.Generator().manual_seed(args.seed))[:64]
    confusion = utils.confusion_matrix(labels, logits.argmax(dim=1), num_classes)
    print_report(run, labels, logits, confusion, sample)
    directory = output_path(args, run, "predict.png").parent
    plots.draw_predictions(run, images, labels, logits, sample, directory)  # and mistakes.png
    plots.draw_confusion(run, confusion, directory / "confusion.png")
    print(f"Pictures: {shown(directory)}")
    model.cpu()  # features and page need it there
    try:
        features.draw(run, model, images, labels, sample[0].item(), directory / "features.png")
        network = page.describe_network(run, model, images, labels, logits)
        page.write({run["dataset"]: network}, directory / "lenet5.html")
        print(f"Page:     {shown(directory / 'lenet5.html')}: open it in a browser and draw")
    except Unsupported as error:
        for name in ("features.png", "lenet5.html"):  # may show another network
            (directory / name).unlink(missing_ok=True)
        print(f"Page:     not written, because this network cannot be shown: {error}")


def print_report(run, labels, logits, confusion, sample):
    """Print the loss, and the accuracy on all images, by class, and on those in `sample`.

    Args:
        labels: int64, N; logits: float, N x classes; sample: indices of images, int64.
        confusion: the confusion matrix, as `utils.confusion_matrix` returns it.
    """
    dataset, classes = run["dataset"], DATASETS[run["dataset"]].classes
    correct = logits.argmax(dim=1) == labels
    count, num_correct = len(labels), correct.sum().item()
    low, high = wilson_interval(num_correct, count)
    interval = f"95% CI {100 * low:.2f}-{100 * high:.2f}"
    accuracy = f"{num_correct / count:.2%} ({num_correct}/{count}, {interval})"
    print(f"Test accuracy on {dataset}: {accuracy}")
    print(f"Test loss on {dataset}: {F.cross_entropy(logits, labels):.4f} ({count:,} images)\n")

    print(f"{'True class':<13}{'Accuracy':>18}   Most often confused with")
    for label, row in enumerate(confusion):
        num_correct, total = row[label].item(), row.sum().item()
        errors = row.index_fill(0, torch.tensor(label), 0)
        accuracy = f"{num_correct / max(total, 1):.1%} ({num_correct}/{total})"
        other = f"{classes[errors.argmax()]} ({errors.max()})" if errors.any() else "-"
        print(f"{classes[label]:<13}{accuracy:>18}   {other}")

    num_correct, size = correct[sample].sum().item(), len(sample)
    accuracy = f"{num_correct / size:.1%} ({num_correct}/{size})"
    print(f"\nAccuracy on {size} random test images: {accuracy}")


def wilson_interval(num_correct, count, z=1.96):
    """Return the bounds (0 to 1) of the 95% confidence interval of a proportion.

    Source: Wilson, "Probable inference, the law of succession, and statistical inference", 1927.
    """
    p = num_correct / count
    center = p + z**2 / (2 * count)
    margin = z * math.sqrt(p * (1 - p) / count + z**2 / (4 * count**2))
    return (center - margin) / (1 + z**2 / count), (center + margin) / (1 + z**2 / count)


if __name__ == "__main__":
    utils.run_script(main)
