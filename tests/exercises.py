"""Make the changes of the README's chapter 'Change it', and print what comes out.

python tests/exercises.py              all of them, three seeds each; needs FashionMNIST in data/
python tests/exercises.py relu tanh    these two

Each change is made in a copy of the checkout; the runs are named after it, relu-0 and so on, and
stay in checkpoints/. A run that is there already is not trained again.
"""

import argparse
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import utils  # noqa: E402 - the line above finds it

FILES = ("model.py", "train.py", "test.py", "utils.py", "images/architecture.py")
PAGE = "images/lenet5.html"


def read_changes():
    """Return the changes of the README: name -> (options, file, list of (old, new) texts)."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    [block] = re.findall(r"^```diff\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    changes = {}
    for part in block.split("\n\n"):
        head, *lines = part.splitlines(keepends=True)
        name, file, options = re.match(r"(\S+), (.*): python train.py(.*) --name", head).groups()
        pairs = re.findall(r"((?:^-.*\n?)+)((?:^\+.*\n?)+)", "".join(lines), re.MULTILINE)
        texts = [[re.sub("^[-+]", "", side, flags=re.MULTILINE) for side in p] for p in pairs]
        changes[name] = (
            options.split(),
            file,
            [[old.rstrip("\n"), new.rstrip("\n")] for old, new in texts],
        )
    return changes


def copy_changed(folder, name):
    """Copy the scripts into `folder`, with the change `name` made; return its options.

    Raises:
        ValueError: an old text does not stand in the file exactly once.
    """
    options, file, pairs = read_changes()[name]
    (folder / "images").mkdir(parents=True)
    for each in (*FILES, PAGE):
        shutil.copy(ROOT / each, folder / each)
    for old, new in pairs:
        text = (folder / file).read_text(encoding="utf-8")
        if text.count(f"{old}\n") != 1:
            raise ValueError(f"{name}: this stands not once in {file}: {old}")
        (folder / file).write_text(text.replace(old, new), encoding="utf-8")
    return options


def train(name, seeds, output_dir):
    """Train a change with some seeds; return the best validation accuracies (0 to 1)."""
    accuracies = []
    for seed in range(seeds):
        last = output_dir / "checkpoints" / f"{name}-{seed}" / "last.pt"
        with tempfile.TemporaryDirectory() as folder:
            options = copy_changed(Path(folder, "copy"), name)
            options += ["--dataset=FashionMNIST", f"--seed={seed}", f"--name={name}-{seed}"]
            options += [f"--data-dir={ROOT / 'data'}", f"--output-dir={output_dir}"]
            line = [sys.executable, Path(folder, "copy", "train.py"), *options]
            if not last.exists():
                subprocess.run(line, check=True, stdout=subprocess.DEVNULL)
        history = utils.load_checkpoint(last)["history"]
        accuracies.append(utils.best_epoch(history)["val_accuracy"])
    return accuracies


def main():
    parser = argparse.ArgumentParser(description="Train the changes of the README.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="of a change (default: all)")
    parser.add_argument("--seeds", type=utils.number(int, 1), default=3, help="0 to SEEDS - 1")
    parser.add_argument("--output-dir", type=Path, default=ROOT, help="that of train.py")
    args = parser.parse_args()
    print("| change | command | validation, mean | single seeds |\n|---|---|---:|---|")
    for name in args.names or read_changes():
        accuracies = [100 * each for each in train(name, args.seeds, args.output_dir)]
        command = " ".join(["python train.py", *read_changes()[name][0]])
        mean = f"{statistics.mean(accuracies):.2f} %"
        single = ", ".join(f"{accuracy:.2f}" for accuracy in accuracies)
        print(f"| {name} | `{command}` | {mean} | {single} |", flush=True)


if __name__ == "__main__":
    utils.run_script(main)
