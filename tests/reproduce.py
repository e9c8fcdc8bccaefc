"""Train a recipe with several seeds, judge each on the test set, and print the README's row.

python tests/reproduce.py                                  the default recipe on FashionMNIST
python tests/reproduce.py --recipe long --dataset MNIST

The single results go to images/results.csv and from there into images/ablation.png. The weights of
each run stay in checkpoints/reproduce/.
"""

import argparse
import csv
import io
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from benchmark import judge, processor  # noqa: E402

import train  # noqa: E402
import utils  # noqa: E402

RESULTS = ROOT / "images" / "results.csv"
COLUMNS = (
    *("dataset", "recipe", "epochs", "seed", "best_epoch", "val_accuracy", "test_accuracy"),
    *("seconds", "torch", "processor"),
)


def run(dataset, recipe, epochs, seed, data_dir):
    """Train and judge one seed as a user would; return its row of results.csv."""
    folder = ROOT / "checkpoints" / "reproduce" / f"{recipe}-{epochs}-{seed}"
    options = [f"--dataset={dataset}", f"--recipe={recipe}", f"--epochs={epochs}"]
    options += [f"--seed={seed}"]
    options += [f"--data-dir={data_dir}", f"--checkpoint-dir={folder}", f"--image-dir={folder}"]
    start = time.perf_counter()
    subprocess.run([sys.executable, ROOT / "train.py", *options], check=True)
    seconds = time.perf_counter() - start

    best = utils.load_checkpoint(folder / dataset / "best.pt")
    return {
        "dataset": dataset,
        "recipe": recipe,
        "epochs": epochs,
        "seed": seed,
        "best_epoch": best["epoch"],
        "val_accuracy": best["history"][-1]["val_accuracy"],
        "test_accuracy": judge(best, data_dir)[0],
        "seconds": round(seconds, 1),
        "torch": str(torch.__version__),
        "processor": processor(),
    }


def read_results():
    """Return the rows of results.csv; numbers as numbers."""
    if not RESULTS.exists():
        return []
    with RESULTS.open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        for key in ("epochs", "seed", "best_epoch"):
            row[key] = int(row[key])
        for key in ("val_accuracy", "test_accuracy", "seconds"):
            row[key] = float(row[key])
    return rows


def write_results(rows):
    """Write results.csv, in the order of data sets, recipes and seeds."""
    names = list(train.RECIPES)
    rows.sort(
        key=lambda row: (row["dataset"], names.index(row["recipe"]), -row["epochs"], row["seed"])
    )
    text = io.StringIO()
    table = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    utils.write_file(RESULTS, text.getvalue().encode())


def summary(rows):
    """Return the README's row for the runs of one recipe on one data set."""
    first = rows[0]
    accuracies = [100 * row["test_accuracy"] for row in rows]
    deviation = statistics.stdev(accuracies) if len(rows) > 1 else 0
    validation = statistics.mean(100 * row["val_accuracy"] for row in rows)
    seconds = statistics.median(row["seconds"] for row in rows)
    command = "python train.py"
    if first["recipe"] != "default":
        command += f" --recipe {first['recipe']}"
    if first["epochs"] != train.RECIPES[first["recipe"]].epochs:
        command += f" --epochs {first['epochs']}"
    if first["dataset"] != "FashionMNIST":
        command += f" --dataset {first['dataset']}"
    return (
        f"| {first['dataset']} | `{command}` | {first['epochs']} | {validation:.2f} % "
        f"| **{statistics.mean(accuracies):.2f} %** ± {deviation:.2f} | {len(rows)} "
        f"| {seconds:.0f} s |"
    )


def main():
    parser = argparse.ArgumentParser(description="Train and judge several seeds of a recipe.")
    parser.add_argument("--recipe", choices=tuple(train.RECIPES), default="default")
    parser.add_argument("--dataset", choices=utils.DATASETS, default="FashionMNIST")
    parser.add_argument("--epochs", type=utils.number(int, 1), help="instead of the recipe's")
    parser.add_argument("--seeds", type=utils.number(int, 1), default=5, help="0 to SEEDS - 1")
    parser.add_argument("--data-dir", type=Path, default=ROOT / "data")
    args = parser.parse_args()

    epochs = args.epochs or train.RECIPES[args.recipe].epochs
    wanted = {"dataset": args.dataset, "recipe": args.recipe, "epochs": epochs}

    def is_new(row):
        return wanted.items() <= row.items()

    rows = [row for row in read_results() if not is_new(row)]
    for seed in range(args.seeds):
        rows.append(run(**wanted, seed=seed, data_dir=args.data_dir))
        write_results(rows)

    utils.plot_ablation(
        [
            row
            for row in rows
            if row["dataset"] == "FashionMNIST"
            and row["epochs"] == train.RECIPES[row["recipe"]].epochs
        ],
        ROOT / "images" / "ablation.png",
    )
    chosen = [row for row in rows if is_new(row)]
    best = max(chosen, key=lambda row: row["val_accuracy"])
    print(f"\n{processor()}; torch {torch.__version__}")
    print(f"Best seed by validation accuracy: {best['seed']}, {best['val_accuracy']:.2%}\n")
    print("| data set | command | epochs | validation | test, mean ± s.d. | seeds | time |")
    print("|---|---|---:|---:|---:|---:|---:|")
    print(summary(chosen))


if __name__ == "__main__":
    utils.run(main)
