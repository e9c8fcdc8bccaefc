"""What model.py, train.py and test.py share: data, checkpoints, plots, the command line."""

from utils.checkpoint import (
    FORMAT,
    HISTORY,
    best_epoch,
    load_checkpoint,
    make_folder,
    newest,
    restore,
    save,
    write_file,
)
from utils.cli import DATASETS, ROOT, Error, Parser, choose_device, command, number, relative, run
from utils.data import (
    CLASSES,
    load_images,
    load_train_images,
    pixel_statistics,
    predict,
    preprocess,
    split_train_validation,
)
from utils.pictures import load_picture
from utils.plots import plot_architecture, plot_confusion, plot_grid, plot_metrics

__all__ = [
    "CLASSES",
    "DATASETS",
    "FORMAT",
    "HISTORY",
    "ROOT",
    "Error",
    "Parser",
    "best_epoch",
    "choose_device",
    "command",
    "load_checkpoint",
    "load_images",
    "load_picture",
    "load_train_images",
    "make_folder",
    "newest",
    "number",
    "pixel_statistics",
    "plot_architecture",
    "plot_confusion",
    "plot_grid",
    "plot_metrics",
    "predict",
    "preprocess",
    "relative",
    "restore",
    "run",
    "save",
    "split_train_validation",
    "write_file",
]
