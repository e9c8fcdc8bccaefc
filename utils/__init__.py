"""What model.py, train.py and test.py share: data, checkpoints, plots, the command line.

Names are found in their modules when they are first used, as most modules need torch, which takes
seconds to import.
"""

from importlib import import_module

from utils.cli import (  # noqa: F401 - for the scripts
    CLASSES,
    DATASETS,
    ROOT,
    Error,
    command,
    number,
    relative,
    run,
    test_parser,
    train_parser,
)

MODULES = {
    "checkpoint": (
        *("FORMAT", "HISTORY", "best_epoch", "claim", "load_checkpoint", "make_folder"),
        *("newest", "restore", "restore_run", "save", "save_best", "warn_if_unfinished"),
        "write_file",
    ),
    "data": (
        *("draw_changes", "load_images", "load_train_images", "pixel_statistics"),
        *("predict", "preprocess", "split_train_validation"),
    ),
    "devices": ("CudaGraph", "Workers", "choose_device"),
    "muon": ("Muon",),
    "pictures": ("load_picture",),
    "plots": (
        *("plot_ablation", "plot_architecture", "plot_confusion", "plot_grid", "plot_metrics"),
        "write_metrics",
    ),
}


def __getattr__(name):
    for module, names in MODULES.items():
        if name in names:
            return globals().setdefault(name, getattr(import_module(f"utils.{module}"), name))
    raise AttributeError(f"module 'utils' has no attribute {name!r}")
