"""Train LeNet-5 and keep its best weights.

    python train.py                    20 epochs on FashionMNIST
    python train.py --dataset MNIST    the same on handwritten digits
    python train.py --recipe long      150 epochs, the best results
    python train.py --resume           go on with the newest run, where it was interrupted

Then `python test.py` reports the accuracy on the test set.
"""

import csv
import io
import math
import sys
import time

import utils  # first: it sets what torch reads when it is imported
import torch
import torch.nn.functional as F
from tqdm import tqdm

from model import LeNet, layer_table, trace

RECIPES = {  # sets of defaults, in place of those in parse_args
    "default": {},
    "long": {"epochs": 150, "weight_decay": 0.01, "shift": 1, "label_smoothing": 0.05},
}


def parse_args(argv):
    """Parse the command line; `options` of the result are those of the run, saved with it."""
    parser = utils.Parser("Train LeNet-5 and keep the weights of the best epoch.")
    dataset = "auto: FashionMNIST or, if it cannot be had, the built-in Glyphs"
    parser.add_options_of_a_run(dataset)
    add, number = parser.add_argument, utils.number
    add("--resume", action="store_true", help="go on with the newest run, or with --name")
    recipe = f"a set of defaults; long: {RECIPES['long']}".replace("'", "")
    shift = "most pixels by which images are moved (default: 1 for digits, 0 for clothes)"
    options = [
        add("--recipe", choices=tuple(RECIPES), default="default", help=recipe),
        add("--epochs", type=number(int, 1), default=20, help="passes over the train split"),
        add("--batch-size", type=number(int, 1), default=256, help="images in a step"),
        add("--lr", type=number(float, 0, above=True), default=0.05, help="peak learning rate"),
        add("--weight-decay", type=number(float, 0), default=0.015, help="decoupled"),
        add("--shift", type=number(int, 0, 28), help=shift),
        add("--label-smoothing", type=number(float, 0, 1), default=0.0, help="of the loss"),
        add("--seed", type=number(int, 0), default=0, help="of all random numbers"),
        add("--limit", type=number(int, 1), help="only the first LIMIT images (default: all)"),
        add("--full", action="store_true", help="fit the validation images too, keep the end"),
    ]
    args = parser.parse_args(argv)
    parser.set_defaults(**RECIPES[args.recipe])
    args = parser.parse_args(argv)
    args.options = {option.dest: getattr(args, option.dest) for option in options}
    return args


def resumed_options(saved, argv, path):
    """Return the options of the run in `path`: those `saved` with it, which `argv` may repeat.

    Raises:
        Error: `argv` contradicts them, or they are not such as this version takes.
    """

    def typed(name, value):
        flag = f"--{name.replace('_', '-')}"
        if value is None or value is False:
            return f"no {flag}"
        return flag if value is True else f"{flag}={value}"

    shown, known = utils.relative(path), parse_args([]).options
    words = [typed(name, value) for name, value in saved.items() if name in known]
    line = [word for word in words if not word.startswith("no ")]
    try:
        options = parse_args(line).options
    except utils.Error as error:
        raise utils.Error(f"{shown} cannot be resumed by this version: {error}") from error
    for name, value in parse_args([*line, *argv]).options.items():
        if value != options[name]:
            raise utils.Error(
                f"{typed(name, value)} contradicts {shown}, whose run has "
                f"{typed(name, options[name])}: leave it out, or start a new run without --resume"
            )
    return options


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
                if p.grad is None:  # forward does not use it
                    continue
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
        # x = a x + (b x x^T + c (x x^T)^2) x, with the authors' a, b and c
        polynomial = torch.addmm(square, square, square, beta=-4.7750, alpha=2.0315)
        x = torch.addmm(x, polynomial, x, beta=3.4445)
    return x


