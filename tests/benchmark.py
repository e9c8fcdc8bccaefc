"""Measure how fast train.py and test.py are on this machine, and print the README's table.

python tests/benchmark.py    1 to 3 minutes; needs FashionMNIST in data/

What it is compared with is the loop that tutorials teach: a DataLoader whose data set pads each
image and turns it into a tensor, the textbook forward pass, AdamW. Both have the same network,
batch size and threads; they take turns, and the ratio is that of the medians.
"""

import argparse
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

import torch  # noqa: E402
from torch import nn  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402
from torchvision import datasets, transforms  # noqa: E402

import train  # noqa: E402
import utils  # noqa: E402
from model import FastLeNet, LeNet  # noqa: E402

IMAGES, BATCH = 60_000, 128
TURNS, STEPS = 15, 40  # how often each loop has its turn, and its batches in one
MATRIX = 2048
# Multiply-adds per image: forward, as many for the weights' gradients, those of the inputs.
OPERATIONS_PER_IMAGE = 2 * (416_520 + 416_520 + 298_920)
EPOCHS_TO_88_6 = 2  # chosen on the validation split: 89.4 % there


def seconds(function, *args):
    """Return how long a call takes, the work that it leaves to a GPU included."""
    start = time.perf_counter()
    function(*args)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def dataloader_loop(data_dir):
    """Return a function that trains for some steps as tutorials do."""
    transform = transforms.Compose([transforms.Pad(2), transforms.ToTensor()])
    data = datasets.FashionMNIST(data_dir, train=True, transform=transform)
    loader = DataLoader(data, batch_size=BATCH, shuffle=True)
    model, loss_function = LeNet(), nn.CrossEntropyLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    batches = iter(loader)

    def run(steps):
        nonlocal batches
        total_loss = total_correct = 0
        for _ in range(steps):
            try:
                x, y = next(batches)
            except StopIteration:
                batches = iter(loader)
                x, y = next(batches)
            logits = model(x)
            loss = loss_function(logits, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total_loss += loss.item() * len(y)
            total_correct += (logits.argmax(dim=1) == y).sum().item()

    return run


def own_loop(images, labels):
    """Return a function that trains for some steps as train.py does, on the CPU."""
    mean, std = utils.pixel_statistics(images)
    model, recipe = FastLeNet(), train.RECIPES["default"]
    optimizers = train.make_optimizers(model, recipe.optimizer, recipe.lr, recipe.weight_decay)
    step = train.make_step(model, optimizers, images, labels, mean, std, recipe.label_smoothing)
    alone = utils.Workers("cpu")

    def run(steps):
        order = torch.randperm(len(images))[: steps * BATCH].unsqueeze(1)
        plan = torch.cat([order, utils.draw_changes(len(order), mirror=True, shift=0)], dim=1)
        train.train_epoch(step, optimizers, [1.0] * steps, plan, BATCH, alone)

    return run


def measure_loops(data_dir, images, labels):
    """Return median seconds per epoch of both loops, and the matrix-product rate in GFLOP/s."""
    a, b = torch.randn(2, MATRIX, MATRIX)
    tasks = {
        "dataloader": (dataloader_loop(data_dir), STEPS),
        "own": (own_loop(images, labels), STEPS),
        "matrix": (torch.mm, a, b),
    }
    times = {name: [] for name in tasks}
    for turn in range(TURNS + 1):
        for name, task in tasks.items():
            elapsed = seconds(*task)
            if turn:  # the first one warms up
                times[name].append(elapsed)
    median = {name: statistics.median(values) for name, values in times.items()}
    per_epoch = IMAGES / (STEPS * BATCH)
    rate = 2 * MATRIX**3 / median["matrix"] / 1e9
    return median["dataloader"] * per_epoch, median["own"] * per_epoch, rate


def run_train(data_dir, *options):
    """Run train.py as a user does; return seconds, its output and its best checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        folders = [f"--{name}-dir={folder}/{name}" for name in ("checkpoint", "image")]
        start = time.perf_counter()
        result = subprocess.run(
            [sys.executable, ROOT / "train.py", f"--data-dir={data_dir}", *folders, *options],
            check=True,
            capture_output=True,
            text=True,
        )
        elapsed = time.perf_counter() - start
        path = Path(folder, "checkpoint", "FashionMNIST", "best.pt")
        return elapsed, result.stdout, utils.load_checkpoint(path)


def judge(checkpoint, data_dir, repeats=1):
    """Return accuracy (0 to 1) on the full test set, and median seconds of the forward passes."""
    images, labels = utils.load_images(checkpoint["dataset"], data_dir, "test")
    model = LeNet(num_classes=len(checkpoint["classes"]))
    utils.restore(model, checkpoint, "the checkpoint")
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        logits = utils.predict(model, images, checkpoint["mean"], checkpoint["std"])
        times.append(time.perf_counter() - start)
    return (logits.argmax(dim=1) == labels).double().mean().item(), statistics.median(times)


def memory_of_training(data_dir):
    """Return peak memory of a one-epoch run above that after the imports, in MB (10^6 bytes)."""
    code = f"""
import re, sys
sys.path.insert(0, {str(ROOT)!r})
import torch, torchvision, matplotlib.figure
def memory(what):
    return int(re.search(what + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1])
before = memory("VmRSS")
import train
train.main(sys.argv[1:])
print("above:", memory("VmHWM") - before)
"""
    if not Path("/proc/self/status").exists():
        return "not measured here"
    with tempfile.TemporaryDirectory() as folder:
        folders = [f"--{name}-dir={folder}/{name}" for name in ("checkpoint", "image")]
        options = [f"--data-dir={data_dir}", *folders, "--dataset=FashionMNIST", "--epochs=1"]
        line = [sys.executable, "-c", code, *options, "--device=cpu"]
        out = subprocess.run(line, check=True, capture_output=True, text=True).stdout
    kilobytes = int(re.search(r"above: (\d+)", out)[1])
    return f"{kilobytes * 1024 / 1e6:.0f} MB"


def processor():
    """Return the name of the processor."""
    try:
        name = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]
    except (OSError, TypeError):
        name = platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads of {os.cpu_count()}"


def main():
    parser = argparse.ArgumentParser(description="Measure the speed of train.py and test.py.")
    parser.add_argument("--data-dir", type=Path, default=ROOT / "data", help="has FashionMNIST")
    args = parser.parse_args()
    images, labels = utils.load_images("FashionMNIST", args.data_dir, "train")

    tutorial, own, rate = measure_loops(args.data_dir, images, labels)
    limit = OPERATIONS_PER_IMAGE * IMAGES / rate / 1e9
    elapsed, _, best = run_train(
        args.data_dir, "--dataset=FashionMNIST", f"--epochs={EPOCHS_TO_88_6}", "--device=cpu"
    )
    accuracy, forward = judge(best, args.data_dir, repeats=8)
    rows = [
        ("Matrix product, float32, 2048 x 2048", f"{rate:.0f} GFLOP/s", ""),
        ("Training epoch, 60,000 images: DataLoader loop", f"{tutorial:.1f} s", ""),
        (
            "Training epoch, 60,000 images: `train.py`",
            f"{own:.2f} s",
            f"{tutorial / own:.1f} times faster than the DataLoader loop; {own / limit:.1f} times "
            f"the limit of {limit:.2f} s (its operations at the matrix product's rate)",
        ),
        (
            f"`python train.py --epochs {EPOCHS_TO_88_6}`, start-up included",
            f"{elapsed:.1f} s",
            f"{accuracy:.2%} on the test set; {20 * tutorial / elapsed:.0f} times faster than 20 "
            "epochs of the DataLoader loop",
        ),
        ("Full test set, forward only, 10,000 images", f"{forward:.2f} s", ""),
        ("Memory of training, above the imports", memory_of_training(args.data_dir), ""),
    ]
    if torch.cuda.is_available():
        _, out, best = run_train(args.data_dir, "--dataset=FashionMNIST", "--device=cuda")
        epochs = sum(map(float, re.findall(r"^ +\d+/20 .*?([\d.]+)(?:  best.*)?$", out, re.M)))
        accuracy, _ = judge(best, args.data_dir)
        name = torch.cuda.get_device_name()
        rows.append((f"20 epochs on {name}", f"{epochs:.1f} s", f"{accuracy:.2%} on the test set"))
    print(f"{processor()}; torch {torch.__version__}, Python {platform.python_version()}\n")
    print("| what | measured | |\n|---|---:|---|")
    for row in rows:
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    utils.run(main)
