"""Judge a trained LeNet-5 on the full test set, or on your own pictures.

python test.py                            the newest run, or the weights that come along
python test.py --dataset MNIST            the newest run on MNIST
python test.py --image shoe.jpg bag.png   your own pictures
"""

import glob
import json
import math
import os
import re
import sys
import warnings
from base64 import b64encode
from copy import deepcopy

import utils
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image, ImageOps, UnidentifiedImageError

from model import RESHAPES, LeNet, trace


def parse_args(argv):
    parser = utils.Parser("Judge a trained LeNet-5 on its full test set, or on your own pictures.")
    dataset = "whose newest weights to take; auto: the newest of all, or else the shipped ones"
    parser.add_options_of_a_run(dataset)
    add, path = parser.add_argument, utils.file_path
    add("--checkpoint", type=path, help="take the weights in this file instead")
    add("--seed", type=utils.number(int, 0), default=0, help="of the 64 random images")
    text = "classify these pictures, folders of pictures or patterns, instead of the test set"
    add("--image", type=path, nargs="+", action="extend", help=text)
    return parser.parse_args(argv)


def find_checkpoint(args):
    """Return path and contents of the checkpoint that the options ask for.

    It is the one that is named, or that of the newest run, or else the one that comes along.
    """
    path = args.checkpoint
    if not path:
        dataset = "FashionMNIST" if args.dataset == "auto" else args.dataset
        path = args.output_dir / "checkpoints" / f"lenet5-{dataset.lower()}.pt"
        try:
            return utils.newest(args, "best.pt")
        except utils.Unavailable:
            if args.name or not path.exists():
                raise
    checkpoint = utils.load_checkpoint(path)
    checkpoint["name"] = args.name or checkpoint["name"]
    if args.dataset not in ("auto", checkpoint["dataset"]):
        raise utils.Error(
            f"{utils.relative(path)} was trained on {checkpoint['dataset']}, not {args.dataset}"
        )
    return path, checkpoint


def main(argv=None):
    args = parse_args(argv)
    path, checkpoint = find_checkpoint(args)
    dataset, classes = checkpoint["dataset"], checkpoint["classes"]
    device = utils.choose_device(args.device)
    model = utils.prepare(LeNet(len(classes)), len(classes), device)
    utils.restore(path, checkpoint, model)

    which = f"epoch {checkpoint['epoch']} of a run on {dataset}"
    which += ", validation images included" if checkpoint["options"].get("full") else ""
    print(f"Weights: {utils.relative(path)}, {which}")
    if args.image:
        return report_pictures(args, checkpoint, model, device)
    images, labels = utils.load_images(dataset, args.data_dir, "test")
    logits = utils.predict(model, images.to(device), checkpoint["mean"], checkpoint["std"]).cpu()
    report_test_set(args, checkpoint, model, images, labels, logits)
    return 0


def report_test_set(args, run, model, images, labels, logits):
    """Print loss and accuracy, in all, per class and on 64 images, and draw the pictures."""
    dataset, classes = run["dataset"], run["classes"]
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
    print_classes(confusion, classes)
    sample = torch.randperm(total, generator=torch.Generator().manual_seed(args.seed))[:64]
    hits, size = right[sample].sum().item(), len(sample)
    print(f"\nAccuracy on {size} random test images: {hits / size:.1%} ({hits}/{size})")
    folder = utils.file_of(args, run, "predict.png").parent
    traced = trace(model)
    shares = traced.shares(logits)
    draw_test_set(run, images, labels, shares, sample, folder)
    utils.plot_confusion(confusion, classes, accuracy, folder / "confusion.png")
    i = sample[0].item()
    plot_features(run, model, images[i], labels[i], i, shares[i], folder / "features.png")
    print(f"Pictures: {utils.relative(folder)}")
    page = folder / "lenet5.html"
    if traced.problem:
        print(f"Page:     none, as it could not show this network: {traced.problem}")
        return
    write_page(run, model.cpu(), f"{correct} of {total:,} test images right", images, labels, page)
    print(f"Page:     {utils.relative(page)}: open it in a browser, draw, and see every layer")


