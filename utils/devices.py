"""Where a network runs: on a CPU, a GPU, or several of them."""

import os
import signal
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from utils.cli import Error


def choose_device(name):
    """Return the torch.device for auto, cpu, cuda or mps; auto takes the fastest there is.

    Raises:
        Error: this machine or this build of torch has no such device.
    """
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        name = next(device for device, there in available.items() if there)
    if not available[name]:
        raise Error(f"--device {name} is not available here: use --device auto")
    return torch.device(name)


class Workers:
    """The processes that train one network: this one alone, or all that torchrun started.

    Attributes:
        rank: number of this process, from 0; rank 0 alone prints and writes.
        count: number of processes.
        device: the torch.device of this process.
        launcher: the command that starts a script with as many processes.
    """

    def __init__(self, device):
        self.rank = int(os.environ.get("RANK", 0))
        self.count = int(os.environ.get("WORLD_SIZE", 1))
        self.launcher = "python"
        self.device = choose_device(device)
        if self.count == 1:
            return
        if self.device.type == "mps":
            if device == "mps":
                raise Error("torchrun cannot share an mps device: use --device cpu")
            self.device = torch.device("cpu")
        local = {name: int(os.environ[f"LOCAL_{name}"]) for name in ("RANK", "WORLD_SIZE")}
        self.launcher = f"torchrun --nproc-per-node {local['WORLD_SIZE']}"
        if self.device.type == "cuda":
            if local["WORLD_SIZE"] > torch.cuda.device_count():
                raise Error(
                    f"torchrun started {local['WORLD_SIZE']} workers here for "
                    f"{torch.cuda.device_count()} GPUs: start one each, or use --device cpu"
                )
            self.device = torch.device("cuda", local["RANK"])
            torch.cuda.set_device(self.device)
        dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
        if self.rank > 0:
            sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 - open to the end

    def wrap(self, model):
        """Return `model` as the network whose gradients are averaged over the workers."""
        return model if self.count == 1 else DistributedDataParallel(model)

    def sum(self, tensor):
        """Add up `tensor` over the workers, in place, and return it."""
        if self.count > 1:
            dist.all_reduce(tensor)
        return tensor

    def share(self, value):
        """Return rank 0's `value` (made of plain values), once rank 0 is there."""
        values = [value]
        if self.count > 1:
            dist.broadcast_object_list(values, device=self.device)
        return values[0]

    def lost(self, error):
        """Tell whether `error` means that another worker is gone."""
        lost = self.count > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error))
        if lost:  # torchrun is about to end this one too, which has more to say
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        return lost

    def close(self):
        """Part from the other workers."""
        if self.count > 1:
            dist.destroy_process_group()


class CudaGraph:
    """Calls `function(batch, weight)`, and replays it from a CUDA graph where it can.

    A step of a small network has so many short kernels that Python cannot launch them as fast as
    the GPU runs them; a recorded graph is launched as one. The function must do all its work on
    the GPU and must not wait for a result. Only full batches are recorded, after three calls that
    warm up what is allocated once (https://docs.pytorch.org/docs/stable/notes/cuda.html). The next
    call overwrites the tensor that a call returns.

    Args:
        size: length of a full batch; all full batches must have the same weight.
    """

    def __init__(self, function, size):
        self.function, self.size = function, size
        self.calls, self.graph = 0, None
        self.stream = torch.cuda.Stream()
        # Of optimizers that could be recorded but are not yet.
        warnings.filterwarnings("ignore", "This instance was constructed with capturable=True")

    def __call__(self, batch, weight):
        if len(batch) != self.size:
            return self.function(batch, weight)
        self.calls += 1
        if self.calls <= 3:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                result = self.function(batch, weight)
            torch.cuda.current_stream().wait_stream(self.stream)
            return result
        if self.graph is None:
            self.graph, self.batch = torch.cuda.CUDAGraph(), batch.clone()
            with torch.cuda.graph(self.graph):
                self.result = self.function(self.batch, weight)
        self.batch.copy_(batch)
        self.graph.replay()
        return self.result
