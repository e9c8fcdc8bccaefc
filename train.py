"""Train LeNet-5 and keep its best weights.

    python train.py                    20 epochs on FashionMNIST
    python train.py --dataset MNIST    the same on handwritten digits
    python train.py --recipe long      150 epochs, the best results
    python train.py --resume           go on with the newest run, where it was interrupted

Then `python test.py` reports the accuracy on the test set.
"""

import argparse
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

RECIPES = {  # shift: most pixels by which clothes are moved at random; digits are moved by one
    "default": dict(epochs=20, lr=0.05, weight_decay=0.015, shift=0, label_smoothing=0.0),
    "long": dict(epochs=150, lr=0.05, weight_decay=0.01, shift=1, label_smoothing=0.05),
}
DEFAULTS = dict(recipe="default", batch_size=256, seed=0, limit=None, full=False)
NUMBERS = {
    "epochs": (utils.number(int, 1), "passes over the train split"),
    "batch_size": (utils.number(int, 1), "images in a step"),
    "lr": (utils.number(float, 0, above=True), "peak of the learning rate"),
    "weight_decay": (utils.number(float, 0), "decoupled"),
    "seed": (utils.number(int, 0), "of all random numbers"),
    "limit": (utils.number(int, 1), "only the first LIMIT images of each split"),
}
OPTIONS = ("recipe", *NUMBERS, "full")  # what a run can be asked for; it is saved with the run


def parse_args(argv):
    """Parse the command line; an option of the run that is not given is not in the result."""

    def default(name):
        if name in DEFAULTS:
            return "all" if DEFAULTS[name] is None else DEFAULTS[name]
        return ", ".join(f"{recipe[name]} ({key})" for key, recipe in RECIPES.items())

    parser = utils.Parser(
        "Train LeNet-5 and keep the weights of the best epoch.",
        dataset="auto: FashionMNIST or, if it cannot be had, the built-in Glyphs; with --resume: "
        "that of the newest run",
        argument_default=argparse.SUPPRESS,
    )
    add = parser.add_argument
    add("--recipe", choices=tuple(RECIPES), help="long: the best results (default: default)")
    for name, (kind, text) in NUMBERS.items():
        add(f"--{name.replace('_', '-')}", type=kind, help=f"{text} (default: {default(name)})")
    add("--full", action="store_true", help="fit the validation images too, keep the last epoch")
    add("--resume", action="store_true", default=False, help="go on with an interrupted run")
    return parser.parse_args(argv)


def add_options_of_the_run(args, checkpoint):
    """Add to `args` what was not given: from `checkpoint`, of the run to resume, or the recipe.

    Raises:
        Error: an option contradicts the run, or the run's own are not such as this version has.
    """
    given = {name: value for name, value in vars(args).items() if name in OPTIONS}
    saved = given
    last = utils.relative(args.run_dir / "last.pt")
    if checkpoint:
        if checkpoint["dataset"] != args.dataset:
            raise utils.Error(f"{last} belongs to a run on {checkpoint['dataset']}")
        saved = {name: value for name, value in checkpoint["options"].items() if name in OPTIONS}
    recipe = saved.get("recipe", "default")
    if not isinstance(recipe, str) or recipe not in RECIPES:
        raise utils.Error(f"{last} has the recipe {recipe} of another version: start a new run")
    options = DEFAULTS | RECIPES[recipe] | saved
    for name, (kind, _) in NUMBERS.items():
        try:
            if name != "limit" or options[name] is not None:
                options[name] = kind(options[name])
        except argparse.ArgumentTypeError as error:
            raise utils.Error(f"{last} cannot be resumed: its {name} {error}") from error
    for name, value in given.items():
        if value != options[name]:
            flag, then = f"--{name.replace('_', '-')}", options[name]
            now = flag if value is True else f"{flag} {value}"
            then = f"no {flag}" if then is None or then is False else then
            raise utils.Error(
                f"{now} contradicts {last}, whose run has {then}: leave it out, or start a new run "
                "without --resume"
            )
    vars(args).update(options)


