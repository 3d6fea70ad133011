"""Several processes on one machine, one for each GPU, as torchrun starts them: who this is, how results come together.

    torchrun --nproc_per_node=4 train.py --data_path ./data/ --save_path ./ckpt/mymodel_new.pt

Without torchrun there is one process, number 0 of 1, and nothing here does anything.
"""
import contextlib
import datetime
import os
import signal
import sys

import torch
import torch.distributed as dist

RANK, PROCESSES, LOCAL_RANK = (int(os.environ.get(name, default)) for name, default in
                               (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))


def start(device: torch.device):
    """Join the other processes, if there are any. Only process 0 goes on printing its progress; errors all print."""
    if PROCESSES > 1 and not dist.is_initialized():
        # the others wait for hours where process 0 has to find R peaks first; torchrun notices if it dies
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(hours=12))
        if RANK:
            sys.stdout = open(os.devnull, "w")
            signal.signal(signal.SIGTERM, signal.SIG_DFL)           # they have nothing to save


def stop():
    """Leave the other processes."""
    if dist.is_initialized():
        dist.destroy_process_group()


def add_up(values: torch.Tensor) -> torch.Tensor:
    """The sum of values over all processes, in each of them. What each leaves 0 for the others is so put together."""
    if PROCESSES > 1:
        dist.all_reduce(values)
    return values


def wait_for_all():
    """Go on when every process has come here."""
    if PROCESSES > 1:
        dist.barrier()


@contextlib.contextmanager
def one_after_the_first():
    """Let process 0 do what stands inside before the others do, who then find its files."""
    if RANK:
        wait_for_all()
    yield
    if not RANK:
        wait_for_all()


def replicate(model: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """The model with gradients averaged over all processes; BatchNorm sees the records of its own process."""
    if PROCESSES == 1:
        return model
    return torch.nn.parallel.DistributedDataParallel(model, [device.index] if device.type == "cuda" else None)


def share_buffers(model: torch.nn.Module):
    """Give every process the running statistics of process 0, which are those that its checkpoint keeps."""
    if PROCESSES > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
