"""Train a recipe with several seeds, judge each on the test set, and print the README's row.

python tests/reproduce.py                                  the default recipe on FashionMNIST
python tests/reproduce.py --recipe long --full --dataset MNIST --jobs 2
python tests/reproduce.py --recipe muon --seeds 3          a step of the ablation

With --save the single results go to images/results.csv, and from there into images/ablation.png.
The weights of each run stay in checkpoints/reproduce/. --jobs trains as many seeds at once, each on
its share of the cores.
"""

import argparse
import contextlib
import csv
import io
import multiprocessing
import os
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
from benchmark import judge, processor  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

import train  # noqa: E402
import utils  # noqa: E402

RESULTS = ROOT / "images" / "results.csv"
KEYS = ("dataset", "recipe", "full", "epochs", "seed")  # what a run is told by
COLUMNS = (*KEYS, "best_epoch", "val_accuracy", "test_accuracy", "torch", "processor")
STEPS = {  # of the ablation: the batch size, rate and decay that were tuned for each
    "sgd": ["--batch-size=128", "--lr=0.9", "--weight-decay=0"],
    "adamw": ["--batch-size=128", "--lr=0.01", "--weight-decay=0.03"],
    "xavier": ["--batch-size=128", "--lr=0.02", "--weight-decay=0.03"],
    "muon": [],
}
LABELS = {
    "sgd": "sgd: SGD, constant rate",
    "adamw": "adamw: AdamW, one-cycle rate",
    "xavier": "xavier: + initialisation",
    "muon": "muon: + Muon",
    "default": "default: + mirror images",
    "long": "long: + shifts, smooth labels, 150 epochs",
}


def take_away(step):
    """Replace those pieces of train.py, in this process, that a step of the ablation lacks."""
    whole_batches = utils.batches
    utils.batches = lambda *args: whole_batches(*args[:5])  # without augmentation
    if step in ("sgd", "adamw"):
        train.LeNet.reset_parameters = lambda self: None  # leaves PyTorch's own weights
    if step in ("adamw", "xavier"):
        train.make_optimizers = lambda model, lr, weight_decay: [
            torch.optim.AdamW(model.parameters(), lr, weight_decay=weight_decay, fused=True)
        ]
    if step == "sgd":
        train.make_optimizers = lambda model, lr, weight_decay: [
            torch.optim.SGD(model.parameters(), lr, fused=True)
        ]
        train.one_cycle = lambda progress: 1.0


def train_and_judge(run, data_dir, threads):
    """Train and judge one seed, in a process of its own; return its row of results.csv."""
    torch.set_num_threads(threads)
    name = "-".join(str(run[key]) for key in KEYS)
    folder = ROOT / "checkpoints" / "reproduce" / name
    options = [f"--{key}={run[key]}" for key in ("dataset", "epochs", "seed")]
    if run["recipe"] in STEPS:
        take_away(run["recipe"])
        options += STEPS[run["recipe"]]
    else:
        options.append(f"--recipe={run['recipe']}")
    options += ["--full"] if run["full"] else []
    options += [f"--data-dir={data_dir}", f"--output-dir={folder}"]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "log.txt").open("w") as log, contextlib.redirect_stdout(log):
        train.main(options)
    best = utils.load_checkpoint(folder / "checkpoints" / run["dataset"] / "best.pt")
    return run | {
        "best_epoch": best["epoch"],
        "val_accuracy": best["history"][-1].get("val_accuracy", ""),
        "test_accuracy": judge(best, data_dir)[0],
        "torch": str(torch.__version__),
        "processor": processor(),
    }


def read_results():
    """Return the rows of results.csv; numbers as numbers."""
    with RESULTS.open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row["full"] = row["full"] == "True"
        row.update({key: int(row[key]) for key in ("epochs", "seed", "best_epoch")})
        for key in ("val_accuracy", "test_accuracy"):
            row[key] = float(row[key]) if row[key] else ""
    return rows


def write_results(rows):
    """Write results.csv, in the order of data sets, recipes and seeds."""
    names = list(LABELS)
    rows.sort(
        key=lambda r: (r["dataset"], names.index(r["recipe"]), r["epochs"], r["full"], r["seed"])
    )
    text = io.StringIO()
    table = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    utils.write_file(RESULTS, text.getvalue().encode())


def command(run):
    """Return the command line that trains as `run` was trained."""
    line = "python train.py"
    if run["recipe"] in STEPS:
        line = f"python tests/reproduce.py --recipe {run['recipe']}"
    elif run["recipe"] != "default":
        line += f" --recipe {run['recipe']}"
    if run["epochs"] != epochs_of(run["recipe"]):
        line += f" --epochs {run['epochs']}"
    line += " --full" if run["full"] else ""
    return line + (f" --dataset {run['dataset']}" if run["dataset"] != "FashionMNIST" else "")


