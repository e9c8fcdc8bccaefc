"""Train with several seeds, evaluate each on the test set, and print a row of tests/README.md.

python tests/measure.py                                         the default recipe on FashionMNIST
python tests/measure.py --recipe long --full --dataset MNIST    another recipe and dataset
python tests/measure.py ablation-muon --seeds 3                 a step of the ablation
python tests/measure.py relu tanh --seeds 3                     exercises: validation only

A name is a patch in tests/exercises. It is applied to a copy of the scripts, and trained with the
options in its header. The runs stay in checkpoints/, and are not trained again. --jobs trains
several seeds at once. --save writes the results to images/results.csv, from which it draws
images/ablation.png.
"""

import csv
import io
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from benchmark import processor
from matplotlib.figure import Figure

import train
import utils
from images import plots

RESULTS = ROOT / "images" / "results.csv"
KEYS = ("dataset", "recipe", "full", "epochs", "seed")  # recipe: of train.py, or a patch
COLUMNS = (*KEYS, "best_epoch", "val_accuracy", "test_accuracy", "torch", "processor")
LABELS = {  # of the ablation
    "ablation-sgd": "SGD, constant learning rate",
    "ablation-adamw": "AdamW, one-cycle learning rate",
    "ablation-xavier": "+ Xavier initialization",
    "ablation-muon": "+ Muon",
    "default": "+ flipped images: the default",
    "long": "+ shifts, label smoothing, 150 epochs: long",
}


def patch_file(name):
    """Return the path of a patch."""
    path = ROOT / "tests" / "exercises" / f"{name}.diff"
    if not path.exists():
        raise utils.Error(f"there is no exercise {name} in tests/exercises")
    return path


def patch_options(name):
    """Return the options of train.py in the header of a patch, without --name."""
    line = re.search(r"^python train.py(.*) --name", patch_file(name).read_text(), re.MULTILINE)
    return line[1].split()


def copy_patched(name, directory):
    """Copy the scripts into `directory`, and apply the patch `name` if it is not empty."""
    for pattern in ("*.py", "images/*.py", "images/*.html", "images/page/*"):
        for path in ROOT.glob(pattern):
            target = directory / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    if name:
        subprocess.run(["git", "apply", patch_file(name)], cwd=directory, check=True)