def print_classes(confusion, classes):
    """Print the accuracy of each class, and what it is most often taken for."""
    print(f"{'True class':<13}{'Accuracy':>18}   Most often taken for")
    for label, row in enumerate(confusion):
        hits, count = row[label].item(), row.sum().item()
        row = row.index_fill(0, torch.tensor(label), 0)  # the mistakes alone
        other = f"{classes[row.argmax()]} ({row.max()})" if row.any() else "-"
        print(f"{classes[label]:<13}{f'{hits / max(count, 1):.1%} ({hits}/{count})':>18}   {other}")


def draw_test_set(run, images, labels, shares, sample, folder):
    """Draw the images with the indices `sample`, and the surest mistakes if there are any."""
    classes = run["classes"]
    confidence, predicted = shares.max(dim=1)
    right = predicted == labels
    wrong = (~right).nonzero().squeeze(1)
    worst = wrong[confidence[wrong].argsort(descending=True)][:64]
    which = f"all {len(wrong)}" if len(wrong) <= 64 else f"64 of {len(wrong)}"
    first = f"{len(sample)} random test images, {right[sample].sum()} of them right"
    second = f"{which} wrong test images, the surest first"
    for name, indices, title in (("predict", sample, first), ("mistakes", worst, second)):
        captions = []
        for i in indices.tolist():
            mark = "\N{CHECK MARK}" if right[i] else "\N{BALLOT X}"
            share = f" ({confidence[i]:.1%})" if name == "mistakes" else ""
            truth = "" if right[i] else f"\nis {classes[labels[i]]}"
            captions.append(f"{mark} {classes[predicted[i]]}{share}{truth}")
        if captions:
            title, path = f"LeNet-5 on {run['dataset']}: {title}", folder / f"{name}.png"
            utils.plot_grid(images[indices], captions, title, path, right[indices])


def plot_features(run, model, image, label, i, shares, path):
    """Draw the output of each layer for test image number `i`, and the kernels of the first layer.

    Args:
        image: uint8, 28 x 28.
        shares: of the classes (float, classes), as the network sees them in it.
    """
    classes, device = run["classes"], next(model.parameters()).device
    image = F.pad(image[None], [2] * 4)
    traced = trace(model, utils.normalise(image.to(device), run["mean"], run["std"]))
    first, last = traced.layers[1], traced.layers[-1]
    panels = [("Input\n32x32", image / 255, "gray")]
    kernels = first.operations[0].tensors.get("weight", last.output)
    if kernels.ndim == 4 and kernels.shape[1] == 1:
        height, width = kernels.shape[2:]
        panels.append((f"{len(kernels)} kernels\n{height}x{width}", kernels[:, 0], "RdBu_r"))
    for layer in traced.layers[1:-1]:
        maps = layer.output if layer.output.ndim == 3 else layer.output.view(-1, 1, 1)
        count, height, width = maps.shape
        what = f": {count} maps\n{height}x{width}" if height * width > 1 else f"\n{count} units"
        panels.append((f"{layer.name}{what}", maps, "gray"))

    tiled = [tile(maps.detach().cpu()) for _, maps, _ in panels]
    widths = [min(max(6 * tiles.shape[1] / tiles.shape[0], 0.9), 2.2) for tiles in tiled]
    figure = Figure(figsize=(sum(widths) + 3.5, 7.2), layout="constrained")
    axes = figure.subplots(1, len(panels) + 1, width_ratios=[*widths, 2.2])
    for ax, tiles, (title, maps, colours) in zip(axes, tiled, panels):
        low, high = maps.min().item(), maps.max().item()
        if colours != "gray":  # of which white is to be 0
            low, high = -max(-low, high), max(-low, high)
        ax.imshow(tiles.numpy(), cmap=colours, vmin=low, vmax=high)
        ax.set_title(title, fontsize=11)
        digits = max(0, 1 - math.floor(math.log10(max(high - low, 1e-9))))
        ax.set_xlabel(f"{low:.{digits}f}\nto {high:.{digits}f}", fontsize=10)
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
    axes[-1].barh(classes, (100 * shares).tolist(), color=utils.BLUE)
    axes[-1].tick_params(axis="y", labelsize=min(10, 260 / len(classes)))
    axes[-1].set(xlim=(0, 100), ylim=(len(classes) - 0.5, -0.5))
    axes[-1].set_title(f"{last.name}: softmax of\n{len(classes)} units (%)", fontsize=11)
    what = f"test image {i} of {run['dataset']}, of class {classes[label]},"
    figure.suptitle(f"LeNet-5: {what} on its way through the layers", fontsize=14)
    text = "Below each layer the values of black and white; kernels: red is above 0, blue below"
    figure.supxlabel(text, size=11)
    utils.save_figure(figure, path)