def epochs_of(recipe):
    recipe = "default" if recipe in STEPS else recipe
    return train.parse_args([f"--recipe={recipe}"]).options["epochs"]


def summary(rows):
    """Return the README's row for the seeds of one recipe on one data set."""
    first, accuracies = rows[0], [100 * row["test_accuracy"] for row in rows]
    validation = "-"
    if not first["full"]:
        validation = f"{statistics.mean(100 * row['val_accuracy'] for row in rows):.2f} %"
    deviation = statistics.stdev(accuracies) if len(rows) > 1 else 0
    return (
        f"| {first['dataset']} | `{command(first)}` | {first['epochs']} | {validation} "
        f"| **{statistics.mean(accuracies):.2f} %** ± {deviation:.2f} | {len(rows)} |"
    )


def plot_ablation(results, path):
    """Draw the test accuracy of each recipe on FashionMNIST: every run a dot, their mean a line."""
    results = [
        row
        for row in results
        if row["dataset"] == "FashionMNIST"
        and not row["full"]
        and row["epochs"] == epochs_of(row["recipe"])
    ]
    recipes = [name for name in LABELS if any(row["recipe"] == name for row in results)]
    figure = Figure(figsize=(8.5, 0.6 * len(recipes) + 1.3), layout="constrained")
    ax = figure.add_subplot()
    for y, name in enumerate(recipes):
        accuracies = [100 * row["test_accuracy"] for row in results if row["recipe"] == name]
        mean = statistics.mean(accuracies)
        ax.plot(accuracies, [y] * len(accuracies), "o", color=utils.BLUE, alpha=0.5, markersize=6)
        ax.plot([mean, mean], [y - 0.3, y + 0.3], color=utils.ORANGE, linewidth=2.5)
        ax.text(mean, y - 0.36, f"{mean:.2f} %", ha="center", fontsize=9, color=utils.ORANGE)
    ax.set_yticks(range(len(recipes)), [LABELS[name] for name in recipes])
    ax.set(ylim=(len(recipes) - 0.5, -0.75), xlabel="Test accuracy (%)")
    ax.grid(axis="x", alpha=0.3)
    ax.set_title("LeNet-5 on FashionMNIST: what each ingredient is worth")
    utils.save_figure(figure, path)


def main():
    parser = argparse.ArgumentParser(description="Train and judge several seeds of a recipe.")
    parser.add_argument("--recipe", choices=tuple(LABELS), default="default")
    parser.add_argument("--dataset", choices=tuple(utils.DATASETS), default="FashionMNIST")
    parser.add_argument("--epochs", type=utils.number(int, 1), help="instead of the recipe's")
    parser.add_argument("--full", action="store_true", help="train on the validation split too")
    parser.add_argument("--seeds", type=utils.number(int, 1), default=5, help="0 to SEEDS - 1")
    parser.add_argument("--jobs", type=utils.number(int, 1), default=1, help="seeds at once")
    parser.add_argument("--save", action="store_true", help="replace these rows of results.csv")
    parser.add_argument("--data-dir", type=Path, default=ROOT / "data")
    args = parser.parse_args()

    epochs = args.epochs or epochs_of(args.recipe)
    runs = [
        dict(zip(KEYS, (args.dataset, args.recipe, args.full, epochs, seed)))
        for seed in range(args.seeds)
    ]
    threads = max(1, os.cpu_count() // args.jobs)
    chosen = []
    with multiprocessing.get_context("spawn").Pool(args.jobs, maxtasksperchild=1) as pool:
        waiting = [pool.apply_async(train_and_judge, (run, args.data_dir, threads)) for run in runs]
        for result in waiting:
            chosen.append(result.get())
            print(f"seed {chosen[-1]['seed']}: {chosen[-1]['test_accuracy']:.2%}", flush=True)
    if args.save:
        kept = [row for row in read_results() if any(row[key] != runs[0][key] for key in KEYS[:-1])]
        write_results([*kept, *chosen])
        plot_ablation(read_results(), ROOT / "images" / "ablation.png")
    print(f"\n{processor()}; torch {torch.__version__}\n")
    print("| data set | command | epochs | validation | test, mean ± s.d. | seeds |")
    print("|---|---|---:|---:|---:|---:|")
    print(summary(chosen))


if __name__ == "__main__":
    utils.run_script(main)