def make_optimizers(model, lr, weight_decay):
    """Return Muon for the weights of the hidden layers, and AdamW for all other parameters.

    Hidden are all weights of two and more dimensions but the last that is used; what is frozen
    (requires_grad is False) gets no optimizer.

    Args:
        lr, weight_decay: of Muon; AdamW has half the rate and twice the decay.

    Raises:
        Error: all parameters are frozen.
    """
    used = [p for layer in trace(model).layers for p in layer.parameters if p.ndim > 1]
    hidden = set(used[:-1])
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise utils.Error("there is nothing to train: all parameters in model.py are frozen")
    matrices = {"params": [p for p in trained if p in hidden]}  # a group may be empty
    others = {"params": [p for p in trained if p not in hidden]}
    muon = Muon([matrices], lr, weight_decay=weight_decay)
    adamw = torch.optim.AdamW([others], lr / 2, weight_decay=2 * weight_decay, fused=True)
    return [muon, adamw]


WARM_UP = 0.3  # share of the run in which the rate rises


def one_cycle(progress):
    """Return the learning rate as a share of its peak, at `progress` (0 to 1) through the run.

    Source: Smith and Topin, "Super-convergence", 2017; here with a cosine up and a cosine down.
    """
    if progress < WARM_UP:
        return 0.04 + 0.96 * (1 - math.cos(math.pi * progress / WARM_UP)) / 2
    return (1 + math.cos(math.pi * (progress - WARM_UP) / (1 - WARM_UP))) / 2


def train(args, run, model, optimizers, train_set, val_set):
    """Train epoch after epoch; after each one save the run, its best weights and its metrics.

    Args:
        args: where the files are.
        run: what last.pt holds; after each epoch its history has one row more.
        train_set, val_set: images (uint8, N x 28 x 28) and labels (int64, N) on the device of
            `model`; val_set is None with --full.

    Raises:
        Error: the loss is not finite, or a checkpoint cannot be written.
    """
    options, mean, std = run["options"], run["mean"], run["std"]
    data = utils.DATASETS[run["dataset"]]
    shift = data["shift"] if options["shift"] is None else options["shift"]
    count = len(train_set[1])
    steps = math.ceil(count / options["batch_size"])  # in an epoch
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    peaks = [group["lr"] for group in groups]
    for epoch in range(len(run["history"]) + 1, options["epochs"] + 1):
        began = time.perf_counter()
        total = torch.zeros(2, device=train_set[1].device)  # reading it each step would stall a GPU
        augmentation = data["mirror"], shift, data["strokes"]
        batches = utils.batches(*train_set, mean, std, options["batch_size"], *augmentation)
        bar = tqdm(batches, total=steps, file=sys.stdout, disable=None, leave=False, unit="batch")
        model.train()
        for step, (x, y) in enumerate(bar, start=(epoch - 1) * steps):
            rate = one_cycle(step / (options["epochs"] * steps))
            for group, peak in zip(groups, peaks):
                group["lr"] = rate * peak
            logits = model(x)
            loss = F.cross_entropy(logits, y, label_smoothing=options["label_smoothing"])
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
        whole = all(parameter.isfinite().all() for parameter in model.parameters())
        if not whole or not all(map(math.isfinite, numbers)):
            raise utils.Error(
                f"the loss is no longer finite in epoch {epoch}: start anew with a smaller rate, "
                f"such as --lr {options['lr'] / 4:g}"
            )
        row = dict(zip(utils.HISTORY, (epoch, rate * options["lr"], *numbers)))
        keep(args, run, model, optimizers, row)
        print_epoch(run, steps, time.perf_counter() - began)


def loss_and_right(logits, labels):
    """Return the sum of the losses and the number of right answers, as one tensor."""
    loss = F.cross_entropy(logits, labels, reduction="sum")
    return torch.stack([loss, (logits.argmax(dim=1) == labels).sum()])


def keep(args, run, model, optimizers, row):
    """Add `row` to the history of `run`, and save the run as it is now.

    Raises:
        Error: a checkpoint cannot be written; it says what is saved, and how to go on.
    """
    epoch = row["epoch"]
    small = [copy_weights(model, epoch)] if epoch & (epoch - 1) == 0 else []  # a power of 2
    state = {
        "torch": str(torch.__version__),  # a plain str, which every version of torch can read
        "epoch": epoch,
        "history": [*run["history"], row],
        "copies": [*run["copies"], *small],
        "model": model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "random": torch.get_rng_state(),
    }
    try:
        utils.save(run | state, utils.file_of(args, run, "last.pt"))
        run.update(state)  # from here on the epoch counts as saved
        keep_best(args, run)
    except utils.Error as error:
        raise utils.Error(f"{error}; {saved_so_far(args, run)}") from error
    write_metrics(args, run)


