"""Judge a trained LeNet-5 on the full test set, or on your own pictures.

python test.py                            the newest run, or the weights that come along
python test.py --dataset MNIST            the newest run on MNIST
python test.py --image shoe.jpg bag.png   your own pictures
"""

import math

import utils

if __name__ == "__main__":
    utils.test_parser().check()

import torch
import torch.nn.functional as F

from model import LeNet


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


def main(argv=None):
    args = utils.test_parser().parse_args(argv)
    path = find_checkpoint(args)
    checkpoint = utils.load_checkpoint(path)
    dataset = checkpoint["dataset"]
    if args.dataset not in ("auto", dataset):
        raise utils.Error(f"{utils.relative(path)} was trained on {dataset}, not {args.dataset}")
    model = LeNet(num_classes=len(checkpoint["classes"]))
    utils.restore(model, checkpoint, path)
    device = utils.choose_device(args.device)
    model.to(device)

    if args.image:
        images = torch.stack([utils.load_picture(file, dataset) for file in args.image])
    else:
        images, labels = utils.load_images(dataset, args.data_dir, "test")
    logits = utils.predict(model, images.to(device), checkpoint["mean"], checkpoint["std"]).cpu()

    print(f"Weights: {utils.relative(path)}, epoch {checkpoint['epoch']} of a run on {dataset}")
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
                yield f"\N{CHECK MARK} {classes[predicted[i]]}{share}\n"  # as high as the others
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
    utils.plot_grid(F.pad(images, (2, 2, 2, 2)), captions, title, path)
    print(f"Picture: {utils.relative(path)}")


def find_checkpoint(args):
    """Return the checkpoint that the options ask for: named, of the newest run, or shipped."""
    if args.checkpoint:
        return args.checkpoint
    newest = utils.newest(args.checkpoint_dir, args.dataset, "best.pt")
    if newest:
        return newest
    dataset = "FashionMNIST" if args.dataset == "auto" else args.dataset
    shipped = utils.ROOT / "checkpoints" / f"lenet5-{dataset.lower()}.pt"
    if not shipped.exists():
        raise utils.Error(
            f"there is no run on {dataset} in {utils.relative(args.checkpoint_dir)}: "
            f"train one with {utils.command('train.py', args)}"
        )
    return shipped


if __name__ == "__main__":
    utils.run(main)