class Muon(torch.optim.Optimizer):
    """Gradient descent with Nesterov momentum, each step of a weight matrix made orthogonal.

    The update of a matrix then has the same size in all directions, where the gradient itself has
    a few large ones and many that are almost lost. A kernel counts as a matrix with one row per
    output map. Weight decay is decoupled, as in AdamW.

    Source: Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024,
    https://kellerjordan.github.io/posts/muon/
    """

    def __init__(self, params, lr, momentum=0.95, weight_decay=0.0):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        """Update all parameters by their gradients."""
        for group in self.param_groups:
            lr, momentum, decay = group["lr"], group["momentum"], group["weight_decay"]
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                average = state["momentum"].lerp_(p.grad, 1 - momentum)
                update = orthogonalise(p.grad.lerp(average, momentum).flatten(1))
                rows, columns = update.shape
                update = update.view(p.shape) * max(1, rows / columns) ** 0.5
                p.mul_(1 - lr * decay).sub_(lr * update)


def orthogonalise(matrix, steps=3):
    """Return about U V^T for a matrix U S V^T: all but the smallest singular values near 1.

    A Newton-Schulz iteration with a polynomial of degree 5 that lifts small values quickly and
    keeps the others between about 0.7 and 1.2. Its authors take 5 steps; here 3 did as well.
    """
    x = matrix / (matrix.norm() + 1e-7)
    if len(x) > x.shape[1]:
        return orthogonalise(matrix.t(), steps).t()
    for _ in range(steps):
        square = x @ x.t()
        polynomial = torch.addmm(square, square, square, beta=-4.7750, alpha=2.0315)
        x = torch.addmm(x, polynomial, x, beta=3.4445)
    return x


def make_optimizers(model, lr, weight_decay):
    """Return Muon for the weights of the hidden layers, and AdamW for all other parameters.

    Args:
        lr, weight_decay: of Muon; AdamW has half the rate and twice the decay.
    """
    hidden = [layer.weight for layer in (model.c1, model.c3, model.c5, model.f6)]
    others = [p for p in model.parameters() if not any(p is weight for weight in hidden)]
    return [
        Muon(hidden, lr, weight_decay=weight_decay),
        torch.optim.AdamW(others, lr / 2, weight_decay=2 * weight_decay, fused=True),
    ]


def one_cycle(progress):
    """Return the learning rate as a share of its peak, at `progress` (0 to 1) through the run.

    Source: Smith and Topin, "Super-convergence", 2017; here with a cosine up and a cosine down.
    """
    if progress < 0.3:
        return 0.04 + 0.96 * (1 - math.cos(math.pi * progress / 0.3)) / 2
    return (1 + math.cos(math.pi * (progress - 0.3) / 0.7)) / 2


def train(args, model, optimizers, train_set, val_set, mean, std, history):
    """Train epoch after epoch; after each one save last.pt, and best.pt if it is the best so far.

    Args:
        args: the options of the run, its data set and its folders run_dir and picture_dir.
        train_set, val_set: images (uint8, N x 28 x 28) and labels (int64, N) on the device of
            `model`; val_set is None with --full.
        mean, std: of the pixels.
        history: list of dicts, one for each epoch so far; those of the new epochs are added.

    Raises:
        FloatingPointError: the loss is not finite.
        Error: a checkpoint cannot be written.
    """
    count = len(train_set[1])
    steps = math.ceil(count / args.batch_size)  # in an epoch
    clothes = args.dataset == "FashionMNIST"  # mirrored, they are still clothes
    shift = args.shift if clothes else 1
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    peaks = [group["lr"] for group in groups]
    for epoch in range(len(history) + 1, args.epochs + 1):
        start = time.perf_counter()
        total = torch.zeros(2, device=train_set[1].device)  # reading it each step would stall a GPU
        batches = utils.batches(*train_set, mean, std, args.batch_size, clothes, shift)
        bar = tqdm(batches, total=steps, file=sys.stdout, disable=None, leave=False, unit="batch")
        model.train()
        for step, (x, y) in enumerate(bar, start=(epoch - 1) * steps):
            rate = one_cycle(step / (args.epochs * steps))
            for group, peak in zip(groups, peaks):
                group["lr"] = rate * peak
            logits = model(x)
            loss = F.cross_entropy(logits, y, label_smoothing=args.label_smoothing)
            model.zero_grad()
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
            total += loss_and_right(logits.detach(), y)  # of the plain loss, without smoothing

        numbers = (total / count).tolist()
        if val_set:
            images, labels = val_set
            logits = utils.predict(model, images, mean, std)
            numbers += (loss_and_right(logits, labels) / len(labels)).tolist()
        if not all(map(math.isfinite, numbers)):
            raise FloatingPointError
        row = dict(zip(utils.HISTORY, (epoch, rate * args.lr, *numbers)))
        checkpoint = {
            "format": utils.FORMAT,
            "dataset": args.dataset,
            "classes": utils.CLASSES[args.dataset],
            "mean": mean,
            "std": std,
            "options": {name: getattr(args, name) for name in OPTIONS},
            "torch": str(torch.__version__),  # a plain str, which every version of torch can read
            "epoch": epoch,
            "history": [*history, row],
            "model": model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            "random": torch.get_rng_state(),
        }
        utils.save(checkpoint, args.run_dir / "last.pt")
        history.append(row)  # from here on the epoch counts as saved
        save_best(checkpoint, args.run_dir)
        print_epoch(history, args, time.perf_counter() - start)
        write_metrics(history, args)


