"""Compare runs: what differs between them, and how they learnt.

python images/compare.py              all runs in checkpoints/
python images/compare.py relu tanh    these two
"""

import itertools
import sys
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import utils  # noqa: E402 - the line above finds it


def facts(run):
    """Return what one may have changed in a run: list of (layer, text); options have no layer."""
    found = [("", f"{name.replace('_', '-')} {value}") for name, value in run["options"].items()]
    for row in run.get("layers", []):
        found += [(row["layer"], row[key]) for key in ("type", "configuration", "activation")]
    return found


def differences(runs):
    """Return for each run the text of what not all `runs` have in common."""
    common = set.intersection(*(set(facts(run)) for run in runs))
    texts = []
    for run in runs:
        layers = {}  # by what is said of them
        for layer, text in facts(run):
            if (layer, text) not in common:
                layers.setdefault(text, []).append(layer)
        words = [f"{' '.join(names)}: {text}" for text, names in layers.items()]
        texts.append("; ".join(word.removeprefix(": ") for word in words))
    return texts


def group(runs):
    """Return lists of runs that were validated on the same images; --full leaves none for it."""
    groups = {}
    for run in runs:
        if not run["options"].get("full"):
            groups.setdefault((run["dataset"], run["options"].get("limit")), []).append(run)
    return list(groups.values())


def spread(places, gap):
    """Return `places` moved apart, so that between each two of them there is `gap` at least."""
    order = sorted(range(len(places)), key=lambda i: places[i])
    moved = list(places)
    for before, i in itertools.pairwise(order):
        moved[i] = max(moved[i], moved[before] + gap)
    back = sum(moved) / len(moved) - sum(places) / len(places)  # up and down by equal amounts
    return [place - back for place in moved]


def plot(groups, path):
    """Draw validation loss and accuracy of the runs, a row for each of the `groups`."""
    heights = [max(4.8, 0.3 * len(runs)) for runs in groups]
    figure = Figure(figsize=(13, sum(heights)), layout="constrained")
    all_axes = figure.subplots(len(groups), 2, squeeze=False, height_ratios=heights)
    colours = matplotlib.colormaps["tab10"].colors
    for runs, axes in zip(groups, all_axes):
        for ax, key, scale, unit in (
            (axes[0], "val_loss", 1, "Validation loss (cross-entropy)"),
            (axes[1], "val_accuracy", 100, "Validation accuracy (%)"),
        ):
            curves = [[scale * row[key] for row in run["history"]] for run in runs]
            # The first epochs are far from the rest, which one wants to see.
            shown = [value for curve in curves for value in curve[len(curve) // 4 :]]
            low, high = min(shown), max(shown)
            margin = 0.06 * (high - low) or 0.01
            gap = (high - low + 2 * margin) / max(22, 1.2 * len(runs))
            ends = spread([curve[-1] for curve in curves], gap)
            last = max(map(len, curves))
            right = last + 0.02 * (last - 1) + 0.1
            for i, (run, curve, end) in enumerate(zip(runs, curves, ends)):
                colour = colours[i % len(colours)]
                ax.plot(range(1, len(curve) + 1), curve, ".-", color=colour, linewidth=1.2)
                place = {"xy": (len(curve), curve[-1]), "xytext": (right + 0.02 * last, end)}
                line = {"arrowstyle": "-", "color": colour, "alpha": 0.4}
                ax.annotate(run["name"], **place, color=colour, va="center", arrowprops=line)
            ax.set(ylim=(low - margin, high + margin), xlabel="Epoch", ylabel=unit)
            ax.set_xlim(right=right)
            ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
            ax.grid(alpha=0.3)
            ax.set_title(f"LeNet-5 on {runs[0]['dataset']}")
    utils.save_figure(figure, path)


def main(argv=None):
    parser = utils.Parser("Compare runs of train.py.")
    add = parser.add_argument
    add("names", nargs="*", type=utils.plain_name, metavar="NAME", help="of a run (default: all)")
    add("--output-dir", type=utils.folder_path, default=utils.ROOT, help="that of train.py")
    add("--picture", type=utils.file_path, default=HERE / "compare.png", help="to be drawn")
    args = parser.parse_args(argv)
    folder = args.output_dir / "checkpoints"
    names = args.names or sorted(path.parent.name for path in folder.glob("*/last.pt"))
    if not names:
        raise utils.Error(f"there is no run in {utils.relative(folder)}: start one with train.py")
    runs = [utils.load_checkpoint(folder / name / "last.pt") | {"name": name} for name in names]
    rows = [("run", "data set", "epochs", "best validation accuracy", "what differs")]
    for run, text in zip(runs, differences(runs)):
        best = utils.best_epoch(run["history"])
        accuracy = f"{best['val_accuracy']:.2%}" if "val_accuracy" in best else "- (--full)"
        epochs = f"{run['epoch']} of {run['options']['epochs']}"
        rows.append((run["name"], run["dataset"], epochs, accuracy, text))
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip())
    groups = group(runs)
    if groups:
        plot(groups, args.picture)
        print(f"Picture: {utils.relative(args.picture)}")
    return 0


if __name__ == "__main__":
    utils.run_script(main)
