"""Train LeNet-5 and keep its best weights.

    python train.py                    20 epochs on FashionMNIST
    python train.py --dataset MNIST    the same on handwritten digits
    python train.py --recipe long      150 epochs, for the best results
    python train.py --resume           continue the newest run where it was interrupted

Then `python test.py` reports the accuracy on the test set.
"""

import contextlib
import csv
import io
import math
import sys
import time

import utils  # must come first: it sets an environment variable for torch
import torch
import torch.nn.functional as F
from tqdm import tqdm

from images.plots import plot_metrics
from model import LeNet
from utils import DATASETS, METRICS, Error, best_row, output_path, shown

RECIPES = {  # sets of defaults
    "default": {},
    "long": {"epochs": 150, "weight_decay": 0.01, "shift": 1, "label_smoothing": 0.05},
}


def make_parser():
    parser = utils.Parser("Train LeNet-5 and keep the weights of the best epoch.")
    add, number = parser.add_argument, utils.number_type
    text = "auto: FashionMNIST or, if it cannot be downloaded, the built-in Glyphs"
    add("--dataset", choices=("auto", *DATASETS), default="auto", help=text)
    parser.add_shared_options()
    add("--resume", action="store_true", help="continue the newest run, or the one named by --name")
    text = "set of defaults; long: 150 epochs, weight decay 0.01, shift 1, label smoothing 0.05"
    add("--recipe", choices=RECIPES, default="default", help=text)
    add("--epochs", type=number(int, 1), default=20, help="passes over the training images")
    add("--batch-size", type=number(int, 1), default=256, help="images per step")
    add("--lr", type=number(float, 1e-12), default=0.05, help="peak learning rate")
    add("--weight-decay", type=number(float, 0), default=0.015, help="weight decay")
    text = "largest augmentation shift in pixels (default: 1 for digits, 0 for clothes)"
    add("--shift", type=number(int, 0, 28), help=text)
    add("--label-smoothing", type=number(float, 0, 1), default=0.0, help="label smoothing factor")
    add("--seed", type=number(int, 0), default=0, help="random seed")
    text = "use only the first LIMIT training and LIMIT validation images (default: all)"
    add("--limit", type=number(int, 1), help=text)
    text = "train on all images without validation, and keep the weights of the last epoch"
    add("--full", action="store_true", help=text)
    return parser


OPTIONS = "recipe epochs batch_size lr weight_decay shift label_smoothing seed limit full".split()


def parse_args(argv):
    """Parse the command line.

    Returns:
        args (namespace): the options not in OPTIONS: dataset, name, paths, device and resume.
        options (dict): the OPTIONS, which determine the result and are saved with it.
    """
    parser = make_parser()
    parser.set_defaults(**RECIPES[parser.parse_args(argv).recipe])  # other options override it
    args = parser.parse_args(argv)
    options = {name: vars(args).pop(name) for name in OPTIONS}
    return args, options


def check_resume_options(argv, run, path):
    """Raise an `Error` if an option on the command line differs from the run to be resumed."""
    parser = make_parser()
    parser.set_defaults(**run["options"])
    args = vars(parser.parse_args(argv))
    for name, value in run["options"].items():
        if args[name] != value:
            flag = f"--{name.replace('_', '-')}"
            raise Error(f"{flag} differs from {shown(path)}: omit it, or start without --resume")


# --- Optimizers -----------------------------------------------------------------------------------