def loss_and_right(logits, labels):
    """Return the sum of the losses and the number of right answers, as one tensor."""
    loss = F.cross_entropy(logits, labels, reduction="sum")
    return torch.stack([loss, (logits.argmax(dim=1) == labels).sum()])


def save_best(checkpoint, run_dir):
    """Write best.pt if the last epoch of `checkpoint`, the contents of last.pt, is the best so far.

    After last.pt: if a crash comes between the two, the same call brings best.pt up to date.
    """
    if utils.best_epoch(checkpoint["history"]) is checkpoint["history"][-1]:
        state = ("optimizers", "random")
        best = {key: value for key, value in checkpoint.items() if key not in state}
        utils.save(best, run_dir / "best.pt")


def write_metrics(history, args, plot=False):
    """Write metrics.csv and, with `plot`, metrics.png; where that fails, warn and go on."""
    text = io.StringIO()
    table = csv.DictWriter(text, utils.HISTORY, lineterminator="\n")
    table.writeheader()
    table.writerows(history)
    try:
        utils.write_file(args.picture_dir / "metrics.csv", text.getvalue().encode())
        if plot:
            utils.plot_metrics(history, args.dataset, args.picture_dir / "metrics.png")
    except utils.Error as error:
        print(f"Warning: {error}", file=sys.stderr)


HEADER = "epoch   learning rate   train loss   accuracy   validation loss   accuracy   seconds"


def print_epoch(history, args, seconds):
    """Print the line of an epoch, and a warning where nothing is learnt."""
    row, val, best = history[-1], f"{'-':>18}{'-':>11}", ""
    if not args.full:
        val = f"{row['val_loss']:>18.4f}{row['val_accuracy']:>11.2%}"
        best = "  best so far" if utils.best_epoch(history) is row else ""
    print(
        f"{row['epoch']:>{len(str(args.epochs))}}/{args.epochs}".rjust(7),
        f"{row['lr']:>13.2e}{row['train_loss']:>13.4f}{row['train_accuracy']:>11.2%}"
        f"{val}{seconds:>10.1f}{best}",
        flush=True,
    )
    if row["epoch"] == 2 < args.epochs and row["train_accuracy"] < 0.15:
        print(
            "Warning: after 2 epochs the accuracy is still at chance. Stop with Ctrl-C, and start "
            f"anew with another --lr than {args.lr}, or with more images.",
            file=sys.stderr,
        )


def print_result(history, args, val_count):
    """Print what the run has reached, where it is, and what to do next."""
    row, weights, options = utils.best_epoch(history), args.run_dir / "best.pt", []
    result = f"Last epoch: {row['epoch']}; no image was held back to validate it"
    if not args.full:
        correct = round(row["val_accuracy"] * val_count)
        result = f"Best epoch: {row['epoch']} of {args.epochs}, validation accuracy on "
        result += f"{args.dataset} {row['val_accuracy']:.2%} ({correct}/{val_count})"
    if not weights.exists():
        weights = args.run_dir / "last.pt"
        options = ["--checkpoint", utils.relative(weights)]
    plot = utils.relative(args.picture_dir / "metrics.png")
    print(f"\n{result}")
    print(f"Weights:    {utils.relative(weights)}{', of the last epoch' if options else ''}")
    print(f"Plot:       {plot}, its numbers in metrics.csv")
    print(f"Next:       {utils.command('test.py', args, *options)}")


