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
    [loss] = mean_losses(model, dataset, [range(n_windows)], batch_size, device, dtype, rank,
                         world_size)
    return loss


@torch.no_grad()
def mean_losses(model, dataset, groups, batch_size, device, dtype=None, rank=0, world_size=1):
    """mean_loss of each group of windows. groups: ranges. -> [loss]"""
    was_training = model.training
    model.eval()
    batches = [(i, group[start:start + batch_size]) for i, group in enumerate(groups)
               for start in range(0, len(group), batch_size)][rank::world_size]
    losses = [torch.zeros((), device=device)]  # the first, for a rank may have no batch
    for _, ids in batches:
        with autocast(dtype, device):
            losses.append(model(*dataset.batch(ids, device)))
    model.train(was_training)
    sums = torch.zeros(len(groups), dtype=torch.float64)
    for (i, ids), loss in zip(batches, torch.stack(losses)[1:].cpu().double()):
        sums[i] += loss * len(ids)
    if world_size > 1:
        sums = sums.to(device)
        dist.all_reduce(sums)
    return [total / len(group) for total, group in zip(sums.tolist(), groups)]


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
