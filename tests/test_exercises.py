"""The exercises: each patch applies, and the table, the picture and the page follow it."""

import os
import sys

import pytest
from conftest import ROOT, evaluate
from measure import copy_patched, patch_options

PATCHES = sorted(path.stem for path in (ROOT / "tests" / "exercises").glob("*.diff"))
FULL_REPORT = ("relu", "batch-norm")  # the others skip what does not depend on the network


def follow(directory, log, argv, full_report):
    """In a new process, do with a patched copy of the scripts what a reader does."""
    sys.stdout = sys.stderr = log.open("w", encoding="utf-8", buffering=1)
    for name in list(sys.modules):
        if name in ("model", "train", "test", "utils") or name.split(".")[0] == "images":
            del sys.modules[name]
    sys.path.insert(0, str(directory))
    os.chdir(directory)
    import test as evaluate  # the one in `directory`

    import train
    import utils
    from images import architecture, page
    from model import LeNet

    assert directory == utils.ROOT
    architecture.main([])
    train.main([*argv, "--dataset=Glyphs", "--epochs=1", "--limit=500"])
    train.main([*argv[:3], "--resume"])
    if full_report:
        evaluate.main(argv[:3])
        return
    path = directory / "checkpoints" / "Glyphs" / "best.pt"
    run = utils.load_checkpoint(path)
    model = LeNet()
    utils.load_weights(path, run, model)
    images, labels = utils.load_images("Glyphs", argv[0].partition("=")[2], "test")
    logits = utils.predict(model, images, mean=run["mean"], std=run["std"])
    network = page.describe_network(run, model, images, labels, logits)
    page.write({"Glyphs": network}, directory / "images" / "Glyphs" / "lenet5.html")


@pytest.mark.parametrize("name", PATCHES)
def test_table_picture_training_and_page_follow_the_patch(name, tmp_path, fork_server, options):
    directory, log = tmp_path / "copy", tmp_path / "log.txt"
    copy_patched(name, directory)
    argv = [*options(directory), *patch_options(name)]
    work = (directory, log, argv, name in FULL_REPORT)
    process = fork_server.Process(target=follow, args=work, daemon=True)
    process.start()
    process.join(120)
    out = log.read_text(encoding="utf-8")
    assert process.exitcode == 0, out
    rows = [line.split(" | ") for line in out.splitlines() if line.startswith("| ")]
    total = sum(int(row[-1].rstrip(" |").replace(",", "")) for row in rows[1:])
    assert f"{total:,} parameters\nPicture: images/architecture.png" in out
    assert f"LeNet-5 with {total:,} parameters" in out
    assert "already finished after 1 epochs" in out
    written = {path.name for path in (directory / "images").rglob("*.*")}
    assert written >= {"architecture.png", "metrics.png", "lenet5.html"}
    assert ("predict.png" in written) == (name in FULL_REPORT)


def test_pretrained_weights_are_rejected_with_the_changed_line(tmp_path, monkeypatch, error_of):
    copy_patched("relu", tmp_path)
    source = (tmp_path / "model.py").read_text(encoding="utf-8")
    monkeypatch.setattr("utils.source_code", lambda model: source[source.index("class LeNet") :])
    with monkeypatch.context() as patch:
        patch.setattr("utils.same_logits", lambda *logits: False)
        err = error_of(evaluate.main, "--checkpoint", ROOT / "checkpoints" / "lenet5-mnist.pt")
    assert "`self.sig = nn.Sigmoid()` where model.py has `self.sig = nn.ReLU()`" in err