def note_what_is_there(history, args):
    """Say it if a new run is going to overwrite another one, or if best.pt of this one is gone."""
    best, last, note = args.run_dir / "best.pt", args.run_dir / "last.pt", ""
    if not history and last.exists():
        note = f"the run in {utils.relative(args.run_dir)} is overwritten after the first epoch; "
        note += "to keep it, stop with Ctrl-C, and go on with --resume or another --checkpoint-dir"
    elif history and not best.exists():
        note = f"{utils.relative(best)} is gone, and with it the weights of epoch "
        note += f"{utils.best_epoch(history)['epoch']}; it comes back with the next better epoch"
    if note:
        print(f"Note: {note}", file=sys.stderr)


def saved_so_far(history, args):
    """Say what is safe after the epochs of `history`, and how to go on."""
    if not history:
        return "no epoch was saved yet"
    last = utils.relative(args.run_dir / "last.pt")
    again = utils.command("train.py", args, "--resume")
    return f"epoch {len(history)} is saved in {last}; go on with: {again}"


def start(args, device, train_set, val_set, checkpoint):
    """Train, after `checkpoint` if there is one, and return the exit status."""
    mean, std = utils.pixel_statistics(train_set[0])
    train_set = [part[: args.limit].to(device) for part in train_set]
    val_set = val_set and [part[: args.limit].to(device) for part in val_set]
    val_count = len(val_set[1]) if val_set else 0
    torch.manual_seed(args.seed)
    model = LeNet(len(utils.CLASSES[args.dataset]))
    model.to(device, memory_format=torch.channels_last)  # in which a CPU is fastest
    optimizers = make_optimizers(model, args.lr, args.weight_decay)
    history = []
    if checkpoint:
        utils.restore_run(checkpoint, args.run_dir / "last.pt", model, optimizers)
        history = checkpoint["history"]
        save_best(checkpoint, args.run_dir)  # a crash may have come just before
    note_what_is_there(history, args)

    print(f"LeNet-5 with {sum(p.numel() for p in model.parameters()):,} parameters on {device}")
    print(f"{args.dataset}: {len(train_set[1]):,} images to train on, {val_count:,} for validation")
    if len(history) < args.epochs:
        print(f"\n{HEADER}")
    else:
        print(f"This run is already complete: {len(history)} of {args.epochs} epochs are done")
    try:
        train(args, model, optimizers, train_set, val_set, mean, std, history)
    except KeyboardInterrupt:
        print(f"\nStopped: {saved_so_far(history, args)}", file=sys.stderr)
        if history:
            write_metrics(history, args, plot=True)
        return 130
    except FloatingPointError:
        raise utils.Error(
            f"the loss is no longer finite in epoch {len(history) + 1}: start anew with a smaller "
            f"rate, such as --lr {args.lr / 4:g}"
        ) from None
    except utils.Error as error:
        raise utils.Error(f"{error}; {saved_so_far(history, args)}") from error
    write_metrics(history, args, plot=True)
    print_result(history, args, val_count)
    return 0


def main(argv=None):
    args = parse_args(argv)
    device = utils.choose_device(args.device)
    if args.resume:
        args.dataset = utils.newest(args.checkpoint_dir, args.dataset, "last.pt").parent.name
    args.dataset, *data = utils.load_train_images(args.dataset, args.data_dir)
    args.run_dir = args.checkpoint_dir / args.dataset
    args.picture_dir = args.image_dir / args.dataset
    with utils.claim(args.run_dir, args.picture_dir):
        checkpoint = utils.load_checkpoint(args.run_dir / "last.pt") if args.resume else None
        add_options_of_the_run(args, checkpoint)
        splits = (data, None) if args.full else utils.split_train_validation(*data)
        return start(args, device, *splits, checkpoint)


if __name__ == "__main__":
    utils.run(main)
