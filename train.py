"""Train LeNet-5 and keep its best weights.

    python train.py                          20 epochs on FashionMNIST
    python train.py --dataset MNIST          the same on handwritten digits
    python train.py --resume                 go on with the newest run, where it was interrupted
    torchrun --nproc-per-node 4 train.py     the same network, on four GPUs

Then `python test.py` reports the accuracy on the test set.
"""

import contextlib
import math
import sys
import time
from typing import NamedTuple

import utils


class Recipe(NamedTuple):
    """What a run is made of; options on the command line win."""

    optimizer: str = "muon"  # for the hidden layers' weights, and AdamW for the rest; adamw; sgd
    xavier: bool = True  # Xavier's initialisation with the gain of the sigmoid, or PyTorch's own
    one_cycle: bool = True  # the learning rate follows `one_cycle`, or it is constant
    augment: bool = True  # mirror images of clothes, shifts of digits by a pixel
    shift: int = 0  # most pixels by which all images are shifted
    label_smoothing: float = 0.0  # share of each label that is spread over all classes
    epochs: int = 20
    lr: float = 0.04
    weight_decay: float = 0.015


ADAMW = Recipe("adamw", augment=False, lr=0.02, weight_decay=0.03)
RECIPES = {
    "default": Recipe(),
    "long": Recipe(shift=1, label_smoothing=0.05, epochs=150, weight_decay=0.01),
    "muon": Recipe(augment=False),
    "xavier": ADAMW,
    "adamw": ADAMW._replace(xavier=False, lr=0.01),
    "sgd": Recipe("sgd", False, False, False, lr=0.9, weight_decay=0.0),
}

if __name__ == "__main__":
    utils.train_parser(RECIPES).check()

import torch
import torch.nn.functional as F
from tqdm import tqdm

from model import FastLeNet

RUN_OPTIONS = ("dataset", "recipe", "epochs", "batch_size", "lr", "weight_decay", "seed", "limit")
SECONDS_BETWEEN_PLOTS = 30


def make_step(network, optimizers, images, labels, mean, std, label_smoothing):
    """Return the function that trains `network` on one batch.

    Args:
        images: uint8, N x 28 x 28; labels: int64, N; both on the device of `network`.
        mean, std: of the pixels, for `utils.preprocess`.
        label_smoothing: of the loss that is minimised (Szegedy et al., "Rethinking the Inception
            architecture for computer vision", 2016, section 7).

    The function takes the batch (int64, B x 4: the indices of its images, and what
    `utils.draw_changes` has drawn for them) and the weight of an image in the loss. It returns the
    sum of the plain loss and the number of right answers before the update, as a tensor, so that
    the device need not be waited for.
    """

    def step(batch, weight):
        x = utils.preprocess(images[batch[:, 0]], mean, std, batch[:, 1:])
        y = labels[batch[:, 0]]
        logits = network(x)
        loss = F.cross_entropy(logits, y, reduction="sum", label_smoothing=label_smoothing)
        network.zero_grad()
        (weight * loss).backward()
        for optimizer in optimizers:
            optimizer.step()
        return loss_and_right(logits.detach(), y)

    return step


def train_epoch(step, optimizers, rates, plan, batch_size, workers):
    """Train for one epoch: one step for each batch of `plan`, at the next of the `rates`.

    Args:
        rates: learning rate of each step, as a share of its peak.
        plan: int64, N x 4, all images in the order of training, as `make_step` takes them; each
            worker takes its share of every batch.
        batch_size: images per step, over all workers.

    Returns:
        mean loss and accuracy (0 to 1) over the epoch, each batch measured before its step.

    Raises:
        Error: the loss is not finite.
    """
    total = torch.zeros(2, device=plan.device)
    bar = tqdm(plan.split(batch_size), file=sys.stdout, disable=None, leave=False, unit="batch")
    for batch, rate in zip(bar, rates, strict=True):
        set_rate(optimizers, rate)
        # DistributedDataParallel takes the mean of the workers' gradients: hence their number.
        total += step(batch[workers.rank :: workers.count], workers.count / len(batch))
    return mean_of(total, len(plan), workers)


