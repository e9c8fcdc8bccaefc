"""Judge a trained LeNet-5 on the full test set, or on your own pictures.

python test.py                            the newest run, or the weights that come along
python test.py --dataset MNIST            the newest run on MNIST
python test.py --image shoe.jpg bag.png   your own pictures
"""

import json
import math
import re
import warnings
from base64 import b64encode

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

import utils
from model import LeNet

PIXEL_LIMIT = 100_000_000  # beyond any camera; a small file can claim to hold far more
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM")  # none that runs a program
BOX = {"FashionMNIST": 28, "MNIST": 20, "Glyphs": 20}  # longer side of the object, in pixels


def parse_args(argv):
    parser = utils.Parser(
        "Judge a trained LeNet-5 on the full test set, or on your own pictures.",
        dataset="whose newest weights to take; auto: the newest of all, or else the shipped ones",
    )
    add, text = parser.add_argument, "for the choice of 64 random images (default: 0)"
    add("--checkpoint", type=utils.path, help="take the weights in this file instead")
    add("--seed", type=utils.number(int, 0), default=0, help=text)
    text = "classify these pictures instead of the test set"
    add("--image", type=utils.path, nargs="+", action="extend", help=text)
    return parser.parse_args(argv)


def find_checkpoint(args):
    """Return the checkpoint that the options ask for: named, of the newest run, or shipped."""
    if args.checkpoint:
        return args.checkpoint
    try:
        return utils.newest(args.checkpoint_dir, args.dataset, "best.pt")
    except utils.Error:
        dataset = "FashionMNIST" if args.dataset == "auto" else args.dataset
        shipped = utils.ROOT / "checkpoints" / f"lenet5-{dataset.lower()}.pt"
        if args.checkpoint_dir.resolve() != shipped.parent or not shipped.exists():
            raise
        return shipped


def main(argv=None):
    args = parse_args(argv)
    path = find_checkpoint(args)
    checkpoint = utils.load_checkpoint(path)
    dataset = checkpoint["dataset"]
    if args.dataset not in ("auto", dataset):
        raise utils.Error(f"{utils.relative(path)} was trained on {dataset}, not {args.dataset}")
    device = utils.choose_device(args.device)
    model = LeNet(num_classes=len(checkpoint["classes"]))
    utils.restore(model, checkpoint, path)
    model.to(device, memory_format=torch.channels_last)

    if args.image:
        images = torch.stack([load_picture(file, dataset) for file in args.image])
    else:
        images, labels = utils.load_images(dataset, args.data_dir, "test")
    logits = utils.predict(model, images.to(device), checkpoint["mean"], checkpoint["std"]).cpu()

    run = f"epoch {checkpoint['epoch']} of a run on {dataset}"
    run += ", validation images included" if checkpoint["options"].get("full") else ""
    print(f"Weights: {utils.relative(path)}, {run}")
    if args.image:
        report_pictures(args, checkpoint, images, logits)
    else:
        report_test_set(args, checkpoint, images, labels, logits)
    return 0