def tile(maps):
    """Put maps (N x H x W) into one picture about five times as high as wide, gaps being NaN."""
    count, height, _ = maps.shape
    columns = max(1, round(math.sqrt(count / 5)))
    gap = min(1, height - 1)  # none between units
    padded = F.pad(maps, [0, gap, 0, gap, 0, -count % columns], value=math.nan)
    return torch.cat([torch.cat([*row], dim=1) for row in padded.split(columns)])


def write_page(run, model, about, images, labels, path):
    """Write images/lenet5.html to `path` with `model`, which has the weights of `run`.

    Args:
        about: what the page says of the weights, besides the run and the epoch.
        images, labels: of the test set.

    Raises:
        Error: the page cannot show this network.
    """
    traced = trace(model)
    if traced.problem:
        raise utils.Error(f"no page is written, as it cannot show this network: {traced.problem}")
    dataset, mean, std = run["dataset"], run["mean"], run["std"]
    logits = utils.predict(model, images, mean, std)
    samples = choose_samples(logits.argmax(dim=1) == labels, labels)
    name = "" if run["name"] == dataset else f" {run['name']}"
    network = {
        "classes": run["classes"],
        "mean": mean,
        "std": std,
        "box": utils.DATASETS[dataset]["side"],
        "by_mass": utils.DATASETS[dataset]["by_mass"],
        "about": f"Run{name} on {dataset}, epoch {run['epoch']}: {about}",
        "layers": [describe(layer) for layer in traced.layers],
        "weights": base64(tensors_of(traced)),
        "history": page_history(run, model),
        "samples": base64([images[samples]]),
        "labels": labels[samples].tolist(),
        "logits": base64([logits[samples]]),
    }
    page = (utils.ROOT / "images" / "lenet5.html").read_text(encoding="utf-8")
    head, networks, tail = re.split(r"(?<=id=\"networks\">)(.*?)(?=</script>)", page, maxsplit=1)
    shipped = {k: v for k, v in json.loads(networks).items() if k != dataset}
    networks = json.dumps({dataset: network, **shipped})  # the judged one first
    networks = networks.replace("</", "<\\/")  # in a name it would end the script
    utils.write_file(path, f"{head}{networks}{tail}".encode())


def base64(tensors):
    """Return the numbers of tensors, one after the other, as text."""
    arrays = [tensor.detach().contiguous().numpy() for tensor in tensors]
    return b64encode(b"".join(array.tobytes() for array in arrays)).decode()


def describe(layer):
    """Return a layer of the trace as the page reads it."""
    operations = []
    for operation in layer.operations:
        if operation.kind not in RESHAPES:
            shapes = {name: tensor.shape for name, tensor in operation.tensors.items()}
            each = {"kind": operation.kind, "numbers": operation.numbers, "tensors": shapes}
            operations.append(each)
    shapes = {"input": layer.input, "output": layer.output.shape}
    return {"name": layer.name, **shapes, "operations": operations}


def tensors_of(traced):
    """Return the tensors of all operations, float, in their order."""
    operations = [operation for layer in traced.layers for operation in layer.operations]
    return [tensor.float() for each in operations for tensor in each.tensors.values()]


def choose_samples(right, labels):
    """Return the indices of ten images of each class, up to three of them not `right` (bool, N)."""
    samples = []
    for label in labels.unique():
        hits = (right & (labels == label)).nonzero()[:, 0]
        misses = (~right & (labels == label)).nonzero()[:, 0]
        samples.append(torch.cat([hits[:7], misses[:3], hits[7:], misses[3:]])[:10])
    return torch.cat(samples)