def evaluate(model, images, labels, mean, std, workers):
    """Return mean loss and accuracy (0 to 1) of `model` on images (uint8, N x 28 x 28).

    Raises:
        Error: the loss is not finite.
    """
    share = slice(workers.rank, None, workers.count)
    sums = loss_and_right(utils.predict(model, images[share], mean, std), labels[share])
    return mean_of(sums, len(labels), workers)


def loss_and_right(logits, labels):
    """Return the sum of the losses and the number of right answers, as one tensor."""
    loss = F.cross_entropy(logits, labels, reduction="sum")
    return torch.stack([loss, (logits.argmax(dim=1) == labels).sum()])


def mean_of(total, count, workers):
    """Return loss and accuracy per image, from each worker's sums over `count` images in all.

    Raises:
        Error: the loss is not finite.
    """
    loss, right = workers.sum(total).tolist()
    if not math.isfinite(loss):
        raise utils.Error("the loss is no longer finite, which needs a smaller --lr")
    return loss / count, right / count


def one_cycle(progress):
    """Return the learning rate as a share of its peak, at `progress` (0 to 1) through the run.

    Source: Smith and Topin, "Super-convergence", 2017; here with a cosine up and a cosine down.
    """
    if progress < 0.3:
        return 0.04 + 0.96 * (1 - math.cos(math.pi * progress / 0.3)) / 2
    return (1 + math.cos(math.pi * (progress - 0.3) / 0.7)) / 2


def make_optimizers(model, name, lr, weight_decay, capturable=False):
    """Return the optimizers of `model`.

    Args:
        name: as in a `Recipe`.
        lr, weight_decay: for all parameters; with muon, AdamW has half the rate, twice the decay.
        capturable: whether a CUDA graph is to record their steps; the rates are tensors then.
    """
    hidden = [layer.weight for layer in (model.c1, model.c3, model.c5, model.f6)]
    others = [p for p in model.parameters() if not any(p is weight for weight in hidden)]
    if name == "sgd":
        optimizers = [
            torch.optim.SGD(model.parameters(), lr, weight_decay=weight_decay, fused=True)
        ]
    elif name == "adamw":
        optimizers = [adamw(model.parameters(), lr, weight_decay, capturable)]
    else:
        optimizers = [
            utils.Muon(hidden, lr, weight_decay=weight_decay),
            adamw(others, lr / 2, 2 * weight_decay, capturable),
        ]
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["peak"] = group["lr"]
        if capturable:
            group["lr"] = torch.tensor(group["lr"], device="cuda")
    return optimizers


def adamw(parameters, lr, weight_decay, capturable):
    return torch.optim.AdamW(
        parameters, lr, weight_decay=weight_decay, fused=True, capturable=capturable
    )


def set_rate(optimizers, rate):
    """Set all learning rates to the share `rate` of their peaks."""
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate * group["peak"])  # where a recorded graph reads it
        else:
            group["lr"] = rate * group["peak"]


def main(argv=None):
    args, checkpoint = parse_args(argv)
    workers = utils.Workers(args.device)
    try:
        args.dataset, *splits = load_splits(args, workers)
        folders = args.checkpoint_dir / args.dataset, args.image_dir / args.dataset
        for folder in folders:
            utils.make_folder(folder)
        with utils.claim(*folders) if workers.rank == 0 else contextlib.nullcontext():
            if checkpoint:  # another run may have been at work in there since it was read
                begun, checkpoint = checkpoint, utils.load_checkpoint(folders[0] / "last.pt")
                if checkpoint["options"] != begun["options"]:
                    raise utils.Error("another run has begun meanwhile: run this command again")
            return train(args, checkpoint, workers, *splits)
    except RuntimeError as error:
        if not workers.lost(error):
            raise
        message = "stopped, as another worker is gone"
        if utils.newest(args.checkpoint_dir, args.dataset, "last.pt"):
            again = utils.command("train.py --resume", args, workers.launcher)
            message += f". Every epoch that was finished is saved; go on with: {again}"
        raise utils.Error(message) from error
    finally:
        workers.close()