def report_test_set(args, checkpoint, images, labels, logits):
    """Print loss and accuracy, in all, per class and on 64 images, and draw the pictures."""
    dataset, classes = checkpoint["dataset"], checkpoint["classes"]
    folder = args.image_dir / dataset
    confidence, predicted = logits.softmax(dim=1).max(dim=1)
    right = predicted == labels
    correct, total = right.sum().item(), len(labels)
    low, high = wilson_interval(correct, total)
    accuracy = (
        f"Test accuracy on {dataset}: {correct / total:.2%} "
        f"({correct}/{total}, 95% CI {100 * low:.2f}-{100 * high:.2f})"
    )
    print(f"{accuracy}\nTest loss on {dataset}: {F.cross_entropy(logits, labels):.4f} ({total})\n")

    confusion = confusion_matrix(labels, predicted, len(classes))
    print(f"{'True class':<13}{'Accuracy':>18}   Most often taken for")
    for label, row in enumerate(confusion):
        hits, count = row[label].item(), row.sum().item()
        row = row.index_fill(0, torch.tensor(label), 0)  # the mistakes alone
        other = f"{classes[row.argmax()]} ({row.max()})" if row.any() else "-"
        print(f"{classes[label]:<13}{f'{hits / max(count, 1):.1%} ({hits}/{count})':>18}   {other}")

    def captions(indices, percent=False):
        for i in indices.tolist():
            share = f" ({confidence[i]:.1%})" if percent else ""
            if right[i]:
                yield f"\N{CHECK MARK} {classes[predicted[i]]}{share}"
            else:
                yield f"\N{BALLOT X} {classes[predicted[i]]}{share}\nis {classes[labels[i]]}"

    generator = torch.Generator().manual_seed(args.seed)
    sample = torch.randperm(total, generator=generator)[:64]
    hits = right[sample].sum().item()
    result = f"Accuracy on {len(sample)} random test images: {hits / len(sample):.1%}"
    print(f"\n{result} ({hits}/{len(sample)})")
    title = f"LeNet-5 on {dataset}: {len(sample)} random test images, {hits} of them right"
    path = folder / "predict.png"
    utils.plot_grid(images[sample], captions(sample), title, path, right[sample])

    utils.plot_confusion(confusion, classes, accuracy, folder / "confusion.png")

    wrong = (~right).nonzero().squeeze(1)
    worst = wrong[confidence[wrong].argsort(descending=True)][:64]
    which = f"all {len(wrong)}" if len(wrong) <= 64 else f"64 of {len(wrong)}"
    title = f"LeNet-5 on {dataset}: {which} wrong test images, the surest first"
    path = folder / "mistakes.png"
    if len(worst):
        utils.plot_grid(images[worst], captions(worst, True), title, path, right[worst])
    print(f"Pictures: predict.png, confusion.png and mistakes.png in {utils.relative(folder)}")
    about = f"{correct} of {total:,} test images right"
    page = write_page(checkpoint, about, images, labels, folder / "lenet5.html")
    print(
        f"Page:     {utils.relative(page)}, to draw on and to see every layer: open it in a browser"
    )


def write_page(checkpoint, about, images, labels, path):
    """Write images/lenet5.html to `path` with the weights of `checkpoint`, and return `path`.

    Args:
        about: what the page says of the weights.
        images, labels: of the test set; the first two images of each class can be clicked on.
    """

    def base64(tensor):
        return b64encode(tensor.contiguous().numpy().tobytes()).decode()

    page = (utils.ROOT / "images" / "lenet5.html").read_text(encoding="utf-8")
    head, networks, tail = re.split(r"(?<=id=\"networks\">)(.*?)(?=</script>)", page, maxsplit=1)
    samples = torch.cat([(labels == label).nonzero()[:2, 0] for label in labels.unique()])
    network = {
        "classes": checkpoint["classes"],
        "mean": checkpoint["mean"],
        "std": checkpoint["std"],
        "about": about,
        "weights": base64(torch.cat([w.flatten() for w in checkpoint["model"].values()])),
        "samples": base64(images[samples]),
        "labels": labels[samples].tolist(),
    }
    shipped = {k: v for k, v in json.loads(networks).items() if k != checkpoint["dataset"]}
    networks = json.dumps({checkpoint["dataset"]: network, **shipped})  # the judged one first
    utils.write_file(path, f"{head}{networks}{tail}".encode())
    return path


def report_pictures(args, checkpoint, images, logits):
    """Print the three likeliest classes of each of the user's pictures, and draw what was seen."""
    dataset, classes = checkpoint["dataset"], checkpoint["classes"]
    captions = []
    for file, row in zip(args.image, logits.softmax(dim=1)):
        best = [f"{classes[i]} ({p:.1%})" for p, i in zip(*row.topk(3))]
        print(f"{file}: {', '.join(best)}")
        name = file.name.encode(errors="replace").decode()  # names are bytes, of any encoding
        name = name if len(name) <= 18 else f"{name[:8]}…{name[-9:]}"
        captions.append(f"{name}\n{best[0]}")
    path = args.image_dir / "own.png"
    title = f"What LeNet-5, trained on {dataset}, sees"
    utils.plot_grid(F.pad(images[:64], [2] * 4), captions, title, path)
    which = "" if len(images) <= 64 else ", the first 64"
    print(f"Picture: {utils.relative(path)}{which}")


