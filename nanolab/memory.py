"""Memory: how much there is, how much was used, and the largest batch that fits."""

import math
import os
import sys
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode

from config import divisors
from nanolab.common import UserError
from nanolab.devices import all_reduce_scalar, autocast

MARGIN = 0.1  # the share of a GPU that a step must leave free, for what comes later in a run


def peak_memory(device):
    """The most bytes this process has held so far: of the GPU's memory, or of the machine's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def free_memory(device):
    """Bytes that are still available. GPU: its free memory, less MARGIN. CPU: free memory without
    the page cache; infinite where the OS does not say (macOS)."""
    if device.type == "cuda":
        return (1 - MARGIN) * torch.cuda.mem_get_info(device)[0]
    if "SC_AVPHYS_PAGES" not in os.sysconf_names:
        return math.inf
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def check_weights_fit(config):
    """Raises UserError if the weights, which are made in the machine's memory, exceed it."""
    if "SC_PHYS_PAGES" not in os.sysconf_names:
        return
    installed = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    matrices = 12 * config.n_layer * config.n_embd**2  # about
    embeddings = (2 - config.tie_weights) * config.vocab_size * config.n_embd
    needed = 4 * (matrices + embeddings)
    if needed > installed:
        raise UserError(f"n_layer={config.n_layer}, n_embd={config.n_embd} and vocab_size="
                        f"{config.vocab_size} make weights of about {needed / 1e9:,.0f} GB, and "
                        f"this machine has {installed / 1e9:,.0f} GB of memory", exit_code=2)


def count_training_memory(model, batch_size, dtype):
    """Bytes that a step holds at the end of its forward pass: 16 per parameter (weights, gradients,
    AdamW's moments), and what is stored for the backward pass. Computes nothing.

    What one layer needs in passing comes on top, and so do 4 bytes per parameter of tail_average,
    which a run has allocated before it asks how much is free.
    """
    stored = {}

    def remember(tensor):
        storage = tensor.untyped_storage()
        stored[storage._cdata] = storage
        return tensor

    parameters = list(model.parameters())
    device = parameters[0].device
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        weights = [mode.from_tensor(p).untyped_storage() for p in parameters]
        tokens = torch.zeros(batch_size, model.config.block_size, dtype=torch.int64, device=device)
        with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
            with autocast(dtype, device):
                model(tokens, tokens)
    for storage in weights:  # counted with their gradients and moments
        stored.pop(storage._cdata, None)
    activations = sum(storage.nbytes() for storage in stored.values())
    return 16 * sum(p.numel() for p in parameters) + activations


def largest_batch_size(model, compiled_model, optimizer, dataset, global_batch_size, world_size,
                       device, dtype):
    """The largest micro-batch that fits on every device, a divisor of a process's share of the
    global batch. Raises UserError.

    Tries real steps, of the compiled model and with the optimiser's state, beginning at the size
    that count_training_memory predicts: larger while they fit, else smaller. The OS overcommits CPU
    memory, so on a CPU nothing above the prediction is tried.
    """
    if global_batch_size % world_size:
        raise UserError(f"global_batch_size={global_batch_size} is not divisible by {world_size} "
                        "processes", exit_code=2)
    share = global_batch_size // world_size
    sizes = divisors(share)
    budget = free_memory(device)
    i = 0
    while i + 1 < len(sizes) and count_training_memory(model, sizes[i + 1], dtype) < budget:
        i += 1
    i = all_reduce_scalar(dist.ReduceOp.MIN, i, device)

    def fits(size):
        fits_here = step_fits(compiled_model, dataset, size, device, dtype)
        return bool(all_reduce_scalar(dist.ReduceOp.MIN, float(fits_here), device))

    with trial_state(model, optimizer, device):
        if fits(sizes[i]):
            while device.type != "cpu" and i + 1 < len(sizes) and fits(sizes[i + 1]):
                i += 1
        else:
            i -= 1
            while i >= 0 and not fits(sizes[i]):
                i -= 1
    if compiled_model is not model:
        # the trials leave graphs for any batch size, which are slower than those for one
        torch.compiler.reset()
    if i < 0:
        raise UserError("not even batch_size=1 fits in memory; use a smaller model or a smaller "
                        "--block_size")
    return sizes[i]


@contextmanager
def trial_state(model, optimizer, device):
    """What a step finds in memory: gradients, the optimiser's state and, under DDP, its buckets.
    They go again afterwards; a step at learning rate 0 makes the state, so no weight changes."""
    optimizers = getattr(optimizer, "optimizers", [optimizer])
    rates = [group["lr"] for group in optimizer.param_groups]
    is_new = not any(each.state for each in optimizers)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    if is_new:
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        optimizer.step()
    buckets = [torch.empty_like(p) for p in model.parameters() if dist.is_initialized()]
    if device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(1 - MARGIN, device)
    try:
        yield
    finally:
        del buckets
        model.zero_grad(set_to_none=True)
        for group, rate in zip(optimizer.param_groups, rates):
            group["lr"] = rate
        for each in optimizers if is_new else []:
            each.state.clear()
        if device.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0, device)
            torch.cuda.empty_cache()


def step_fits(model, dataset, size, device, dtype, n_passes=3):
    """Whether forward and backward passes over `size` sequences fit. A first pass may fit where a
    later one does not."""
    try:
        for _ in range(n_passes):
            inputs, targets = dataset.batch([i % len(dataset) for i in range(size)], device)
            with autocast(dtype, device):
                loss = model(inputs, targets)
            loss.backward()
        return True
    except (RuntimeError, MemoryError, OSError) as error:  # of torch, numpy, the file
        if not isinstance(error, MemoryError) and "memory" not in str(error):
            raise
        return False
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()