def page_history(run, model):
    """Return for each epoch of which the run has a copy its accuracy, and its weights as int8."""
    epochs = []
    for snapshot in run.get("copies", []):
        if snapshot["epoch"] == run["epoch"]:
            continue
        copy = deepcopy(model)
        copy.load_state_dict(snapshot["weights"], strict=False)  # counts have no copy
        tensors = tensors_of(trace(copy))
        scales = [max(tensor.abs().max().item(), 1e-30) / 127 for tensor in tensors]
        small = [(t / scale).round().to(torch.int8) for t, scale in zip(tensors, scales)]
        epochs.append({"epoch": snapshot["epoch"], "weights": base64(small), "scales": scales})
    epochs.append({"epoch": run["epoch"]})  # of the weights themselves
    validated = "val_accuracy" in run["history"][0]  # not so with --full
    kind, name = ("val", "validation") if validated else ("train", "training")
    for each in epochs:
        if each["epoch"] > 0:
            each["accuracy"] = run["history"][each["epoch"] - 1][f"{kind}_accuracy"]
            each["of"] = name
    return epochs


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


# --- Own pictures ---------------------------------------------------------------------------------

PIXEL_LIMIT = 100_000_000  # beyond any camera; a small file can claim to hold far more
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "AVIF")  # none that runs a program
SIDE = 208  # pixels, to which a larger picture is reduced: a stroke still has a few
UNSURE = 0.7  # from here on 95.7 % of 4,601 validation answers on FashionMNIST were right (default)


def report_pictures(args, run, model, device):
    """Print the likeliest classes of own pictures, draw what was seen, return the exit status.

    Accuracy is printed for those that lie in subfolders with the names of classes.
    """
    dataset, classes = run["dataset"], run["classes"]
    pictures, status = read_pictures(args.image, dataset)
    if not pictures:
        return status
    files, folders, images, steps = zip(*pictures)
    images = torch.stack(images).to(device)
    logits = utils.predict(model, images, run["mean"], run["std"]).cpu()
    captions = []
    for file, shares in zip(files, trace(model).shares(logits)):
        best = [f"{classes[i]} ({p:.1%})" for p, i in zip(*shares.topk(3))]
        print(f"{file}: {', '.join(best)}{'' if shares.max() >= UNSURE else ', unsure'}")
        name = file.name.encode(errors="replace").decode()  # names are bytes, of any encoding
        name = name if len(name) <= 28 else f"{name[:13]}…{name[-14:]}"
        captions.append(f"{name}\n{best[0]}")

    names = [plain(name.partition("/")[0]) for name in classes]
    known = torch.tensor([folder in names for folder in folders])
    if known.any():
        labels = torch.tensor([names.index(folder) for folder in folders if folder in names])
        predicted = logits.argmax(dim=1)[known]
        hits, count = (labels == predicted).sum().item(), len(labels)
        print(f"\nAccuracy in folders named by class: {hits / count:.1%} ({hits}/{count})")
        print_classes(confusion_matrix(labels, predicted, len(classes)), classes)

    path = args.output_dir / "images" / "own.png"
    rows = [beside(each if len(files) == 1 else each[::2]) for each in steps[:64]]
    title = f"What LeNet-5, trained on {dataset}, sees"
    utils.plot_grid(torch.stack(rows), captions[:64], title, path)
    print(f"Picture: {utils.relative(path)}{'' if len(files) <= 64 else ', the first 64'}")
    return status


def read_pictures(paths, dataset):
    """Read all pictures that `paths` name, and tell of those that cannot be read.

    Returns:
        a list of file, plain name of its folder below the path, image (uint8, 28 x 28) and, for
        the first 64, steps to be drawn; and the exit status, 2 if one cannot be read.
    """
    pictures, status = [], 0
    for path in paths:
        for file in find_pictures(path):
            try:
                *before, image = load_picture(file, dataset)
            except utils.Error as error:
                print(f"test.py: error: {' '.join(str(error).split())}", file=sys.stderr)
                status = 2
                continue
            folder = plain(file.parent.name) if path in file.parent.parents else ""
            steps = [*before, F.pad(image, [2] * 4)] if len(pictures) < 64 else []
            pictures.append((file, folder, image, steps))
    return pictures, status


def plain(name):
    """Return a name in lower case without spaces and punctuation."""
    return re.sub(r"[\W_]", "", name.lower())