def train(args, checkpoint, workers, train_set, val_set):
    """Train as `args` say, after `checkpoint` if there is one, and return the exit status."""
    recipe, classes = RECIPES[args.recipe], utils.CLASSES[args.dataset]
    run_dir, image_dir = args.checkpoint_dir / args.dataset, args.image_dir / args.dataset
    mean, std = utils.pixel_statistics(train_set[0])
    train_set = [tensor[: args.limit].to(workers.device) for tensor in train_set]
    val_set = [tensor[: args.limit].to(workers.device) for tensor in val_set]
    train_count, val_count = len(train_set[1]), len(val_set[1])

    # Freed at once: from then on glibc keeps freed blocks of up to this size for the next step,
    # instead of giving them back to the system, which can take a second per epoch.
    torch.empty(31 * 2**20, dtype=torch.uint8)
    torch.manual_seed(args.seed)
    model = make_model(recipe, len(classes)).to(workers.device)
    use_graph = workers.device.type == "cuda" and workers.count == 1
    optimizers = make_optimizers(model, recipe.optimizer, args.lr, args.weight_decay, use_graph)
    network = workers.wrap(model)
    step = make_step(network, optimizers, *train_set, mean, std, recipe.label_smoothing)
    if use_graph:
        step = utils.CudaGraph(step, args.batch_size)
    history = []
    if checkpoint:
        utils.restore_run(checkpoint, run_dir / "last.pt", model, optimizers)
        history = checkpoint["history"]
    if workers.rank == 0 and checkpoint:
        utils.save_best(checkpoint, run_dir)  # a crash may have come just before
        utils.write_metrics(history, args.dataset, image_dir, draw=True)
    elif workers.rank == 0:
        utils.warn_if_unfinished(run_dir / "last.pt")
    about = {
        "format": utils.FORMAT,
        "dataset": args.dataset,
        "classes": classes,
        "mean": mean,
        "std": std,
        "options": {name: getattr(args, name) for name in RUN_OPTIONS},
        "torch": str(torch.__version__),  # a plain str, which every version of torch can read
    }

    where = str(workers.device) if workers.count == 1 else f"{workers.count} workers"
    print(f"LeNet-5 with {sum(p.numel() for p in model.parameters()):,} parameters on {where}")
    print(f"{args.dataset}: {train_count:,} images to train on, {val_count:,} for validation\n")
    print("epoch   learning rate   train loss   accuracy   validation loss   accuracy   seconds")
    next_plot = time.monotonic()
    try:
        for epoch in range(len(history) + 1, args.epochs + 1):
            start = time.perf_counter()
            rates = rates_of_epoch(epoch, args, recipe, train_count)
            plan = draw_plan(train_count, args.dataset, recipe).to(workers.device)
            model.train()
            train_row = train_epoch(step, optimizers, rates, plan, args.batch_size, workers)
            val_row = evaluate(model, *val_set, mean, std, workers)
            seconds = time.perf_counter() - start
            row = dict(zip(utils.HISTORY, (epoch, args.lr * rates[-1], *train_row, *val_row)))

            if workers.rank > 0:
                history.append(row)
                continue
            checkpoint = about | {
                "epoch": epoch,
                "history": [*history, row],
                "model": model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "random": torch.get_rng_state(),
            }
            utils.save(checkpoint, run_dir / "last.pt")
            history.append(row)
            utils.save_best(checkpoint, run_dir)
            print_epoch(history, args.epochs, seconds)
            draw = epoch == args.epochs or time.monotonic() >= next_plot
            utils.write_metrics(history, args.dataset, image_dir, draw)
            if draw:
                next_plot = time.monotonic() + SECONDS_BETWEEN_PLOTS
            if epoch == 2 and row["val_accuracy"] < 1.5 / len(classes):
                print(
                    "Warning: after 2 epochs the accuracy is still at chance. Stop with Ctrl-C and "
                    f"try a smaller --lr than {args.lr}, or more images per class.",
                    file=sys.stderr,
                )
    except utils.Error as error:
        if workers.rank > 0:
            return 2  # rank 0 says why
        message = f"stopped in epoch {epoch}: {error}; {saved_so_far(history, args, workers)}"
        raise utils.Error(message) from error
    except KeyboardInterrupt:
        if workers.rank == 0:
            print(f"\nStopped: {saved_so_far(history, args, workers)}", file=sys.stderr)
        if workers.rank == 0 and history:
            utils.write_metrics(history, args.dataset, image_dir, draw=True)
        return 130

    best = utils.best_epoch(history)
    correct = round(best["val_accuracy"] * val_count)
    print(
        f"\nBest epoch: {best['epoch']} of {args.epochs}, validation accuracy on {args.dataset} "
        f"{best['val_accuracy']:.2%} ({correct}/{val_count})\n"
        f"Weights:    {utils.relative(run_dir / 'best.pt')}\n"
        f"Plot:       {utils.relative(image_dir / 'metrics.png')}, its numbers in metrics.csv\n"
        f"Next:       {utils.command('test.py', args)}"
    )
    return 0


