"""A run that is killed again and again, at any moment, ends as the one that nobody touched.

python -m pytest tests/test_crash.py                12 kills
python -m pytest tests/test_crash.py --kills 200    more of them
"""

import multiprocessing
import os
import random
import shutil
import signal
import sys

import pytest
from conftest import ROOT, expect_same_run, options, run_dir

import train
import utils

RUN = ["--dataset=Glyphs", "--limit=300", "--batch-size=50", "--epochs=12"]


@pytest.fixture(scope="module")
def context():
    """Starts processes that have imported torch already: a kill then costs no seconds."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        pytest.skip("needs fork")
    from multiprocessing import forkserver

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train"])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)  # where the server looks for train.py
        forkserver.ensure_running()
    return context


def work(line, log, run, fatal):
    """Run train.py in a process of its own, and die at the operation `fatal` on files of `run`."""
    sys.stdout = sys.stderr = log.open("a", encoding="utf-8")
    sys.argv = ["train.py", *line]
    left = [fatal]

    def count():
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(event, arguments):
        if event in ("open", "os.rename", "os.remove") and str(run) in str(arguments[0]):
            count()

    fsync = os.fsync
    os.fsync = lambda descriptor: (count(), fsync(descriptor))  # written, but still to be renamed
    sys.addaudithook(audit)
    utils.run_script(train.main)


def expect_whole_files(folder):
    paths = list(folder.rglob("*.pt"))
    epochs = {path.name: utils.load_checkpoint(path)["epoch"] for path in paths}
    assert epochs.keys() in (set(), {"last.pt"}, {"last.pt", "best.pt"})
    assert len(epochs) != 1 or epochs["last.pt"] == 1  # best.pt is the next to be written


def test_run_that_is_killed_again_and_again(tmp_path, context, glyphs_dir, start, request):
    """Half of the kills are at a random moment, half at a random file operation."""
    kills, rng = request.config.getoption("kills"), random.Random(0)
    run, whole_run = tmp_path / "run", tmp_path / "whole"
    assert start(whole_run, *RUN) == 0
    while True:
        resume = (run_dir(run) / "last.pt").exists()
        line = [*(["--resume"] if resume else RUN), *options(run, glyphs_dir)]
        fatal = rng.choice([0, rng.randint(1, 40)]) if kills else 0
        process = context.Process(
            target=work, args=(line, tmp_path / "log.txt", run, fatal), daemon=True
        )
        process.start()
        if kills and not fatal:
            process.join(rng.uniform(0, 1.5))
            process.kill()
        process.join(60)
        assert process.exitcode is not None, "it hangs"
        expect_whole_files(run)
        if process.exitcode == -signal.SIGKILL:
            kills -= 1
            continue

        assert process.exitcode == 0, (tmp_path / "log.txt").read_text(encoding="utf-8")
        expect_same_run(run, whole_run)
        names = [sorted(path.name for path in folder.rglob("*.*")) for folder in (run, whole_run)]
        assert names[0] == names[1]  # nothing temporary is left
        if not kills:
            return
        shutil.rmtree(run)
