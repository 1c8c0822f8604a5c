"""Memory: how much there is, how much was used, and the largest batch that fits."""

import math
import os
import sys

import torch
import torch.distributed as dist

from nanolab.common import UserError
from nanolab.devices import all_reduce_scalar, autocast


def free_memory():
    """Free bytes, page cache not counted; infinite where the system does not say (macOS)."""
    if "SC_AVPHYS_PAGES" not in os.sysconf_names:
        return math.inf
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def peak_memory(device):
    """The most bytes this process has held so far: of the GPU's memory, or of the machine's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def largest_batch_size(model, dataset, global_batch_size, world_size, device, dtype):
    """The largest micro-batch that fits on every device: tries the divisors of a process's share of
    the global batch, smallest first.

    The OS overcommits CPU memory, so on a CPU a size that would need more than is free is not
    tried. Raises UserError.
    """
    if global_batch_size % world_size:
        raise UserError(f"global_batch_size={global_batch_size} is not divisible by {world_size} "
                        "processes", exit_code=2)
    share = global_batch_size // world_size
    before, best = peak_memory(device), 0
    for size in (d for d in range(1, share + 1) if share % d == 0):
        expected = (peak_memory(device) - before) * size / best if best else 0
        fits = device.type != "cpu" or expected < free_memory()
        fits = fits and fits_in_memory(model, dataset, size, device, dtype)
        if not all_reduce_scalar(dist.ReduceOp.MIN, float(fits), device):
            break
        best = size
    if not best:
        raise UserError("not even batch_size=1 fits in memory; use a smaller model or a smaller "
                        "--block_size")
    return best


def fits_in_memory(model, dataset, size, device, dtype):
    """Whether a step of `size` sequences fits. The trial allocates what a real step needs: also
    AdamW's two moments and, under DDP, the second copy of the gradients in its buckets."""
    try:
        copies = 3 if dist.is_initialized() else 2
        reserved = [torch.empty_like(p) for p in model.parameters() for _ in range(copies)]
        for _ in range(3):  # a first pass may fit where a later one does not
            inputs, targets = dataset.batch([i % len(dataset) for i in range(size)], device)
            with autocast(dtype, device):
                loss = model(inputs, targets)
            loss.backward()
        del reserved
        return True
    except (RuntimeError, MemoryError, OSError) as error:  # of torch, numpy, the file
        if not isinstance(error, MemoryError) and "memory" not in str(error):
            raise
        return False
    finally:
        model.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
