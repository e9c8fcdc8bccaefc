"""Measure how fast train.py and test.py are on this machine, and print a table of tests/README.md.

Training is compared with the loop that tutorials teach: a DataLoader that pads and converts each
image, AdamW, and batches of 128. Both loops use the same network and number of threads. They take
turns, and the ratio is that of the medians. FashionMNIST must be in data/.
"""

import argparse
import contextlib
import io
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train  # before torch, whose environment utils sets
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

import utils
from model import LeNet

IMAGES, PART = 60_000, 15_360  # per epoch, and per turn
TURNS, MATRIX = 7, 2048
# Multiply-adds per image: forward, gradients of the weights, gradients of the inputs.
OPERATIONS_PER_IMAGE = 2 * (416_520 + 416_520 + 298_920)


class TutorialSet(Dataset):
    """Does for each image what torchvision's FashionMNIST does."""

    transform = transforms.Compose([transforms.Pad(2), transforms.ToTensor()])

    def __init__(self, images, labels):
        self.images, self.labels = images, labels

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return self.transform(Image.fromarray(self.images[i].numpy())), int(self.labels[i])


def dataloader_loop(images, labels):
    """Return a function that trains for one epoch like tutorials do."""
    loader = DataLoader(TutorialSet(images, labels), batch_size=128, shuffle=True)
    model, loss_function = LeNet(), nn.CrossEntropyLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    def run():
        total_loss = total_correct = 0
        for x, y in loader:
            logits = model(x)
            loss = loss_function(logits, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total_loss += loss.item() * len(y)
            total_correct += (logits.argmax(dim=1) == y).sum().item()

    return run


def own_loop(images, labels, directory):
    """Return a function that trains for one epoch with the loop of train.py."""
    argv = ["--dataset=FashionMNIST", "--epochs=1", "--full", f"--output-dir={directory}"]
    args, options = train.parse_args(argv)
    base = {"name": "benchmark", "dataset": "FashionMNIST", "options": options}
    base |= {"version": 0, "code": "", "counts": [len(labels), 0], "mean": 0.29, "std": 0.35}
    model, optimizers = train.prepare_model(base | {"history": []}, None, torch.device("cpu"))

    def epoch():
        with contextlib.redirect_stdout(io.StringIO()):
            run = base | {"history": [], "snapshots": []}
            train.train(args, run, model, optimizers, (images, labels), None)

    return epoch


def measure_loops(images, labels):
    """Return median seconds per epoch of both loops, and the matrix-product rate in GFLOP/s."""
    a, b = torch.randn(2, MATRIX, MATRIX)
    images, labels = images[:PART], labels[:PART]
    with tempfile.TemporaryDirectory() as directory:
        tasks = [dataloader_loop(images, labels), own_loop(images, labels, directory)]
        tasks.append(lambda: a @ b)
        times = [[] for _ in tasks]
        for turn in range(TURNS + 1):
            for task, values in zip(tasks, times):
                start = time.perf_counter()
                task()
                if turn:  # the first one warms up
                    values.append(time.perf_counter() - start)
    tutorial, own, product = map(statistics.median, times)
    return tutorial * IMAGES / PART, own * IMAGES / PART, 2 * MATRIX**3 / product / 1e9


def timed_script(script, data_dir, directory, *options):
    """Run a script like a user; return its seconds and its output."""
    line = [sys.executable, ROOT / script, f"--data-dir={data_dir}", f"--output-dir={directory}"]
    start = time.perf_counter()
    result = subprocess.run([*line, *options], check=True, capture_output=True, encoding="utf-8")
    return time.perf_counter() - start, result.stdout


def processor(threads):
    """Return the name of the processor and the number of threads, as text."""
    try:
        name = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]
    except (OSError, TypeError):
        name = platform.processor() or platform.machine()
    return f"{name}, {threads} threads of {os.cpu_count()}"


def main():
    parser = argparse.ArgumentParser(description="Measure the speed of train.py and test.py.")
    parser.add_argument("--data-dir", type=Path, default=ROOT / "data", help="with FashionMNIST")
    args = parser.parse_args()
    images, labels = utils.load_images("FashionMNIST", args.data_dir, "train")
    utils.load_images("FashionMNIST", args.data_dir, "test")  # fills the cache

    tutorial, own, rate = measure_loops(images, labels)
    limit = OPERATIONS_PER_IMAGE * IMAGES / rate / 1e9
    with tempfile.TemporaryDirectory() as directory:
        options = ["--dataset=FashionMNIST", "--epochs=1"]
        elapsed, out = timed_script("train.py", args.data_dir, directory, *options)
        epoch = float(re.search(r"^ +1/1 .* ([\d.]+)  best", out, re.MULTILINE)[1])
        tested, _ = timed_script("test.py", args.data_dir, directory)
    note = f"{tutorial / own:.1f} times as fast as the DataLoader loop; the minimum would be "
    note += f"{limit:.2f} s, if all its operations ran at the rate of the matrix product"
    rows = [
        ("Matrix product, float32, 2048 x 2048", f"{rate:.0f} GFLOP/s", ""),
        ("Training epoch, 60,000 images: DataLoader loop", f"{tutorial:.1f} s", ""),
        ("Training epoch, 60,000 images: `train.py`", f"{own:.2f} s", note),
        ("`python train.py --epochs 1`: start, loading and saving", f"{elapsed - epoch:.1f} s", ""),
        ("`python test.py`", f"{tested:.1f} s", ""),
    ]
    print(f"{processor(torch.get_num_threads())}; torch {torch.__version__}\n")
    print("| what | measured | |\n|---|---:|---|")
    for row in rows:
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    utils.run_script(main)