def copy_weights(model, epoch):
    """Return the weights in half precision; the page shows with them how the network learnt."""
    weights = {n: w.half() for n, w in model.state_dict().items() if w.is_floating_point()}
    return {"epoch": epoch, "weights": weights}


def keep_best(args, run):
    """Write best.pt if the last epoch of `run`, which last.pt holds, is the best so far.

    After last.pt: if a crash comes between the two, the same call brings best.pt up to date.
    """
    if utils.best_epoch(run["history"]) is run["history"][-1]:
        best = {key: run[key] for key in run if key not in ("optimizers", "random")}
        utils.save(best, utils.file_of(args, run, "best.pt"))


def write_metrics(args, run, plot=False):
    """Write metrics.csv and, with `plot`, metrics.png; where that fails, warn and go on."""
    text = io.StringIO()
    table = csv.DictWriter(text, utils.HISTORY, lineterminator="\n")
    table.writeheader()
    table.writerows(run["history"])
    path = utils.file_of(args, run, "metrics.png")
    with utils.warn(), utils.refuse(path, "cannot draw {path}: {error}"):
        utils.write_file(path.with_suffix(".csv"), text.getvalue().encode())
        if plot:
            utils.plot_metrics(run["history"], run["dataset"], path)


# --- What is printed ------------------------------------------------------------------------------

COLUMNS = "{:>9}{:>16}{:>13}{:>11}{:>18}{:>11}{:>10}"
NAMES = ("epoch", "learning rate", "train loss", "accuracy", "validation loss", "accuracy")


def print_start(args, run, model, traced, count, val_count):
    """Print what is trained on how many images, and what one should know before."""
    best, last = utils.file_of(args, run, "best.pt"), utils.file_of(args, run, "last.pt")
    done, epochs = len(run["history"]), run["options"]["epochs"]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"LeNet-5 with {parameters:,} parameters on {next(model.parameters()).device}")
    print(f"{run['dataset']}: {count:,} images to train on, {val_count:,} for validation")
    if traced.softmax:
        note = f"forward ends in {traced.softmax}, and the loss has one of its own: return the "
        print(f"Warning: {note}values before it", file=sys.stderr)
    if not done and last.exists():
        note = f"the run in {utils.relative(last.parent)} is overwritten after the first epoch; "
        note += "to keep it, stop with Ctrl-C, and start with another --name, or --resume it"
        print(f"Note: {note}", file=sys.stderr)
    if done and not best.exists():
        epoch = utils.best_epoch(run["history"])["epoch"]
        note = f"{utils.relative(best)} is gone, and with it the weights of epoch {epoch}; "
        print(f"Note: {note}it comes back with the next better one", file=sys.stderr)
    if done:
        note = "" if done < epochs else ": it is already complete"
        print(f"Run {run['name']}: {done} of {epochs} epochs are done{note}")
    if done < epochs:
        print(f"\n{COLUMNS.format(*NAMES, 'seconds')}")


def print_epoch(run, steps, seconds):
    """Print the line of the last epoch, of so many steps and seconds; warn if nothing is learnt."""
    history, options = run["history"], run["options"]
    epoch, rate, *numbers = history[-1].values()
    cells = [f"{epoch}/{options['epochs']}", f"{rate:.2e}"]
    for loss, accuracy in zip(numbers[::2], numbers[1::2]):
        cells += [f"{loss:.4f}" if loss < 1e5 else f"{loss:.2e}", f"{accuracy:.2%}"]
    cells += ["-"] * (len(NAMES) - len(cells))  # with --full there is no validation
    best = not options["full"] and utils.best_epoch(history) is history[-1]
    note = "  best so far" if best else ""
    print(COLUMNS.format(*cells, f"{seconds:.1f}") + note, flush=True)
    warmed_up = epoch - 1 < WARM_UP * options["epochs"] <= epoch  # in this epoch
    chance = numbers[1] < 1.5 / len(run["classes"])
    if chance and warmed_up and epoch * steps >= 200 and epoch < options["epochs"]:
        warning = f"after {epoch} epochs the accuracy is still at chance. Stop with Ctrl-C, and "
        warning += f"start anew with another --lr than {options['lr']}"
        print(f"Warning: {warning}", file=sys.stderr)