def find_pictures(path):
    """Return the files that `path` names: itself, all pictures in a folder, or a pattern's."""
    if os.path.isdir(path):  # noqa: PTH112 - never raises
        endings = {end for end, name in Image.registered_extensions().items() if name in FORMATS}
        endings |= {".heic", ".heif"}  # refused, but not passed over
        found = [file for file in path.rglob("[!.]*") if file.suffix.lower() in endings]
    else:
        found = [] if os.path.lexists(path) else map(type(path), glob.glob(str(path)))  # noqa: PTH207
    return sorted(found) or [path]


def beside(steps):
    """Return pictures (uint8, H x W each) side by side, each in 128 x 128 pixels, as uint8."""
    tiles = []
    for step in steps:
        tile = ImageOps.pad(Image.fromarray(step.numpy()), (128, 128), Image.Resampling.BOX)
        tiles.append(np.pad(tile, ((0, 0), (0, 8)), constant_values=255))
    return torch.from_numpy(np.hstack(tiles)[:, :-8])


def load_picture(path, dataset):
    """Read a picture of one object and make it look like an image of `dataset`.

    Returns:
        the picture (uint8, H x W), what stands out from its background (uint8, H x W), and the
        image (uint8, 28 x 28), bright on black.

    Raises:
        Error: the file is no picture that can be read, or nothing is to be seen in it.
    """
    how = utils.DATASETS[dataset]
    grey = read_grey(path)
    x = contrast(grey, how["strokes"])
    if how["strokes"]:
        strokes = main_parts((x > x.max() / 3).float())
        x = x * dilate(strokes, 5)  # with their soft edges
    if not x.any():
        raise utils.Error(
            f"{utils.relative(path)} shows nothing that stands out from its background: take it "
            "closer, in even light, on a plain background"
        )
    x = x / x.max()
    return grey.byte(), (255 * x).byte(), fit(x, how["side"], how["by_mass"])


def read_grey(path):
    """Read a picture as grey levels (float, 0 to 255, H x W), upright, H and W <= SIDE."""
    warnings.filterwarnings("ignore", module="PIL")  # of sizes and EXIF: we have PIXEL_LIMIT
    Image.init()
    with utils.refuse(path, "{path} is no picture that can be read: {error}"):
        if not path.exists():
            raise utils.Error(f"{utils.relative(path)} does not exist")
        if path.is_dir():
            raise utils.Error(f"{utils.relative(path)} is a folder without pictures")
        try:
            formats = [name for name in FORMATS if name in Image.OPEN]
            picture = Image.open(path, formats=formats)
        except UnidentifiedImageError as error:
            heic = "HEIC, of iPhones, is not read here: save it as JPEG"
            raise ValueError(heic if path.read_bytes()[4:8] == b"ftyp" else error) from error
        with picture:
            if picture.width * picture.height > PIXEL_LIMIT:
                raise ValueError(f"it is too large: {picture.width}x{picture.height} pixels")
            if getattr(picture, "is_animated", False) and picture.format != "MPO":
                raise ValueError("it is animated: save the one picture that you mean")
            mode = "F" if picture.mode.startswith(("I", "F")) else "RGBA"  # F: 16 bits and more
            if picture.mode not in ("RGB", "L"):  # which are reduced first, to save memory
                picture = picture.convert(mode)
            picture.thumbnail((SIDE, SIDE), Image.Resampling.BOX)
            picture = ImageOps.exif_transpose(picture).convert(mode)
    if mode == "F":
        levels = np.array(picture, dtype=float)
        if not np.isfinite(levels).all():
            raise utils.Error(
                f"{utils.relative(path)} has pixels that are no numbers: save it anew"
            )
        levels = np.interp(levels, (levels.min(), levels.max()), (0, 255))
        return torch.from_numpy(levels).float()
    grey = torch.from_numpy(np.array(picture.convert("L"))).float()
    alpha = torch.from_numpy(np.array(picture.getchannel("A"))) / 255
    # What is transparent becomes white behind a dark object and black behind a bright one.
    mean = (grey * alpha).sum() / alpha.sum().clamp(min=1)
    return alpha * grey + (1 - alpha) * (255 if mean < 128 else 0)


def border(x):
    """Return the outermost pixels of x (H x W or H x W x C) in one row."""
    return torch.cat([x[0], x[-1], x[:, 0], x[:, -1]])