def train_and_test(run, patch, args):
    """Train one seed in a new process, unless it is already trained.

    Returns:
        its row of results.csv; test_accuracy is empty for exercises.
    """
    name = "-".join(str(run[key]) for key in KEYS)
    options = [f"--{key}={run[key]}" for key in ("dataset", "epochs", "seed")]
    options += patch_options(patch) if patch else [f"--recipe={run['recipe']}"]
    options += ["--full"] if run["full"] else []
    common = [f"--name={name}", f"--data-dir={args.data_dir}", f"--output-dir={ROOT}"]
    threads = max(1, os.cpu_count() // args.jobs)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    how = {"check": True, "capture_output": True, "text": True, "env": environment}
    best = ROOT / "checkpoints" / name / "best.pt"
    out = ""
    with tempfile.TemporaryDirectory() as directory:
        copy_patched(patch, Path(directory))
        if not best.exists():
            line = [sys.executable, Path(directory, "train.py"), *options, *common]
            subprocess.run(line, **how)
        if not patch or patch.startswith("ablation"):
            line = [sys.executable, Path(directory, "test.py"), *common]
            out = subprocess.run(line, **how).stdout
    row = utils.load_checkpoint(best)["history"][-1]
    correct = re.search(r"Test accuracy .* \((\d+)/(\d+)", out)
    return run | {
        "best_epoch": row["epoch"],
        "val_accuracy": row.get("val_accuracy", ""),
        "test_accuracy": int(correct[1]) / int(correct[2]) if correct else "",
        "torch": utils.torch.__version__,
        "processor": processor(threads),
    }


def read_results():
    """Return the rows of results.csv as dicts, with numbers as numbers."""
    with RESULTS.open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row["full"] = row["full"] == "True"
        row.update({key: int(row[key]) for key in ("epochs", "seed", "best_epoch")})
        for key in ("val_accuracy", "test_accuracy"):
            row[key] = float(row[key]) if row[key] else ""
    return rows


def write_results(rows):
    """Write results.csv, ordered by dataset, recipe and seed."""
    order = list(LABELS)
    rows.sort(
        key=lambda r: (r["dataset"], order.index(r["recipe"]), r["epochs"], r["full"], r["seed"])
    )
    text = io.StringIO()
    table = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    utils.write_file(RESULTS, text.getvalue().encode())


def default_epochs(recipe):
    return train.RECIPES.get(recipe, {}).get("epochs", 20)


def command(run):
    """Return the command line that trains like `run`, without its seed."""
    line = "python train.py"
    if run["recipe"] not in train.RECIPES:
        line = f"python tests/measure.py {run['recipe']}"
    elif run["recipe"] != "default":
        line += f" --recipe {run['recipe']}"
    if run["epochs"] != default_epochs(run["recipe"]):
        line += f" --epochs {run['epochs']}"
    line += " --full" if run["full"] else ""
    return line + (f" --dataset {run['dataset']}" if run["dataset"] != "FashionMNIST" else "")


def summary(rows):
    """Return the row of tests/README.md for all seeds of a recipe on one dataset."""
    first = rows[0]
    accuracies = [100 * row["test_accuracy"] for row in rows]
    validation = "-"
    if not first["full"]:
        validation = f"{statistics.mean(100 * row['val_accuracy'] for row in rows):.2f}%"
    deviation = statistics.stdev(accuracies) if len(rows) > 1 else 0
    return (
        f"| {first['dataset']} | `{command(first)}` | {first['epochs']} | {validation} "
        f"| **{statistics.mean(accuracies):.2f}%** ± {deviation:.2f} | {len(rows)} |"
    )


def exercise_summary(name, rows):
    """Return the row of tests/README.md for all seeds of an exercise."""
    accuracies = [100 * row["val_accuracy"] for row in rows]
    single = ", ".join(f"{accuracy:.2f}" for accuracy in accuracies)
    line = " ".join(["python train.py", *patch_options(name)])
    return f"| {name} | `{line}` | {statistics.mean(accuracies):.2f}% | {single} |"


@plots.default_style
def draw_ablation(results, path):
    """Draw the test accuracy of each step on FashionMNIST: dots are runs, lines are means."""
    figure = Figure(figsize=(8.5, 4.9), layout="constrained")
    ax = figure.add_subplot()
    for y, recipe in enumerate(LABELS):
        wanted = {"dataset": "FashionMNIST", "recipe": recipe, "full": False}
        wanted["epochs"] = default_epochs(recipe)
        rows = [row for row in results if wanted.items() <= row.items()]
        accuracies = [100 * row["test_accuracy"] for row in rows]
        mean = statistics.mean(accuracies)
        ax.plot(accuracies, [y] * len(rows), "o", color=plots.BLUE, alpha=0.5)
        ax.plot([mean, mean], [y - 0.3, y + 0.3], color=plots.GREEN, linewidth=2.5)
        ax.text(mean, y - 0.36, f"{mean:.2f}%", ha="center", fontsize=9, color=plots.GREEN)
    ax.set_yticks(range(len(LABELS)), LABELS.values())
    ax.set(ylim=(len(LABELS) - 0.5, -0.75), xlabel="Test accuracy (%)")
    ax.grid(axis="x", alpha=0.3)
    ax.set_title("LeNet-5 on FashionMNIST: what each method contributes")
    plots.save_figure(figure, path)


def main():
    parser = utils.Parser("Train several seeds, and print their accuracies.")
    add, number = parser.add_argument, utils.number_type
    add("names", nargs="*", metavar="NAME", help="patches in tests/exercises (default: none)")
    add("--recipe", choices=train.RECIPES, default="default", help="recipe of train.py")
    add("--dataset", choices=("FashionMNIST", "MNIST"), default="FashionMNIST", help="dataset")
    add("--epochs", type=number(int, 1), help="epochs (default: those of the recipe)")
    add("--full", action="store_true", help="train on the validation split, too")
    add("--seeds", type=number(int, 1), default=5, help="number of seeds, from 0")
    add("--jobs", type=number(int, 1), default=1, help="runs at the same time")
    add("--save", action="store_true", help="write the rows to images/results.csv")
    add("--data-dir", type=utils.expand_path, default=ROOT / "data", help="root of the datasets")
    args = parser.parse_args()
    print(f"{processor(os.cpu_count() // args.jobs)}; torch {utils.torch.__version__}\n")
    for patch in args.names or [""]:
        recipe = patch or args.recipe
        epochs = args.epochs or default_epochs(recipe)
        base = dict(zip(KEYS, (args.dataset, recipe, args.full, epochs)))
        with ThreadPoolExecutor(args.jobs) as pool:
            runs = [base | {"seed": seed} for seed in range(args.seeds)]
            rows = list(pool.map(train_and_test, runs, [patch] * len(runs), [args] * len(runs)))
        if rows[0]["test_accuracy"] == "":
            print(exercise_summary(patch, rows), flush=True)
            continue
        print(summary(rows), flush=True)
        if args.save:
            kept = [row for row in read_results() if not base.items() <= row.items()]
            write_results([*kept, *rows])
            draw_ablation(read_results(), ROOT / "images" / "ablation.png")


if __name__ == "__main__":
    utils.run_script(main)
