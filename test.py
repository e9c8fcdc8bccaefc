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
from matplotlib.figure import Figure
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
    add, text = parser.add_argument, "classify these pictures instead of the test set"
    add("--checkpoint", type=utils.path, help="take the weights in this file instead")
    add("--seed", type=utils.number(int, 0), default=0, help="of the 64 random images (default: 0)")
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
        report_test_set(args, checkpoint, model, images, labels, logits)
    return 0


def report_test_set(args, checkpoint, model, images, labels, logits):
    """Print loss and accuracy, in all, per class and on 64 images, and draw the pictures."""
    dataset, classes = checkpoint["dataset"], checkpoint["classes"]
    predicted = logits.argmax(dim=1)
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

    sample = torch.randperm(total, generator=torch.Generator().manual_seed(args.seed))[:64]
    hits = right[sample].sum().item()
    print(f"\nAccuracy on 64 random test images: {hits / 64:.1%} ({hits}/64)")
    folder = args.image_dir / dataset
    draw_test_set(checkpoint, images, labels, logits, sample, folder)
    utils.plot_confusion(confusion, classes, accuracy, folder / "confusion.png")
    first, path = sample[0].item(), folder / "features.png"
    plot_features(model.cpu(), images, labels, first, checkpoint, path)
    print(f"Pictures: {utils.relative(folder)}")
    page = folder / "lenet5.html"
    write_page(checkpoint, f"{correct} of {total:,} test images right", images, labels, page)
    print(f"Page:     {utils.relative(page)}: open it in a browser, draw, and see every layer")


def draw_test_set(checkpoint, images, labels, logits, sample, folder):
    """Draw the images with the indices `sample`, and the surest mistakes if there are any."""
    dataset, classes = checkpoint["dataset"], checkpoint["classes"]
    confidence, predicted = logits.softmax(dim=1).max(dim=1)
    right = predicted == labels

    def draw(indices, title, name, percent=False):
        captions = []
        for i in indices.tolist():
            mark = "\N{CHECK MARK}" if right[i] else "\N{BALLOT X}"
            share = f" ({confidence[i]:.1%})" if percent else ""
            truth = "" if right[i] else f"\nis {classes[labels[i]]}"
            captions.append(f"{mark} {classes[predicted[i]]}{share}{truth}")
        title = f"LeNet-5 on {dataset}: {title}"
        utils.plot_grid(images[indices], captions, title, folder / name, right[indices])

    draw(sample, f"64 random test images, {right[sample].sum()} of them right", "predict.png")
    wrong = (~right).nonzero().squeeze(1)
    worst = wrong[confidence[wrong].argsort(descending=True)][:64]
    which = f"all {len(wrong)}" if len(wrong) <= 64 else f"64 of {len(wrong)}"
    if len(worst):
        draw(worst, f"{which} wrong test images, the surest first", "mistakes.png", percent=True)


def plot_features(model, images, labels, i, checkpoint, path):
    """Draw the output of each layer for test image `i`, and the kernels of C1."""
    outputs, classes = [], checkpoint["classes"]
    hooks = [
        layer.register_forward_hook(lambda *call: outputs.append(call[2][0]))
        for layer in (model.sig, model.s2, model.s4)
    ]
    image, mean, std = images[i : i + 1], checkpoint["mean"], checkpoint["std"]
    shares = 100 * utils.predict(model, image, mean, std).softmax(dim=1)[0]
    for hook in hooks:
        hook.remove()
    c1, s2, c3, s4, c5, f6 = outputs
    kernels = model.c1.weight.detach()[:, 0]
    figure = Figure(figsize=(13, 7.2), layout="constrained")
    axes = figure.subplots(1, 9, width_ratios=(2.8, 1.3, 1.3, 1.3, 2, 2, 1.6, 1.2, 3))
    for ax, name, maps, columns in (
        (axes[0], "Input\n32x32", F.pad(image, [2] * 4) / 255, 1),
        (axes[1], "6 kernels\n5x5", (kernels / kernels.abs().max() + 1) / 2, 1),
        (axes[2], "C1: 6 maps\n28x28", c1, 1),
        (axes[3], "S2: means\n14x14", s2, 1),
        (axes[4], "C3: 16 maps\n10x10", c3, 2),
        (axes[5], "S4: means\n5x5", s4, 2),
        (axes[6], "C5\n120 units", c5, 6),
        (axes[7], "F6\n84 units", f6.view(84, 1, 1), 4),
    ):
        gap = min(1, maps.shape[1] - 1)  # none between units
        rows = F.pad(maps, [0, gap, 0, gap], value=math.nan).split(columns)
        tiles = torch.cat([torch.cat([*row], dim=1) for row in rows])
        ax.imshow(tiles.numpy(), cmap="RdBu_r" if ax is axes[1] else "gray", vmin=0, vmax=1)
        ax.set_title(name, fontsize=11)
        ax.axis("off")
    axes[8].barh(classes, shares.tolist(), color=utils.BLUE)
    axes[8].set(title="Output: softmax of\n10 units (%)", xlim=(0, 100), ylim=(9.5, -0.5))
    what = f"test image {i} of {checkpoint['dataset']}, of class {classes[labels[i]]},"
    figure.suptitle(f"LeNet-5: {what} on its way through the layers", fontsize=14)
    figure.supxlabel("Black: 0, white: 1. Kernels: red is above 0, blue is below 0", size=11)
    utils.save_figure(figure, path)