def print_result(args, run, val_count):
    """Print what the run has reached, where it is, and what to do next."""
    row, arguments = utils.best_epoch(run["history"]), []
    weights, note = utils.file_of(args, run, "best.pt"), ""
    if not weights.exists():
        weights, note = utils.file_of(args, run, "last.pt"), ", of the last epoch"
        arguments = ["--checkpoint", utils.relative(weights)]
    result = f"Last epoch: {row['epoch']}; no image was held back to validate it"
    if val_count:
        accuracy, right = row["val_accuracy"], round(row["val_accuracy"] * val_count)
        result = f"Best epoch: {row['epoch']} of {run['options']['epochs']}, validation accuracy "
        result += f"on {run['dataset']} {accuracy:.2%} ({right}/{val_count})"
    plot = utils.relative(utils.file_of(args, run, "metrics.png"))
    print(f"\n{result}")
    print(f"Weights:    {utils.relative(weights)}{note}")
    print(f"Plot:       {plot}, its numbers in metrics.csv")
    print(f"Next:       {utils.command('test.py', args, run, *arguments)}")


def saved_so_far(args, run):
    """Say what is safe, and how to go on."""
    if not run["history"]:
        return "no epoch was saved yet"
    last = utils.relative(utils.file_of(args, run, "last.pt"))
    again = utils.command("train.py", args, run, "--resume")
    return f"epoch {len(run['history'])} is saved in {last}; go on with: {again}"


# --- From the options to the result ---------------------------------------------------------------


def start(args, run, device, train_set, val_set):
    """Train `run`, new or loaded, to its end."""
    options, classes = run["options"], utils.DATASETS[run["dataset"]]["classes"]
    mean, std = utils.pixel_statistics(train_set[0])
    train_set = [part[: options["limit"]].to(device) for part in train_set]
    val_set = val_set and [part[: options["limit"]].to(device) for part in val_set]
    val_count = len(val_set[1]) if val_set else 0
    torch.manual_seed(options["seed"])
    model = utils.prepare(LeNet(len(classes)), len(classes), device)
    optimizers = make_optimizers(model, options["lr"], options["weight_decay"])
    if run["history"]:
        last, best = utils.file_of(args, run, "last.pt"), utils.file_of(args, run, "best.pt")
        utils.restore(last, run, model, optimizers)
        if not best.exists() or best.stat().st_mtime < last.stat().st_mtime:
            keep_best(args, run)  # a crash may have come between the two
    run.setdefault("copies", [] if run["history"] else [copy_weights(model, epoch=0)])
    traced = trace(model)
    run |= {"format": utils.FORMAT, "layers": layer_table(traced)}
    run |= {"classes": classes, "mean": mean, "std": std}
    print_start(args, run, model, traced, len(train_set[1]), val_count)
    try:
        train(args, run, model, optimizers, train_set, val_set)
    except KeyboardInterrupt:
        if run["history"]:
            write_metrics(args, run, plot=True)
        raise KeyboardInterrupt(saved_so_far(args, run)) from None
    write_metrics(args, run, plot=True)
    print_result(args, run, val_count)
    return 0


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    device = utils.choose_device(args.device)
    utils.keep_freed_memory()
    run = {"name": args.name, "dataset": args.dataset, "options": args.options, "history": []}
    if args.resume:
        path, run = utils.newest(args, "last.pt")
        run["options"] = resumed_options(run["options"], argv, path)
    run["dataset"], images, labels = utils.load_train_images(run["dataset"], args.data_dir)
    run["name"] = run["name"] or run["dataset"]
    files = [utils.file_of(args, run, name) for name in ("last.pt", "metrics.csv")]
    with utils.claim(*(file.parent for file in files)):
        if run["options"]["full"]:
            return start(args, run, device, (images, labels), None)
        return start(args, run, device, *utils.split_train_validation(images, labels))


if __name__ == "__main__":
    utils.run_script(main)