def make_model(recipe, num_classes):
    """Return a new network, its weights drawn from the global random numbers."""
    model = FastLeNet(num_classes)
    if not recipe.xavier:
        for layer in (model.c1, model.c3, model.c5, model.f6, model.f7):
            layer.reset_parameters()
    return model


def rates_of_epoch(epoch, args, recipe, count):
    """Return the rate of each step in `epoch`, over `count` images, as a share of its peak."""
    steps = math.ceil(count / args.batch_size)
    if not recipe.one_cycle:
        return [1.0] * steps
    return [one_cycle(i / (args.epochs * steps)) for i in range((epoch - 1) * steps, epoch * steps)]


def draw_plan(count, dataset, recipe):
    """Draw the order of `count` images and their augmentation (int64, N x 4), as `make_step` says.

    They are drawn on the CPU, so that all workers and every kind of device see the same.
    """
    clothes = dataset == "FashionMNIST"
    order = torch.randperm(count)
    mirror = recipe.augment and clothes
    shift = max(recipe.shift, int(recipe.augment and not clothes))
    return torch.cat([order.unsqueeze(1), utils.draw_changes(count, mirror, shift)], dim=1)


def load_splits(args, workers):
    """Return the data set's name, and the train and the validation split (images and labels)."""
    if workers.rank == 0:
        dataset, *data = utils.load_train_images(args.dataset, args.data_dir)
        workers.share(dataset)
    else:  # only after rank 0, which has downloaded or drawn what was missing
        dataset = workers.share(None)
        data = utils.load_images(dataset, args.data_dir, "train")
    return dataset, *utils.split_train_validation(*data)


def parse_args(argv):
    """Parse the command line; with --resume, return the newest run's options and checkpoint too.

    Raises:
        Error: an option is bad, there is no run, or an option contradicts the run's own.
    """
    parser = utils.train_parser(RECIPES)
    args = parser.parse_args(argv)
    if not args.resume:
        for name in ("epochs", "lr", "weight_decay"):
            if getattr(args, name) is None:
                setattr(args, name, getattr(RECIPES[args.recipe], name))
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
    if "recipe" not in saved:
        raise utils.Error(
            f"{utils.relative(path)} was begun by an older version, which alone can go on with it"
        )
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


def saved_so_far(history, args, workers):
    """Say what is safe after the epochs of `history`, and how to go on."""
    if not history:
        return "no epoch was saved yet"
    where = utils.relative(args.checkpoint_dir / args.dataset / "last.pt")
    again = utils.command("train.py --resume", args, workers.launcher)
    return f"epoch {len(history)} is saved in {where}; go on with: {again}"


if __name__ == "__main__":
    utils.run(main)