def write_page(checkpoint, about, images, labels, path):
    """Write images/lenet5.html to `path` with the weights of `checkpoint`.

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


def report_pictures(args, checkpoint, images, logits):
    """Print the three likeliest classes of each of the user's pictures, and draw what was seen."""
    dataset, classes = checkpoint["dataset"], checkpoint["classes"]
    captions = []
    for file, row in zip(args.image, logits.softmax(dim=1)):
        best = [f"{classes[i]} ({p:.1%})" for p, i in zip(*row.topk(3))]
        print(f"{file}: {', '.join(best)}")
        name = file.name.encode(errors="replace").decode()  # names are bytes, of any encoding
        name = name if len(name) <= 28 else f"{name[:13]}…{name[-14:]}"
        captions.append(f"{name}\n{best[0]}")
    path = args.image_dir / "own.png"
    pairs = torch.stack([beside(file, image) for file, image in zip(args.image[:64], images)])
    utils.plot_grid(pairs, captions, f"What LeNet-5, trained on {dataset}, sees", path)
    which = "" if len(images) <= 64 else ", the first 64"
    print(f"Picture: {utils.relative(path)}{which}")


def beside(file, image):
    """Return the picture in `file` beside `image` (uint8, 28 x 28) of it, as uint8, 128 x 264."""
    picture = Image.fromarray(read_grey(file).byte().numpy())
    picture = torch.from_numpy(np.array(ImageOps.pad(picture, (128, 128), color=255)))
    seen = F.pad(image, [2] * 4).repeat_interleave(4, dim=0).repeat_interleave(4, dim=1)
    return torch.cat([picture, torch.full((128, 8), 255, dtype=torch.uint8), seen], dim=1)


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
        Error: the file is no picture that can be read, or nothing is to be seen in it.
    """
    x = (find_article if dataset == "FashionMNIST" else find_digit)(read_grey(path))
    if not x.any():
        raise utils.Error(
            f"{utils.relative(path)} shows nothing that stands out from its background: take it "
            "closer, in even light, on a plain background"
        )
    rows, columns = ((x > 0.1).any(dim=dim).nonzero() for dim in (1, 0))
    x = x[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    scale = BOX[dataset] / max(x.shape)
    height, width = (max(1, round(side * scale)) for side in x.shape)
    x = np.array(Image.fromarray(x.numpy()).resize((width, height), Image.Resampling.BILINEAR))
    x = (255 * x / x.max()).round()

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


def border(x):
    """Return the outermost pixels of x (H x W) in one row."""
    return torch.cat([x[0], x[-1], x[:, 0], x[:, -1]])


def dark_on_bright(grey):
    """Return grey levels (float, H x W), turned round if the background is the darker part."""
    low, high = grey.min(), grey.max()
    return low + high - grey if border(grey).median() < (low + high) / 2 else grey


def find_article(grey):
    """Return the article in a picture (float, H x W) as floats, 0 to 1, on a black background.

    The background is a plane through the levels of the border, as light comes from one side.
    """
    down, across = (torch.linspace(-1, 1, side) for side in grey.shape)
    planes = [torch.ones_like(grey), *torch.meshgrid(down, across, indexing="ij")]
    x = -dark_on_bright(grey)
    levels, kept = border(x), slice(None)
    sides = torch.stack([border(plane) for plane in planes], dim=1)
    for _ in range(10):  # only the half that fits best counts: the article may touch the border
        fit = torch.linalg.pinv(sides[kept]) @ levels[kept]
        grain = (levels - sides @ fit).abs()
        kept = grain <= grain.median()
    x = x - sum(plane * share for plane, share in zip(planes, fit)) - 4 * grain.median()
    return x.clamp(min=0) / x.max() if x.max() > 0.5 else torch.zeros_like(x)


def find_digit(grey):
    """Return the strokes in a picture of a digit (float, H x W) as floats, 0 to 1, on black.

    Uneven light, shadows, the table beside the paper, rulings and grain are left out.
    """
    x = dark_on_bright(grey)
    paper = -opening(-x, min(101, max(x.shape) | 1))  # strokes, narrower, are filled in
    x = (paper - x) / paper.clamp(min=1)
    threshold = x.max() / 2
    if threshold == 0:
        return x
    for _ in range(20):  # Ridler and Calvard, "Picture thresholding using an iterative ...", 1978
        threshold = (x[x > threshold].mean() + x[x <= threshold].mean()) / 2
    core = digit = main_parts((x > threshold).float())
    thickness = 0
    while core.any():
        core, thickness = -dilate(-core, 3), thickness + 2
    digit = opening(digit, thickness // 4 | 1)  # without rulings that cross it
    level = x[x <= threshold].median()  # of the paper, beyond which its grain goes by so much:
    grain = 4 * (x[x <= threshold] - level).abs().median()
    x = x - level - grain
    ink = x[digit > 0].quantile(0.75)
    x = (x / ink).clamp(0, 1) * dilate(digit, max(x.shape) // 200 * 2 + 5)  # with soft edges
    return x if ink > grain / 2 else torch.zeros_like(x)


def dilate(x, size):
    """Return the maximum of x (float, H x W) over squares of `size` (odd) pixels."""
    x = F.max_pool2d(x[None], (1, size), stride=1, padding=(0, size // 2))
    return F.max_pool2d(x, (size, 1), stride=1, padding=(size // 2, 0))[0]


def opening(x, size):
    """Return x (float, H x W) without what is bright and narrower than `size` (odd) pixels."""
    return dilate(-dilate(-x, size), size)


def main_parts(mask):
    """Return those connected parts of a mask (float, 0 or 1, H x W) that may belong to a digit.

    Out are parts that cover most of a side, if the others are no mere specks, and those that have
    less than a tenth of the largest one's area.
    """
    part, before = torch.arange(1.0, mask.numel() + 1).view(mask.shape) * mask, mask
    # Each pixel takes the largest number nearby, then that pixel's own: parts fill in few rounds.
    while not part.equal(before):
        before = part
        part = dilate(part, 3) * mask
        part = F.pad(part.flatten(), (1, 0))[part.long()]
    _, part, area = part.unique(return_inverse=True, return_counts=True)
    area[0] = 0  # what is not in the mask
    inside = area.clone()
    for side in (part[0], part[-1], part[:, 0], part[:, -1]):
        most = side.mode().values
        if (side == most).float().mean() > 0.5:
            inside[most] = 0
    area = inside if inside.max() > area.max() / 100 else area
    return (area > area.max() / 10)[part].float()


def read_grey(path):
    """Read a picture as grey levels (float, 0 to 255, H x W), the right way up, H and W <= 512."""
    shown = utils.relative(path)
    warnings.filterwarnings("ignore", module="PIL")  # of sizes and EXIF: we have PIXEL_LIMIT
    try:
        with Image.open(path, formats=FORMATS) as picture:
            if picture.width * picture.height > PIXEL_LIMIT:
                raise ValueError(f"it is too large: {picture.width}x{picture.height} pixels")
            if getattr(picture, "is_animated", False) and picture.format != "MPO":
                raise ValueError("it is animated: save the one picture that you mean")
            deep = picture.mode.startswith(("I", "F"))  # 16 bits and more
            if picture.mode not in ("RGB", "RGBA", "L"):  # which are scaled first, to save memory
                picture = picture.convert("F" if deep else "RGBA")
            picture.thumbnail((512, 512))
            picture = ImageOps.exif_transpose(picture).convert("F" if deep else "RGBA")
    except FileNotFoundError:
        raise utils.Error(f"{shown} does not exist") from None
    except Exception as error:  # a damaged file can fail in any way
        raise utils.Error(f"{shown} is no picture that can be read: {error}") from error

    if picture.mode == "F":
        grey = torch.from_numpy(np.array(picture, dtype=float))
        if not grey.isfinite().all():
            raise utils.Error(f"{shown} has pixels that are no numbers: save it anew")
        low, high = grey.min(), grey.max()
        return (255 * (grey - low) / (high - low).clamp(min=1e-30)).float()
    grey = torch.from_numpy(np.array(picture.convert("RGB").convert("L"))).float()
    alpha = torch.from_numpy(np.array(picture.getchannel("A"))) / 255
    # What is transparent becomes white behind a dark object and black behind a bright one.
    mean = (grey * alpha).sum() / alpha.sum().clamp(min=1)
    return alpha * grey + (1 - alpha) * (255 if mean < 128 else 0)


if __name__ == "__main__":
    utils.run(main)