def dilate(x, size):
    """Return the maximum of x (float, H x W) over squares of `size` (odd) pixels."""
    x = F.max_pool2d(x[None], (1, size), stride=1, padding=(0, size // 2))
    return F.max_pool2d(x, (size, 1), stride=1, padding=(size // 2, 0))[0]


def contrast(grey, strokes):
    """Return by which share pixels (float, H x W) differ from the background, less its grain.

    Behind strokes it is what a closing leaves, which fills in whatever is narrower than a fifth of
    the picture: light and shadow go. An article covers too much for that, and has a plane.
    """
    low, high = grey.min(), grey.max()
    if border(grey).median() < (low + high) / 2:  # bright on dark
        grey = low + high - grey
    if strokes:
        size = min(SIDE // 5, max(grey.shape)) | 1
        paper = -dilate(-dilate(grey, size), size)
    else:
        paper = border_plane(grey)
    x = (paper - grey) / paper.clamp(min=1)
    background = x[x <= x.max() / 2] if strokes else border(x)
    level = background.median()
    grain = 4 * (background - level).abs().median()
    x = (x - level - grain).clamp(min=0)
    visible = x.any() and x[x > 0].quantile(0.75) > max(grain / 2, 1 / 512)
    return x if visible else torch.zeros_like(x)


def border_plane(grey):
    """Return the plane (float, H x W) through the border's levels, as light comes from one side.

    By least trimmed squares: the article may touch the border, so only the half of it that fits
    best counts (Rousseeuw, "Least median of squares regression", 1984).
    """
    down, across = (torch.linspace(-1, 1, side) for side in grey.shape)
    grid = torch.meshgrid(down, across, indexing="ij")
    planes = torch.stack([torch.ones_like(grey), *grid], dim=2)
    sides, levels = border(planes), border(grey)
    best = torch.arange(len(levels))
    for _ in range(10):
        plane = torch.linalg.pinv(sides[best]) @ levels[best]
        best = (levels - sides @ plane).abs().topk(len(levels) // 2 + 1, largest=False).indices
    return planes @ plane


def main_parts(mask):
    """Return those connected parts of a mask (float, 0 or 1, H x W) that may belong to a digit.

    Parts at the border, as of shadows and tables, are out if there is another of some size; so are
    specks, with less than 3 % of the largest area.
    """
    part, before = torch.arange(1.0, mask.numel() + 1).view(mask.shape) * mask, mask
    # Each pixel takes the largest number nearby, then that pixel's own: parts fill in few rounds.
    while not part.equal(before):
        before = part
        part = dilate(part, 3) * mask
        part = F.pad(part.flatten(), (1, 0))[part.long()]
    _, part, area = part.unique(return_inverse=True, return_counts=True)
    area[0] = 0  # that of the paper
    inside = area.clone()
    inside[border(part)] = 0
    if inside.max() > mask.numel() / 400:
        area = inside
    return (area > 0.03 * area.max())[part].float()


def fit(x, box, by_mass):
    """Return what is bright in x (float, 0 to 1, H x W) as an image of a data set.

    MNIST's authors fitted a digit into 20 x 20 pixels and put its centre of mass into the middle
    (LeCun et al. 1998, section III.A); the images show that pixel 14 of 0 to 27 is meant. An
    article fills 28 pixels (Xiao et al. 2017, section 2); one row more is above it than below, if
    they are odd.

    Args:
        box: pixels of the longer side.
        by_mass: whether the centre of mass is in the middle, or the box.

    Returns:
        image (uint8, 28 x 28).
    """
    rows, columns = ((x > 0.02).any(dim=dim).nonzero() for dim in (1, 0))
    x = x[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    height, width = (max(1, round(side * box / max(x.shape))) for side in x.shape)
    x = np.array(Image.fromarray(x.numpy()).resize((width, height), Image.Resampling.BICUBIC))
    x = (255 * x / x.max()).clip(0).round()
    middle = (height - 1) / 2, (width - 1) / 2
    if by_mass:
        middle = [(np.indices(x.shape)[axis] * x).sum() / x.sum() for axis in (0, 1)]
    top, left = (
        int(np.clip(math.ceil(13.5 - m), 0, 28 - side)) for m, side in zip(middle, x.shape)
    )
    image = torch.zeros(28, 28, dtype=torch.uint8)
    image[top : top + height, left : left + width] = torch.from_numpy(x)
    return image


if __name__ == "__main__":
    utils.run_script(main)
