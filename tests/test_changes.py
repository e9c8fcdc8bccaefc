"""The changes of the README's chapter 'Change it': everything follows each of them."""

import importlib
import multiprocessing
import os
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from exercises import copy_changed, read_changes

import utils

CHANGES = read_changes()


@pytest.fixture(scope="module")
def context():
    """Starts processes that have imported the libraries already."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        pytest.skip("needs fork")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", "matplotlib.figure", "matplotlib.backends"])
    return context


def use(copy, log, options, data_dir):
    """In a process of its own: do all that a reader does with a changed copy of the checkout."""
    sys.stdout = sys.stderr = log.open("w", encoding="utf-8")
    os.chdir(copy)
    sys.path[:0] = [str(copy), str(copy / "images")]
    for name in ("model", "train", "test", "utils"):  # which this file has imported
        sys.modules.pop(name, None)
    model, train, judge = (importlib.import_module(name) for name in ("model", "train", "test"))
    lenet = model.LeNet()
    rows = model.layer_table(model.trace(lenet))
    assert sum(row["parameters"] for row in rows) == sum(p.numel() for p in lenet.parameters())
    model.main()
    importlib.import_module("architecture").main([])
    data = f"--data-dir={data_dir}"
    assert train.main(["--dataset=Glyphs", "--epochs=2", data, *options]) == 0
    assert train.main(["--resume", data]) == 0
    assert judge.main([data]) == 0
    shipped = ROOT / "checkpoints" / "lenet5-mnist.pt"
    if rows != utils.load_checkpoint(shipped)["layers"]:
        with pytest.raises(judge.utils.Error, match=r"does not fit the network in model\.py"):
            judge.main([data, f"--checkpoint={shipped}"])


@pytest.mark.parametrize("name", CHANGES)
def test_everything_follows_the_change(name, tmp_path, context, few_glyphs):
    copy, log = tmp_path / "copy", tmp_path / "log.txt"
    options = copy_changed(copy, name)
    work = (copy, log, options, few_glyphs)
    process = context.Process(target=use, args=work)
    process.start()
    process.join(60)
    assert process.exitcode == 0, log.read_text(encoding="utf-8")
    out = log.read_text(encoding="utf-8")
    assert "2 of 2 epochs are done: it is already complete" in out
    written = {path.name for path in (copy / "images").rglob("*.*")}
    assert written >= {"architecture.png", "features.png", "metrics.png", "lenet5.html"}
    assert Path(copy, "images", "Glyphs", "lenet5.html").exists()


def test_results_of_all_changes_are_in_the_readme():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name, (options, _, _) in CHANGES.items():
        command = " ".join(["python train.py", *options])
        assert f"| {name} | `{command}` | " in readme
