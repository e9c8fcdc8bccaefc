"""Compare runs: accuracy, differences and learning curves.

python images/compare.py              all runs in checkpoints/
python images/compare.py relu tanh    only these two
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)


import utils
from images import plots


def differences(runs):
    """Describe each run by its options and lines of code that not all `runs` share."""
    described = []
    for run in runs:
        options = [f"{name.replace('_', '-')} {value}" for name, value in run["options"].items()]
        described.append(options + utils.code_lines(run["code"]))
    common = [line for line in described[0] if all(line in lines for lines in described)]
    return ["; ".join(line for line in lines if line not in common) for lines in described]


@plots.default_style
def draw(groups, path):
    """Plot validation loss and accuracy, one row for each list of runs in `groups`."""
    figure = plots.Figure(figsize=(13, 4.8 * len(groups)), layout="constrained")
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
    add("--output-dir", type=utils.expand_path, default=utils.ROOT, help="directory of the results")
    add("--picture", type=utils.expand_path, help="file to draw (default: images/compare.png)")
    args = parser.parse_args(argv)
    picture = args.picture or args.output_dir / "images" / "compare.png"
    directory = args.output_dir / "checkpoints"
    names = args.names or sorted(path.parent.name for path in directory.glob("*/last.pt"))
    if not names:
        raise utils.Error(f"there is no run in {utils.shown(directory)}: start one with train.py")
    runs = [utils.load_checkpoint(directory / name / "last.pt") | {"name": name} for name in names]

    rows = [("run", "dataset", "epochs", "best validation accuracy", "differences")]
    groups = {}  # runs validated on the same images
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
        draw(list(groups.values()), picture)
        print(f"Picture: {utils.shown(picture)}")


if __name__ == "__main__":
    utils.run_script(main)
