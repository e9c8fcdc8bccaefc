"""The exercises: each patch applies, and the table, the picture and the page follow it."""

import os
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import ROOT
from measure import copy_patched, patch_options

PATCHES = sorted(path.stem for path in (ROOT / "tests" / "exercises").glob("*.diff"))
DRAWN = "batch-norm"  # writing the PNG files of all networks would take long


def follow(directory, log, argv, draw):
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
    from images import architecture, plots

    assert directory == utils.ROOT
    if not draw:
        plots.save_figure = lambda figure, path, **_: path.touch()
        # These do not depend on the network.
        train.plot_metrics = plots.draw_predictions = plots.draw_confusion = lambda *args: None
    architecture.main([])
    train.main([*argv, "--dataset=Glyphs", "--epochs=1", "--limit=500"])
    train.main([*argv[:3], "--resume"])
    evaluate.main(argv[:3])


@pytest.fixture(scope="module")
def followed(request, tmp_path_factory, fork_server, options):
    """Follow the patches of all selected tests, two at a time; return futures by name."""

    def start(name):
        directory, log = tmp_path_factory.mktemp(name), tmp_path_factory.mktemp("log") / "log.txt"
        copy_patched(name, directory)
        argv = [*options(directory), *patch_options(name)]
        work = (directory, log, argv, name == DRAWN)
        process = fork_server.Process(target=follow, args=work, daemon=True)
        process.start()
        process.join(120)
        return process.exitcode, log.read_text(encoding="utf-8"), directory

    selected = [item for item in request.session.items if "followed" in item.fixturenames]
    with ThreadPoolExecutor(2) as pool:
        yield {item.callspec.id: pool.submit(start, item.callspec.id) for item in selected}


@pytest.mark.parametrize("name", PATCHES)
def test_table_pictures_training_and_page_follow_the_patch(name, followed):
    exitcode, out, directory = followed[name].result()
    assert exitcode == 0, out
    rows = [line.split(" | ") for line in out.splitlines() if line.startswith("| ")]
    total = sum(int(row[-1].rstrip(" |").replace(",", "")) for row in rows[1:])
    assert f"{total:,} parameters\nPicture: images/architecture.png" in out
    assert f"LeNet-5 with {total:,} parameters" in out
    assert "already finished after 1 epochs" in out
    pictures = directory / "images" / "Glyphs"
    assert (pictures / "lenet5.html").stat().st_size > 10_000
    drawn = ["../architecture.png", "features.png"]
    if name == DRAWN:
        drawn += ["metrics.png", "predict.png", "confusion.png"]
    for file in drawn:
        assert ((pictures / file).stat().st_size > 0) == (name == DRAWN), file
