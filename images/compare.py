"""Compare runs: their accuracy, what differs between them, and their curves.

python images/compare.py              all runs in checkpoints/
python images/compare.py relu tanh    these two
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from matplotlib.figure import Figure

import utils
from images import plots


def differences(runs):
    """Return a text for each run: its options and lines of code that not all `runs` share."""
    facts = []
    for run in runs:
        options = [f"{name.replace('_', '-')} {value}" for name, value in run["options"].items()]
        facts.append(options + utils.statements(run["code"]))
    return [
        "; ".join(fact for fact in mine if not all(fact in theirs for theirs in facts))
        for mine in facts
    ]


@plots.default_style
def draw(groups, path):
    """Plot validation loss and accuracy, one row for each list of runs in `groups`."""
    figure = Figure(figsize=(13, 4.8 * len(groups)), layout="constrained")
    for runs, axes in zip(groups, figure.subplots(len(groups), 2, squeeze=False)):
        for ax, metric in zip(axes, ("loss", "accuracy")):
            curves = {run["name"]: [row[f"val_{metric}"] for row in run["history"]] for run in runs}
            plots.plot_curves(ax, curves, metric)
            ax.set_title(f"LeNet-5 on {runs[0]['dataset']}: validation {metric}")
    plots.save_figure(figure, path)


def main(argv=None):
    parser = utils.Parser("Compare runs of train.py.")
    add = parser.add_argument
    add("names", nargs="*", type=utils.run_name, metavar="NAME", help="runs (default: all)")
    add("--output-dir", type=utils.expand_path, default=utils.ROOT, help="that of train.py")
    path = utils.ROOT / "images" / "compare.png"
    add("--picture", type=utils.expand_path, default=path, help="picture to draw")
    args = parser.parse_args(argv)
    directory = args.output_dir / "checkpoints"
    names = args.names or sorted(path.parent.name for path in directory.glob("*/last.pt"))
    if not names:
        raise utils.Error(f"there is no run in {utils.shown(directory)}: start one with train.py")
    runs = [utils.load_checkpoint(directory / name / "last.pt") | {"name": name} for name in names]

    rows = [("run", "dataset", "epochs", "best validation accuracy", "differences")]
    groups = {}  # runs that were validated on the same images
    for run, text in zip(runs, differences(runs)):
        best = utils.best_row(run["history"])
        accuracy = "- (--full)"
        if "val_accuracy" in best:
            accuracy = f"{best['val_accuracy']:.2%}"
            groups.setdefault((run["dataset"], run["options"]["limit"]), []).append(run)
        epochs = f"{run['epoch']} of {run['options']['epochs']}"
        rows.append((run["name"], run["dataset"], epochs, accuracy, text))
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
    if groups:
        draw(list(groups.values()), args.picture)
        print(f"Picture: {utils.shown(args.picture)}")


if __name__ == "__main__":
    utils.run_script(main)
