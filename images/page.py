"""Put the shipped weights into lenet5.html, beside this file, which is the template itself.

python images/page.py
"""

import importlib
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import utils  # noqa: E402
from model import LeNet  # noqa: E402

judge = importlib.import_module("test")  # the standard library has a test of its own


def main(argv=None):
    utils.Parser("Put the shipped weights into images/lenet5.html.").parse_args(argv)
    for dataset in ("MNIST", "FashionMNIST"):  # the one written last is shown first
        path = utils.ROOT / "checkpoints" / f"lenet5-{dataset.lower()}.pt"
        checkpoint = utils.load_checkpoint(path)
        model = LeNet(num_classes=len(checkpoint["classes"]))
        utils.restore(path, checkpoint, model)
        images, labels = utils.load_images(dataset, utils.ROOT / "data", "test")
        logits = utils.predict(model, images, checkpoint["mean"], checkpoint["std"])
        right = (logits.argmax(dim=1) == labels).sum()
        about = f"{right} of {len(labels):,} test images right"
        judge.write_page(checkpoint, model, about, images, labels, HERE / "lenet5.html")
    return 0


if __name__ == "__main__":
    utils.run_script(main)
