"""Several workers under torchrun, and what can be tested of CUDA graphs without a GPU."""

import contextlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import OFFLINE, ROOT, interrupt_after

import train
import utils
from model import FastLeNet

# 15 batches of 100 and one of a single image, which leaves the second of two workers nothing.
UNEVEN = ["--dataset=Glyphs", "--limit=1501", "--epochs=4", "--batch-size=100"]


@pytest.fixture
def torchrun(tmp_path, glyphs_dir):
    """Start train.py on two workers, with its files in a folder of `tmp_path`."""

    def start(folder, *options):
        folders = [f"--{name}-dir={tmp_path / folder / name}s" for name in ("checkpoint", "image")]
        return subprocess.Popen(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
                *("--nproc-per-node=2", ROOT / "train.py", f"--data-dir={glyphs_dir}"),
                *("--device=cpu", *folders, *options),
            ],
            cwd=tmp_path,
            env=os.environ | OFFLINE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


def history(folder):
    return utils.load_checkpoint(folder / "checkpoints" / "Glyphs" / "last.pt")["history"]


def expect_same_history(one, other):
    """The same losses to 1e-4, and accuracies to an image or two, which rounding may turn."""
    assert len(one) == len(other)
    for row, expected in zip(one, other):
        for key, value in row.items():
            tolerance = 2 / 1501 if "accuracy" in key else 1e-4
            assert value == pytest.approx(expected[key], abs=tolerance), key


def workers_of(process):
    """The process ids of the two workers that torchrun started."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [pid for pid in children if b"train.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def test_two_workers_train_as_one_does_and_resume(tmp_path, glyphs_dir, torchrun):
    folders = [f"--{name}-dir={tmp_path / 'one' / name}s" for name in ("checkpoint", "image")]
    assert train.main([*UNEVEN, *folders, f"--data-dir={glyphs_dir}", "--device=cpu"]) == 0

    process = torchrun("two", *UNEVEN)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "error" not in err
    assert len(re.findall(r"^ +\d/4 ", out, re.MULTILINE)) == 4  # rank 0 alone prints
    assert "on 2 workers" in out
    expect_same_history(history(tmp_path / "two"), history(tmp_path / "one"))
    files = [{p.name for p in (tmp_path / run).rglob("*.*")} for run in ("one", "two")]
    assert files[0] == files[1] == {"best.pt", "last.pt", "metrics.csv", "metrics.png"}

    # Two workers go on with what one has begun.
    last = tmp_path / "one" / "checkpoints" / "Glyphs" / "last.pt"
    whole = history(tmp_path / "one")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "print_epoch", interrupt_after(2))
        assert train.main([*UNEVEN, *folders, f"--data-dir={glyphs_dir}", "--device=cpu"]) == 130
    assert utils.load_checkpoint(last)["epoch"] == 2
    process = torchrun("one", "--resume")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    expect_same_history(history(tmp_path / "one"), whole)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc to find a worker")
@pytest.mark.parametrize("rank", [0, 1])
def test_worker_that_dies_ends_the_run_with_a_message(tmp_path, torchrun, rank):
    process = torchrun("run", "--dataset=Glyphs", "--limit=6000", "--epochs=1000")
    for line in process.stdout:
        if re.match(r" *2/1000 ", line):
            break
    os.kill(int(workers_of(process)[rank]), signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    # Either the other worker noticed, or torchrun was faster and stopped it.
    assert re.search(r"another worker is gone|epoch \d+ is saved", err) or rank == 0
    assert "train.py FAILED" in err
    assert len(history(tmp_path / "run")) >= 2


class FakeGraph:
    """Stands for a CUDA graph: what it replays is set by the test."""

    def replay(self):
        self.work()


@pytest.fixture
def fake_cuda(monkeypatch):
    """A torch.cuda whose graphs do nothing while they are recorded, and can be replayed."""

    class Stream:
        def wait_stream(self, other):
            pass

    recording = []

    @contextlib.contextmanager
    def graph(recorded):
        recording.append(recorded)
        yield
        recording.remove(recorded)

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    return recording


def test_graph_is_fed_every_full_batch(fake_cuda):
    seen = []

    def function(batch, weight):
        if fake_cuda:  # recorded, not run
            result = torch.empty(1)
            fake_cuda[0].work = lambda: (seen.append(batch.tolist()), result.fill_(batch.sum()))
            return result
        seen.append(batch.tolist())
        return batch.sum().float().view(1)

    graph = utils.CudaGraph(function, 4)
    batches = [*torch.randperm(42).split(4), *torch.randperm(42).split(4)]
    sums = [graph(batch, 0.25).item() for batch in batches]
    assert sums == [batch.sum().item() for batch in batches]
    assert seen == [batch.tolist() for batch in batches]  # the short ones, too, each once


def test_learning_rate_of_a_recorded_step_is_changed_in_place():
    optimizers = train.make_optimizers(FastLeNet(), "muon", 0.5, 0.1)
    rates = []
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(group["lr"])  # as on CUDA
            rates.append(group["lr"])
    train.set_rate(optimizers, 0.5)
    assert [group["lr"] for o in optimizers for group in o.param_groups] == rates
    assert rates == [0.25, 0.125]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_trains_as_the_cpu_does(tmp_path, glyphs_dir):
    for device in ("cpu", "cuda"):
        folders = [f"--{name}-dir={tmp_path / device / name}s" for name in ("checkpoint", "image")]
        options = [*folders, f"--data-dir={glyphs_dir}", f"--device={device}"]
        assert train.main([*UNEVEN, *options]) == 0
    for row, expected in zip(history(tmp_path / "cuda"), history(tmp_path / "cpu")):
        assert row == pytest.approx(expected, abs=2e-2)
