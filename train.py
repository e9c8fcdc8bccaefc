"""Train LeNet-5 and keep its best weights.

    python train.py                    20 epochs on FashionMNIST
    python train.py --dataset MNIST    the same on handwritten digits
    python train.py --resume           go on with the newest run, where it was interrupted

Then `python test.py` reports the accuracy on the test set.
"""

import csv
import io
import math
import sys
import time

import torch
import torch.nn.functional as F
from tqdm import tqdm

import utils
from model import LeNet

RUN_OPTIONS = ("dataset", "epochs", "batch_size", "lr", "weight_decay", "seed", "limit")
TRAINING_STATE = ("optimizer", "scheduler", "random")  # in last.pt, not in best.pt


def train_epoch(model, optimizer, scheduler, images, labels, mean, std, batch_size):
    """Train for one epoch, over all images in a new random order.

    Args:
        images: uint8, N x 28 x 28; labels: int64, N; both on the device of `model`.
        mean, std: of the pixels, for `utils.preprocess`.

    Returns:
        mean loss and accuracy (0 to 1) over the epoch, each batch measured before its step.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    model.train()
    total_loss = total_correct = 0
    # All random numbers are drawn on the CPU, so that every device sees the same order.
    batches = torch.randperm(len(labels)).split(batch_size)
    for batch in tqdm(batches, file=sys.stdout, disable=None, leave=False, unit="batch"):
        batch = batch.to(images.device)
        x, y = utils.preprocess(images[batch], mean, std), labels[batch]

        logits = model(x)
        loss = F.cross_entropy(logits, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()

        total_loss += loss.item() * len(y)
        total_correct += (logits.argmax(dim=1) == y).sum().item()
        if not math.isfinite(total_loss):
            raise FloatingPointError("the training loss is no longer finite")
    return total_loss / len(labels), total_correct / len(labels)


def evaluate(model, images, labels, mean, std):
    """Return mean loss and accuracy (0 to 1) of `model` on images (uint8, N x 28 x 28).

    Raises:
        FloatingPointError: the loss is not finite.
    """
    logits = utils.predict(model, images, mean, std)
    loss = F.cross_entropy(logits, labels).item()
    if not math.isfinite(loss):
        raise FloatingPointError("the validation loss is no longer finite")
    return loss, (logits.argmax(dim=1) == labels).sum().item() / len(labels)


def main(argv=None):
    args, checkpoint = parse_args(argv)
    device = utils.choose_device(args.device)

    args.dataset, images, labels = utils.load_train_images(args.dataset, args.data_dir)
    train, val = utils.split_train_validation(images, labels)
    mean, std = utils.pixel_statistics(train[0])
    train = [tensor[: args.limit].to(device) for tensor in train]
    val = [tensor[: args.limit].to(device) for tensor in val]
    classes = utils.CLASSES[args.dataset]

    torch.manual_seed(args.seed)
    model = LeNet(num_classes=len(classes)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, weight_decay=args.weight_decay)
    steps = args.epochs * math.ceil(len(train[1]) / args.batch_size)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, steps, pct_start=0.3)
    history = []

    run_dir, image_dir = args.checkpoint_dir / args.dataset, args.image_dir / args.dataset
    utils.make_folder(run_dir)
    utils.make_folder(image_dir)
    if checkpoint:
        restore_run(checkpoint, run_dir / "last.pt", model, optimizer, scheduler)
        history = checkpoint["history"]
        save_run(checkpoint, run_dir)  # best.pt too, if a crash came just before it
        write_metrics(history, args.dataset, image_dir)
    else:
        warn_if_unfinished(run_dir / "last.pt")
    about = {
        "format": utils.FORMAT,
        "dataset": args.dataset,
        "classes": classes,
        "mean": mean,
        "std": std,
        "options": {name: getattr(args, name) for name in RUN_OPTIONS},
        "torch": str(torch.__version__),  # a plain str, which every version of torch can read
    }

    print(f"LeNet-5 with {sum(p.numel() for p in model.parameters()):,} parameters on {device}")
    print(f"{args.dataset}: {len(train[1]):,} images to train on, {len(val[1]):,} for validation\n")
    print("epoch   learning rate   train loss   accuracy   validation loss   accuracy   seconds")
    finished = len(history)
    try:
        for epoch in range(len(history) + 1, args.epochs + 1):
            start = time.perf_counter()
            train_row = train_epoch(model, optimizer, scheduler, *train, mean, std, args.batch_size)
            val_row = evaluate(model, *val, mean, std)
            rate = scheduler.get_last_lr()[0]
            seconds = time.perf_counter() - start
            history.append(dict(zip(utils.HISTORY, (epoch, rate, *train_row, *val_row))))

            training_state = {
                "optimizer": optimizer.state_dict(),
                "scheduler": scheduler.state_dict(),
                "random": torch.get_rng_state(),
            }
            progress = {"epoch": epoch, "history": history, "model": model.state_dict()}
            save_run(about | progress | training_state, run_dir)
            finished = epoch
            print_epoch(history, args.epochs, seconds)
            write_metrics(history, args.dataset, image_dir)
            if epoch == 2 and history[-1]["val_accuracy"] < 1.5 / len(classes):
                print(
                    "Warning: after 2 epochs the accuracy is still at chance. Stop with Ctrl-C and "
                    f"try a smaller --lr than {args.lr}, or more images per class.",
                    file=sys.stderr,
                )
    except FloatingPointError as error:
        raise utils.Error(
            f"stopped in epoch {epoch}: {error}. Train again with a smaller --lr than {args.lr}; "
            f"{saved_so_far(run_dir, finished)}"
        ) from error
    except KeyboardInterrupt:
        print(f"\nStopped: {saved_so_far(run_dir, finished)}.", file=sys.stderr)
        if finished:
            print(f"Go on with: {utils.command('train.py --resume', args)}", file=sys.stderr)
        return 130

    best = utils.best_epoch(history)
    correct = round(best["val_accuracy"] * len(val[1]))
    print(
        f"\nBest epoch: {best['epoch']} of {args.epochs}, validation accuracy on {args.dataset} "
        f"{best['val_accuracy']:.2%} ({correct}/{len(val[1])})\n"
        f"Weights:    {utils.relative(run_dir / 'best.pt')}\n"
        f"Plot:       {utils.relative(image_dir / 'metrics.png')}, its numbers in metrics.csv\n"
        f"Next:       {utils.command('test.py', args)}"
    )
    return 0


def parse_args(argv):
    """Parse the command line; with --resume, return the newest run's options and checkpoint too.

    Raises:
        Error: an option is bad, there is no run, or an option contradicts the run's own.
    """
    parser = utils.Parser("Train LeNet-5 and keep the weights of the best epoch.")
    parser.add_argument(
        "--dataset",
        choices=("auto", *utils.DATASETS),
        default="auto",
        help="auto: FashionMNIST or, if it cannot be had, the built-in Glyphs; "
        "with --resume: the data set of the newest run",
    )
    whole, positive = utils.number(int, 1), utils.number(float, 0, above=True)
    parser.add_argument("--epochs", type=whole, default=20, help="passes over the train split")
    parser.add_argument("--batch-size", type=whole, default=128, help="images per step")
    parser.add_argument("--lr", type=positive, default=2e-2, help="peak of the learning rate")
    parser.add_argument(
        "--weight-decay", type=utils.number(float, 0), default=3e-2, help="of AdamW, decoupled"
    )
    parser.add_argument(
        "--seed", type=utils.number(int, 0), default=0, help="for the weights and the order"
    )
    parser.add_argument(
        "--limit", type=whole, help="only the first LIMIT images of each split, for a quick look"
    )
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted run")
    parser.add_folders_and_device()
    args = parser.parse_args(argv)
    if not args.resume:
        return args, None

    path = utils.newest(args.checkpoint_dir, args.dataset, "last.pt")
    if path is None:
        what = "run" if args.dataset == "auto" else f"run on {args.dataset}"
        raise utils.Error(
            f"there is no {what} to resume in {utils.relative(args.checkpoint_dir)}: "
            "start one without --resume"
        )
    checkpoint = utils.load_checkpoint(path)
    saved = checkpoint["options"]
    if path.parent.name != checkpoint["dataset"]:
        raise utils.Error(f"{utils.relative(path)} belongs to a run on {checkpoint['dataset']}")
    flags = {name: f"--{name.replace('_', '-')}" for name in RUN_OPTIONS}
    # Read as if typed, and so checked as well; what is typed now comes after it and wins.
    typed = [f"{flags.get(name)}={value}" for name, value in saved.items() if value is not None]
    try:
        parser.parse_args(typed)
    except utils.Error as error:
        raise utils.Error(f"{utils.relative(path)} cannot be resumed: {error}") from error
    args = parser.parse_args([*typed, *(sys.argv[1:] if argv is None else argv)])
    if args.dataset == "auto":
        args.dataset = checkpoint["dataset"]
    for name, flag in flags.items():
        now, then = getattr(args, name), saved.get(name)
        if now != then:
            raise utils.Error(
                f"{flag} {now} contradicts {utils.relative(path)}, whose run has {then}: "
                "leave it out, or start a new run without --resume"
            )
    return args, checkpoint


def restore_run(checkpoint, path, model, optimizer, scheduler):
    """Put everything back as it was when `checkpoint`, read from `path`, was written."""
    utils.restore(model, checkpoint, path)
    try:
        optimizer.load_state_dict(checkpoint["optimizer"])
        scheduler.load_state_dict(checkpoint["scheduler"])
        torch.set_rng_state(checkpoint["random"])
    except Exception as error:  # whatever a foreign or altered state can break
        raise utils.Error(
            f"{utils.relative(path)} cannot be resumed: its state is wrong"
        ) from error


def save_run(checkpoint, run_dir):
    """Write last.pt and, if the last epoch is the best one so far, best.pt.

    In this order: if a crash comes between the two, the same call with what last.pt holds brings
    best.pt up to date.
    """
    utils.save(checkpoint, run_dir / "last.pt")
    if utils.best_epoch(checkpoint["history"]) is checkpoint["history"][-1]:
        best = {key: value for key, value in checkpoint.items() if key not in TRAINING_STATE}
        utils.save(best, run_dir / "best.pt")


def write_metrics(history, dataset, image_dir):
    """Write metrics.csv, one line per epoch, and draw it as metrics.png."""
    text = io.StringIO()
    table = csv.DictWriter(text, utils.HISTORY, lineterminator="\n")
    table.writeheader()
    table.writerows(history)
    utils.write_file(image_dir / "metrics.csv", text.getvalue().encode())
    utils.plot_metrics(history, dataset, image_dir / "metrics.png")


def print_epoch(history, epochs, seconds):
    row = history[-1]
    print(
        f"{row['epoch']:>{len(str(epochs))}}/{epochs}".rjust(7),
        f"{row['lr']:>13.2e}",
        f"{row['train_loss']:>12.4f}{row['train_accuracy']:>11.2%}",
        f"{row['val_loss']:>17.4f}{row['val_accuracy']:>11.2%}",
        f"{seconds:>9.1f}" + ("  best so far" if utils.best_epoch(history) is row else ""),
        flush=True,
    )


def warn_if_unfinished(path):
    """Say it if a new run is going to overwrite one that could be resumed."""
    try:
        checkpoint = utils.load_checkpoint(path)
    except utils.Error:
        return  # none, or of no use
    done, epochs = checkpoint["epoch"], checkpoint["options"].get("epochs", 0)
    if isinstance(epochs, int) and done < epochs:
        print(
            f"Note: the unfinished run in {utils.relative(path.parent)} (epoch {done} of {epochs}) "
            "is overwritten after the first epoch; to go on with it instead: Ctrl-C, then --resume",
            file=sys.stderr,
        )


def saved_so_far(run_dir, finished):
    where = utils.relative(run_dir / "last.pt")
    return f"epoch {finished} is saved in {where}" if finished else "no epoch was saved yet"


if __name__ == "__main__":
    utils.run(main)