def wilson_interval(correct, total, z=1.96):
    """Return the bounds, from 0 to 1, of the 95% confidence interval of correct / total.

    Source: Wilson, "Probable inference, the law of succession, and statistical inference", 1927.
    """
    p, n = correct / total, total
    middle = p + z**2 / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return (middle - half) / (1 + z**2 / n), (middle + half) / (1 + z**2 / n)


def confusion_matrix(labels, predicted, num_classes):
    """Count how often each true class (row) was predicted as each class (column); int64."""
    pairs = labels * num_classes + predicted
    return pairs.bincount(minlength=num_classes**2).view(num_classes, num_classes)


def load_picture(path, dataset):
    """Read a picture of one object and make it look like an image of `dataset`.

    Grey, bright on black, cropped to the object and scaled as the data set's authors did: MNIST
    fits a digit into 20x20 pixels and centres its mass in 28x28 (LeCun et al. 1998, section III.A),
    FashionMNIST fits the article into 28x28 (Xiao et al. 2017, section 2).

    Returns:
        image (uint8, 28 x 28).

    Raises:
        Error: the file is no picture that can be read, or it is of one colour.
    """
    grey = read_grey(path)
    if not np.isfinite(grey).all():
        raise utils.Error(f"{utils.relative(path)} has pixels that are no numbers: save it anew")
    border = np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]])
    background = np.median(border)
    x = grey - background
    if background > (grey.max() + grey.min()) / 2:
        x = -x
    noise = 4 * np.median(np.abs(border - background))  # of the paper, the table, the wall
    x = (x - noise).clip(min=0)
    if x.max() <= 1e-3 * (1 + abs(background)):
        raise utils.Error(f"{utils.relative(path)} shows nothing: it is of one colour")
    x = (255 * x / x.max()).astype(np.uint8)

    rows, columns = ((x > 25).any(axis=axis).nonzero()[0] for axis in (1, 0))
    x = x[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    scale = BOX[dataset] / max(x.shape)
    height, width = (max(1, round(side * scale)) for side in x.shape)
    x = np.array(Image.fromarray(x).resize((width, height), Image.Resampling.BILINEAR), dtype=float)
    x = (255 * x / x.max()).round().astype(np.uint8)

    # MNIST's centres of mass lie on pixel 14 of 0 to 27, not on 13.5.
    middle = (height - 1) / 2, (width - 1) / 2
    if dataset == "MNIST":
        middle = [(np.indices(x.shape)[axis] * x).sum() / x.sum() for axis in (0, 1)]
    top, left = (
        int(np.clip(round(14 - m), 0, 28 - side)) for m, side in zip(middle, (height, width))
    )
    image = torch.zeros(28, 28, dtype=torch.uint8)
    image[top : top + height, left : left + width] = torch.from_numpy(x)
    return image


def read_grey(path):
    """Read a picture as grey levels (float, H x W), the right way up, at most 1024 pixels wide."""
    shown = utils.relative(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # we have PIXEL_LIMIT
            picture = Image.open(path, formats=FORMATS)
        with picture:
            if picture.width * picture.height > PIXEL_LIMIT:
                raise utils.Error(f"{shown} is too large: {picture.width}x{picture.height} pixels")
            if getattr(picture, "is_animated", False) and picture.format != "MPO":
                raise utils.Error(f"{shown} is animated: save the one picture that you mean")
            deep = picture.mode.startswith(("I", "F"))  # 16 bits and more
            if picture.mode not in ("RGB", "RGBA", "L"):  # which are scaled first, to save memory
                picture = picture.convert("F" if deep else "RGBA")
            picture.thumbnail((1024, 1024))
            picture = ImageOps.exif_transpose(picture).convert("F" if deep else "RGBA")
    except FileNotFoundError:
        raise utils.Error(f"{shown} does not exist") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise utils.Error(f"{shown} is no picture that can be read: {error}") from error

    if picture.mode == "F":
        return np.array(picture, dtype=float)
    grey = np.array(picture.convert("RGB").convert("L"), dtype=float)
    alpha = np.array(picture.getchannel("A"), dtype=float) / 255
    # What is transparent becomes white behind a dark object and black behind a bright one.
    mean = (grey * alpha).sum() / max(alpha.sum(), 1)
    return alpha * grey + (1 - alpha) * (255 if mean < 128 else 0)


if __name__ == "__main__":
    utils.run(main)
