"""Measuring: the mean loss over part of a data set, and the speed of this machine's matrix
products."""

import time
from contextlib import nullcontext

import torch
import torch.distributed as dist

from nanolab.cpu import operators_in_threads
from nanolab.devices import autocast, synchronize
from nanolab.kernels import linear


def mean_loss(model, dataset, n_windows, batch_size, device, dtype=None, rank=0, world_size=1):
    """Mean cross-entropy in nats over the first n_windows of a TokenDataset. The processes share
    the work, and the result does not depend on their number or on batch_size. Draws no random
    number."""
    mine = range(rank, n_windows, world_size)
    batches = [mine[start:start + batch_size] for start in range(0, len(mine), batch_size)]
    losses = batch_losses(model, dataset, batches, device, dtype)
    sizes = torch.tensor([len(ids) for ids in batches], dtype=torch.float64)
    total = sum_over_ranks(torch.dot(losses, sizes), device)
    return total.item() / n_windows


def mean_loss_of_groups(model, dataset, groups, batch_size, device, dtype=None, rank=0,
                        world_size=1):
    """Mean cross-entropy in nats of each group of windows, as mean_loss has it of all of them.

    groups: ranges of windows. -> a list
    """
    batches, of_group = [], []
    for i in range(rank, len(groups), world_size):
        for start in range(0, len(groups[i]), batch_size):
            batches.append(groups[i][start:start + batch_size])
            of_group.append(i)
    losses = batch_losses(model, dataset, batches, device, dtype)
    sizes = torch.tensor([len(ids) for ids in batches], dtype=torch.float64)
    sums = torch.zeros(len(groups), dtype=torch.float64)
    sums.index_add_(0, torch.tensor(of_group, dtype=torch.int64), losses * sizes)
    sums = sum_over_ranks(sums, device).tolist()
    return [total / len(group) for total, group in zip(sums, groups)]


@torch.no_grad()
def batch_losses(model, dataset, batches, device, dtype):
    """The mean loss of each batch of window ids, as float64 on the CPU."""
    was_training = model.training
    model.eval()
    losses = [torch.zeros((), device=device)]  # so that there is one to stack
    for ids in batches:
        with autocast(dtype, device):
            losses.append(model(*dataset.batch(ids, device)))
    model.train(was_training)
    return torch.stack(losses)[1:].cpu().double()


def sum_over_ranks(total, device):
    if not dist.is_initialized():
        return total
    total = total.to(device)
    dist.all_reduce(total)
    return total


def matmul_peak(device, dtype):
    """Floating-point operations per second of square matrix products, measured on this device now.
    MFU is relative to it, so it needs no table of GPUs. Best of 0.5 s, after a warm-up."""
    size = 8192 if device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device, dtype=dtype or torch.float32)

    def seconds(rows):
        synchronize(device)
        start = time.perf_counter()
        linear(rows, a)
        synchronize(device)
        return time.perf_counter() - start

    with operators_in_threads() if device.type == "cpu" else nullcontext():
        # a CPU without 16-bit units would take seconds for each product
        rows = a[:128] if device.type == "cpu" and seconds(a[:128]) > 0.05 else a
        times, end = [], time.perf_counter() + 0.5
        while len(times) < 3 or time.perf_counter() < end:
            times.append(seconds(rows))
    return 2 * len(rows) * size * size / min(times[1:])