class Muon(torch.optim.Optimizer):
    """SGD with Nesterov momentum, where the update of each weight matrix is orthogonalized.

    A raw gradient is dominated by a few directions; orthogonalizing gives all directions about
    the same size. A convolution's weight is treated as a matrix with one row per output channel.
    Weights decay by the factor 1 - lr * weight_decay, as in AdamW.

    Source: Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024,
    https://kellerjordan.github.io/posts/muon/
    """

    def __init__(self, params, lr, momentum=0.95, weight_decay=0.0):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure=None):
        """Update all parameters from their gradients. Return the loss if there is a closure."""
        loss = None
        if closure:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            lr, momentum, decay = group["lr"], group["momentum"], group["weight_decay"]
            for p in group["params"]:
                if p.grad is None:  # not used in forward
                    continue
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                average = state["momentum_buffer"].lerp_(p.grad, 1 - momentum)
                update = newton_schulz(p.grad.lerp(average, momentum).flatten(1))
                rows, columns = update.shape
                update = update.view(p.shape) * max(1, rows / columns) ** 0.5  # Muon's 2-D factor
                p.mul_(1 - lr * decay).sub_(lr * update)
        return loss


def newton_schulz(matrix, steps=3):
    """Approximate U V^T, where U S V^T is the singular value decomposition of `matrix` (2-D).

    Each step applies a polynomial that raises small singular values quickly and keeps large ones
    between about 0.7 and 1.2. The authors of Muon use 5 steps; 3 are enough here.
    """
    if len(matrix) > matrix.shape[1]:
        return newton_schulz(matrix.t(), steps).t()
    x = matrix / (matrix.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.t()
        # x = a x + (b x x^T + c (x x^T)^2) x, with Muon's a, b and c; addmm is fastest
        polynomial = torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.addmm(x, polynomial, x, beta=3.4445)
    return x


def make_optimizers(model, lr, weight_decay):
    """Return Muon for the weights of the hidden layers, and AdamW for all other parameters.

    Args:
        lr, weight_decay: values for Muon. AdamW uses half the lr and twice the weight decay.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trainable if p.ndim > 1]
    vectors = [p for p in trainable if p.ndim <= 1]
    hidden, output = matrices[:-1], matrices[-1:]
    muon = Muon([{"params": hidden}], lr, weight_decay=weight_decay)  # hidden may be empty
    adamw = torch.optim.AdamW(
        [{"params": vectors + output}], lr / 2, weight_decay=2 * weight_decay, fused=True
    )
    return [muon, adamw]


WARMUP = 0.3  # fraction of the run in which the learning rate rises


def one_cycle(progress):
    """Return the learning rate as a fraction of its peak, at `progress` (0 to 1) through the run.

    Source: Smith and Topin, "Super-convergence", 2017; here with cosine instead of linear ramps.
    """
    if progress < WARMUP:
        return 0.04 + 0.96 * (1 - math.cos(math.pi * progress / WARMUP)) / 2
    return (1 + math.cos(math.pi * (progress - WARMUP) / (1 - WARMUP))) / 2


# --- Training -------------------------------------------------------------------------------------


def train(args, run, model, optimizers, train_set, val_set):
    """Train for the remaining epochs. After each one, save the run and print its metrics.

    Args:
        run: dict, see `load_checkpoint` in utils.py; updated after each epoch.
        train_set, val_set: images (uint8, N x 28 x 28) and labels (int64, N) on the device of
            `model`; val_set is None with --full.

    Raises:
        Error: training diverged, or a checkpoint cannot be written.
    """
    options = run["options"]
    for epoch in range(len(run["history"]) + 1, options["epochs"] + 1):
        start_time = time.perf_counter()
        row = {"epoch": epoch} | train_epoch(run, model, optimizers, train_set, epoch)
        if val_set:
            images, labels = val_set
            logits = utils.predict(model, images, mean=run["mean"], std=run["std"])
            totals = loss_and_correct(logits, labels)
            row["val_loss"], row["val_accuracy"] = (totals / len(labels)).tolist()
        weights_finite = all(p.isfinite().all() for p in model.parameters())
        if not weights_finite or not all(math.isfinite(value) for value in row.values()):
            advice = f"restart with a smaller learning rate, such as --lr {options['lr'] / 4:g}"
            raise Error(f"training diverged in epoch {epoch}: {advice}")
        save_epoch(args, run, model, optimizers, row)
        print_epoch(run, time.perf_counter() - start_time)


def train_epoch(run, model, optimizers, train_set, epoch):
    """Train on each image once, and return the metrics: lr, train_loss and train_accuracy."""
    options, dataset = run["options"], DATASETS[run["dataset"]]
    images, labels = train_set
    batches = utils.batches(
        images,
        labels,
        mean=run["mean"],
        std=run["std"],
        batch_size=options["batch_size"],
        flip=dataset.flip,
        shift=dataset.shift if options["shift"] is None else options["shift"],
        strokes=dataset.strokes,
    )
    epoch_steps = len(utils.batch_slices(len(labels), options["batch_size"]))
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    totals = torch.zeros(2, device=labels.device)  # reading it at every step would stall a GPU
    bar = tqdm(batches, total=epoch_steps, file=sys.stdout, disable=None, leave=False)
    model.train()
    for step, (x, y) in enumerate(bar, start=(epoch - 1) * epoch_steps):
        factor = one_cycle(step / (options["epochs"] * epoch_steps))
        for group in groups:
            group["lr"] = factor * group.setdefault("initial_lr", group["lr"])  # the peak
        logits = model(x)
        loss = F.cross_entropy(logits, y, label_smoothing=options["label_smoothing"])
        model.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        totals += loss_and_correct(logits.detach(), y)
    loss, accuracy = (totals / len(labels)).tolist()
    return {"lr": groups[0]["lr"], "train_loss": loss, "train_accuracy": accuracy}


def loss_and_correct(logits, labels):
    """Return one tensor: [summed loss without label smoothing, number of correct predictions]."""
    loss = F.cross_entropy(logits, labels, reduction="sum")
    return torch.stack([loss, (logits.argmax(dim=1) == labels).sum()])


def save_epoch(args, run, model, optimizers, row):
    """Append `row` to the history of `run`, and save the run and its metrics.

    best.pt is written before last.pt and can be resumed: a crash in between loses nothing.
    """
    updated = run | {"epoch": row["epoch"], "history": [*run["history"], row]}
    updated["model"] = portable_weights(model)
    updated["logits"] = utils.fixed_image_logits(model)
    if row["epoch"].bit_count() == 1:  # a power of 2: weights change most in early epochs
        updated["snapshots"] = [*run["snapshots"], snapshot(model, row["epoch"])]
    updated["optimizers"] = [optimizer.state_dict() for optimizer in optimizers]
    updated["rng_state"] = torch.get_rng_state()
    names = ["best.pt", "last.pt"] if best_row(updated["history"]) is row else ["last.pt"]
    try:
        for name in names:
            utils.save(updated, output_path(args, run, name))
            run.update(updated)  # after the first file, because it is enough to resume
    except Error as error:
        raise Error(f"{error}. {resume_hint(args, run)}") from error
    write_metrics(args, run)


def portable_weights(model):
    """Copy the weights, contiguous and on the CPU, so that other tools can read them."""
    return {name: w.cpu().contiguous().clone() for name, w in model.state_dict().items()}


def snapshot(model, epoch):
    """Copy the weights for lenet5.html: as float16 where they fit, and without integer buffers."""
    weights = {}
    for name, weight in portable_weights(model).items():
        if weight.is_floating_point():
            half = weight.half()
            weights[name] = half if half.isfinite().all() else weight
    return {"epoch": epoch, "weights": weights}


def write_metrics(args, run, plot=False):
    """Write metrics.csv and, with `plot`, metrics.png; on failure, warn and return False."""
    text = io.StringIO()
    table = csv.DictWriter(text, METRICS, lineterminator="\n")
    table.writeheader()
    table.writerows(run["history"])
    try:
        utils.write_file(output_path(args, run, "metrics.csv"), text.getvalue().encode())
        if plot:
            plot_metrics(run["history"], run["dataset"], output_path(args, run, "metrics.png"))
        return True
    except Error as error:
        print(f"Warning: {error}", file=sys.stderr)
        return False


# --- Output ---------------------------------------------------------------------------------------

ROW_FORMAT = "{:>9}{:>16}{:>13}{:>11}{:>18}{:>11}{:>10}"
TITLES = "epoch,learning rate,train loss,accuracy,validation loss,accuracy,seconds".split(",")


def print_start(args, run, model):
    parameters = sum(p.numel() for p in model.parameters())
    print(f"LeNet-5 with {parameters:,} parameters on {next(model.parameters()).device}")
    count, val_count = run["counts"]
    print(f"{run['dataset']}: {count:,} images to train on, {val_count:,} for validation")
    logits = utils.fixed_image_logits(model)
    probabilities = utils.probabilities(logits)  # the logits, if forward ends in a softmax
    forms = probabilities, probabilities.log()  # what softmax and log_softmax return
    if any(torch.allclose(logits, form, atol=1e-4) for form in forms):
        text = "forward in model.py ends in a softmax, which the loss applies again: remove it"
        print(f"Warning: {text}", file=sys.stderr)
    best = output_path(args, run, "best.pt")
    epoch, epochs = len(run["history"]), run["options"]["epochs"]
    if epoch == epochs:
        print(f"Run {run['name']}: already finished after {epochs} epochs")
        return
    if epoch:
        print(f"Run {run['name']}: resuming after epoch {epoch}")
    elif best.exists():
        print(f"Note: this replaces the run in {shown(best.parent)}; use --name to keep it")
    print(f"\n{ROW_FORMAT.format(*TITLES)}")


def print_epoch(run, seconds):
    history, options = run["history"], run["options"]
    row = history[-1]
    cells = [f"{row['epoch']}/{options['epochs']}", f"{row['lr']:.2e}"]
    cells += [f"{row['train_loss']:.4f}", f"{row['train_accuracy']:.2%}"]
    validated = "val_loss" in row
    cells += [f"{row['val_loss']:.4f}", f"{row['val_accuracy']:.2%}"] if validated else ["-", "-"]
    suffix = "  best so far" if not options["full"] and best_row(history) is row else ""
    print(ROW_FORMAT.format(*cells, f"{seconds:.1f}") + suffix, flush=True)
    at_chance = row["train_accuracy"] < 1.5 / len(DATASETS[run["dataset"]].classes)
    warmup_ended = row["epoch"] == math.ceil(WARMUP * options["epochs"])
    steps = row["epoch"] * run["counts"][0] / options["batch_size"]
    if at_chance and warmup_ended and steps >= 200:  # with fewer, any network can be at chance
        text = f"accuracy is still at chance level with --lr {options['lr']}; try another value"
        print(f"Warning: {text}", file=sys.stderr)


def print_result(args, run, plotted):
    row = best_row(run["history"])
    result = f"Last epoch: {row['epoch']}, trained without validation"
    if "val_accuracy" in row:
        count = run["counts"][1]
        result = f"Best epoch: {row['epoch']} of {run['options']['epochs']}, "
        result += f"validation accuracy on {run['dataset']} {row['val_accuracy']:.2%} "
        result += f"({round(row['val_accuracy'] * count)}/{count})"
    print(f"\n{result}")
    print(f"Weights:    {shown(output_path(args, run, 'best.pt'))}")
    if plotted:
        print(f"Plot:       {shown(output_path(args, run, 'metrics.png'))}, values in metrics.csv")
    print(f"Next:       {utils.shell_command('test.py', args, run)}")


def resume_hint(args, run):
    if not run["history"]:
        return "No epoch has been saved yet."
    resume_command = utils.shell_command("train.py", args, run, "--resume")
    return f"Epoch {len(run['history'])} is saved. To continue: {resume_command}"


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    args, options = parse_args(argv)
    device = utils.choose_device(args.device)
    torch.empty(31 * 2**20, dtype=torch.uint8)  # so malloc keeps freed blocks: 25% faster
    path = None
    run = {"name": args.name, "dataset": args.dataset, "options": options, "history": []}
    if args.resume:
        path, run = utils.newest_checkpoint(args, resume=True)
        args.name, args.dataset = run["name"], run["dataset"]
    run["dataset"], images, labels = utils.load_training_images(run["dataset"], args.data_dir)
    run["name"] = run["name"] or run["dataset"]
    with utils.locked(args, run):
        if args.resume:  # read it again: another process may have continued it
            path, run = utils.newest_checkpoint(args, resume=True)
            check_resume_options(argv, run, path)
        train_set, val_set = prepare_images(run, images, labels, device)
        model, optimizers = prepare_model(run, path, device)
        print_start(args, run, model)
        try:
            train(args, run, model, optimizers, train_set, val_set)
        except KeyboardInterrupt:
            if run["history"]:
                with contextlib.suppress(KeyboardInterrupt):  # a second Ctrl-C skips the plot
                    write_metrics(args, run, plot=True)
            raise KeyboardInterrupt(resume_hint(args, run)) from None
        print_result(args, run, plotted=write_metrics(args, run, plot=True))


def prepare_images(run, images, labels, device):
    """Split the images according to --full and --limit, and move them to `device`.

    Store the counts in `run`, and the mean and standard deviation, which ignore --limit.

    Returns:
        (images, labels) for training, and (images, labels) for validation or None.
    """
    limit = run["options"]["limit"]
    train_set, val_set = (images, labels), None
    if not run["options"]["full"]:
        train_set, val_set = utils.split_train_validation(images, labels)
        val_set = [tensor[:limit].to(device) for tensor in val_set]
    run["mean"], run["std"] = utils.mean_and_std(train_set[0])
    train_set = [tensor[:limit].to(device) for tensor in train_set]
    run["counts"] = [len(train_set[1]), len(val_set[1]) if val_set else 0]
    return train_set, val_set


def prepare_model(run, path, device):
    """Make the network and its optimizers, and restore them if `run` was read from `path`."""
    options = run["options"]
    num_classes = len(DATASETS[run["dataset"]].classes)
    unseeded = utils.to_device(LeNet(num_classes), num_classes, torch.device("cpu"))
    torch.manual_seed(options["seed"])
    model = utils.to_device(LeNet(num_classes), num_classes, device)
    # With equal weights, both must return equal logits. Otherwise test.py could not load the run.
    unseeded.load_state_dict(model.state_dict())
    if not utils.same_logits(utils.fixed_image_logits(unseeded), utils.fixed_image_logits(model)):
        raise Error(
            "forward returns NaN, or different logits for equal weights, so a checkpoint cannot "
            "restore the network: pass training=self.training to F.dropout; store state in buffers"
        )
    optimizers = make_optimizers(model, options["lr"], options["weight_decay"])
    if path:
        restore(path, run, model, optimizers)
    else:
        run["version"] = utils.CHECKPOINT_VERSION
        run["snapshots"] = [snapshot(model, epoch=0)]
    run["code"] = utils.source_code(model)  # now, because the file may be edited during the run
    return model, optimizers


def restore(path, run, model, optimizers):
    """Restore the weights, optimizers and RNG state from `run`, which was read from `path`."""
    utils.load_weights(path, run, model)
    if "optimizers" not in run:
        raise Error(f"{shown(path)} contains only weights and cannot be resumed")
    message = f"{shown(path)} cannot be resumed: the parameters in model.py or their order changed"
    if list(run["model"]) != list(model.state_dict()):  # optimizer states have no names
        raise Error(message)
    with utils.errors_as(message, RuntimeError, ValueError):
        for optimizer, state in zip(optimizers, run["optimizers"]):
            optimizer.load_state_dict(state)
    torch.set_rng_state(run["rng_state"])
    if path.name == "best.pt":  # the run was killed before it wrote last.pt
        utils.save(run, path.with_name("last.pt"))


if __name__ == "__main__":
    utils.run_script(main)
