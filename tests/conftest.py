"""What the tests share: a small dataset, small runs, and two ways to run the scripts.

`run_script` runs a script's `main` in this process, which takes milliseconds. `start_process` runs
it in a new process, forked from a server that has already imported torch: for tests that
kill it, send signals or close its output.
"""

import contextlib
import importlib
import multiprocessing
import os
import re
import shutil
import sys
from multiprocessing import forkserver
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # the runs are too small for more; torch reads it on import

import pytest
import torch

import train
import utils
from images.glyphs import draw_glyphs

evaluate = importlib.import_module("test")  # test.py; the standard library has a package test
ROOT = Path(__file__).resolve().parent.parent
OFFLINE = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9", "no_proxy": ""}
# A run of 4 epochs with 11 steps each.
SMALL_RUN = ["--dataset=Glyphs", "--limit=1500", "--epochs=4", "--batch-size=100"]
posix = pytest.mark.skipif(os.name == "nt", reason="needs POSIX")


# --- Data -----------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """A data directory with 2,000 training and 400 test images of Glyphs, and nothing else."""
    directory = tmp_path_factory.mktemp("data")
    images, labels = draw_glyphs("test")  # drawn faster than the train split
    for split, part in (("train", slice(2000)), ("test", slice(2000, 2400))):
        cache = directory / "Glyphs" / f"{split}-v{utils.CACHE_VERSION}.pt"
        utils.save({"images": images[part].clone(), "labels": labels[part].clone()}, cache)
    return directory


@pytest.fixture(scope="session")
def real_data():
    """The directory of the real FashionMNIST and MNIST: LENET_DATA, or data/ in the checkout."""
    for directory in (os.environ.get("LENET_DATA"), ROOT / "data"):
        names = ("FashionMNIST", "MNIST")
        if directory and all(list(Path(directory, name, "raw").glob("*.gz")) for name in names):
            return Path(directory)
    pytest.skip("needs the archives of FashionMNIST and MNIST in data/ or in LENET_DATA")


def random_images(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, 28, 28), dtype=torch.uint8, generator=generator)


# --- Runs -----------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def options(data_dir):
    """The options that put the results of a script into a directory: options(output_dir)."""
    return lambda output_dir: [
        f"--data-dir={data_dir}",
        f"--output-dir={output_dir}",
        "--device=cpu",
    ]


@pytest.fixture
def stop_at(monkeypatch):
    """Let Ctrl-C interrupt the training: stop_at(n) raises KeyboardInterrupt in its step n."""

    def stop_at(step):
        batches, steps = utils.batches, []

        def interrupted(*args, **kwargs):
            for batch in batches(*args, **kwargs):
                steps.append(batch)
                if len(steps) == step:
                    raise KeyboardInterrupt
                yield batch

        monkeypatch.setattr(utils, "batches", interrupted)

    return stop_at


@pytest.fixture
def no_plots(monkeypatch):
    """Skip metrics.png, which takes longer than a small run."""
    monkeypatch.setattr(train, "plot_metrics", lambda *args: None)


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory, options):
    """The output directory of a run with SMALL_RUN. Copy it before you change it."""
    directory = tmp_path_factory.mktemp("finished")
    train.main([*SMALL_RUN, *options(directory)])
    return directory


@pytest.fixture(scope="session")
def stopped_run_original(tmp_path_factory, finished_run, options):
    directory = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "print_epoch", stop_after_two_epochs)
        train.main([*SMALL_RUN, *options(directory)])
    return directory


def stop_after_two_epochs(run, seconds):
    if len(run["history"]) == 2:
        raise KeyboardInterrupt


@pytest.fixture
def stopped_run(tmp_path, stopped_run_original):
    """The output directory of the same run, stopped after 2 of 4 epochs. It may be changed."""
    return shutil.copytree(stopped_run_original, tmp_path / "stopped")


def checkpoint(directory, file="last.pt", name="Glyphs"):
    """Load a checkpoint from the output directory of a run."""
    return utils.load_checkpoint(directory / "checkpoints" / name / file)


def files(directory):
    """Return the contents of all files below a directory, by path; lock files are not results."""
    paths = [path for path in directory.rglob("*") if path.is_file() and path.name != ".lock"]
    return {path.relative_to(directory): path.read_bytes() for path in paths}


def comparable(value):
    """Turn nested dicts, lists and tensors into something that == compares bit for bit."""
    if isinstance(value, dict):
        return {key: comparable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [comparable(item) for item in value]
    if isinstance(value, torch.Tensor):
        return str(value.dtype), list(value.shape), value.contiguous().numpy().tobytes()
    return value


def assert_same_run(one, other, name="Glyphs"):
    """Compare all that two runs have saved, bit for bit."""
    for file in ("best.pt", "last.pt"):
        assert comparable(checkpoint(one, file, name)) == comparable(checkpoint(other, file, name))
    paths = [directory / "images" / name / "metrics.csv" for directory in (one, other)]
    assert paths[0].read_bytes() == paths[1].read_bytes()


def epoch_rows(out):
    """Return the table of epochs in the output of train.py: a list of words for each epoch."""
    return [line.split() for line in out.splitlines() if re.match(r" *\d+/\d+ ", line)]


# --- Scripts --------------------------------------------------------------------------------------


@pytest.fixture
def run_script(monkeypatch, capsys):
    """Run `main` of a script in this process; return exit status, standard output and error."""

    def run_script(main, *argv):
        monkeypatch.setattr(sys, "argv", [f"{main.__module__}.py", *map(str, argv)])
        with pytest.raises(SystemExit) as end:
            utils.run_script(main)
        return end.value.code or 0, *capsys.readouterr()

    return run_script


@pytest.fixture
def error_of(run_script):
    """Run `main` with bad input; return its one line on standard error, after status 2."""

    def error_of(main, *argv):
        status, out, err = run_script(main, *argv)
        assert (status, out) == (2, "")
        assert re.fullmatch(rf"{main.__module__}\.py: error: .*\n", err)
        return err

    return error_of


@pytest.fixture(scope="session")
def fork_server():
    """A multiprocessing context whose processes have already imported torch and the scripts."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        pytest.skip("needs fork")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train", "torch._dynamo"])  # which optimizers import
    forkserver.ensure_running()
    return context


@pytest.fixture(scope="module", autouse=True)
def early_start(request):
    """Start slow processes before the first test of a file, so that they run beside its tests."""
    items = [item for item in request.session.items if item.path == request.path]
    for name in ("fork_server", "first_commands"):
        if any(name in item.fixturenames for item in items):
            with contextlib.suppress(pytest.skip.Exception):
                request.getfixturevalue(name)


@pytest.fixture
def start_process(fork_server, tmp_path):
    """Start train.py or test.py with options; return its process and the file of its output.

    `prepare` is called first, in the new process. What still runs is killed after the test.
    """
    started = []

    def start_process(script, *argv, prepare=None):
        log = tmp_path / f"process-{len(started)}.log"
        arguments = (script, [str(word) for word in argv], log, prepare)
        process = fork_server.Process(target=run_in_process, args=arguments, daemon=True)
        process.start()
        started.append(process)
        return process, log

    yield start_process
    for process in started:
        process.kill()
        process.join()


def run_in_process(script, argv, log, prepare):
    os.environ.update(OFFLINE)
    sys.stdout = sys.stderr = log.open("w", encoding="utf-8", buffering=1)
    sys.argv = [script, *argv]
    if prepare:
        prepare()
    utils.run_script(train.main if script == "train.py" else evaluate.main)
