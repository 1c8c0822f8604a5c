"""How the work is divided: over processes, one for each GPU, and on a CPU over threads."""

import ctypes
import functools
import os
import platform
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from nanolab.common import UserError

DEFAULT_THREADS = torch.get_num_threads()  # the cores, or OMP_NUM_THREADS


@dataclass(frozen=True)
class World:
    """This process: its device and precision, and its place among the others."""
    device: torch.device
    dtype: torch.dtype | None  # to compute in, by autocast; None: float32
    rank: int = 0
    size: int = 1

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype or torch.bfloat16,
                              enabled=self.dtype is not None)

    def reduce(self, op, value):
        """A number's sum, minimum or maximum over all processes. op: dist.ReduceOp.SUM, ..."""
        if self.size == 1:
            return value
        value = torch.tensor(value, dtype=torch.float64 if self.device.type != "mps" else None,
                             device=self.device)
        dist.all_reduce(value, op)
        return value.item()

    def all(self, condition):
        """Whether a condition holds on every rank."""
        return bool(self.reduce(dist.ReduceOp.MIN, float(condition)))

    def from_rank_0(self, compute):
        """What compute() returns on rank 0, on all ranks."""
        box = [compute() if self.rank == 0 else None]
        if self.size > 1:
            dist.broadcast_object_list(box)
        return box[0]

    def synchronize(self):
        """Waits until the device has done all that was asked of it."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)


def init_distributed(device="auto", amp="auto", tf32=False, fp16_sums=False):
    """Joins the other processes, if torchrun started this one. -> World. Raises UserError.

    The options are those of config/__init__.py.
    """
    torch.set_float32_matmul_precision("high" if tf32 else "highest")  # high: TF32
    if "RANK" in os.environ:
        end_with_parent()
    found = pick_device(device, int(os.environ.get("LOCAL_RANK", 0)))
    dtype = autocast_dtype(amp, found)
    if fp16_sums and found.type != "cuda":
        raise UserError(f"fp16_sums is for CUDA; this run is on {found.type}", exit_code=2)
    torch.backends.cuda.matmul.allow_fp16_accumulation = fp16_sums
    if found.type == "cuda":
        torch.cuda.set_device(found)
    if found.type == "cpu":
        keep_freed_memory()
        if device == "auto":
            print0("no GPU found, falling back to the CPU: fine for small models such as "
                   "config/quickstart.py, far too slow for GPT-2 small")
    if "RANK" not in os.environ:
        return World(found, dtype)
    if found.type == "mps":
        raise UserError("MPS cannot communicate between processes; start one without torchrun, or "
                        "use --device=cpu", each_rank=True)
    # After a restart, torchrun's store still holds the addresses of the processes that died (torch
    # 2.13, one machine). A prefix keeps them apart. Several machines do not count restarts alike,
    # so they cannot use it.
    store, rank, world_size = next(dist.rendezvous("env://"))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        store = dist.PrefixStore(f"restart {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    dist.init_process_group("nccl" if found.type == "cuda" else "gloo", store=store, rank=rank,
                            world_size=world_size,
                            device_id=found if found.type == "cuda" else None)
    return World(found, dtype, rank, world_size)


def end_with_parent():
    """Makes Linux send this process a SIGTERM, on which it saves, when torchrun is gone: killed by
    SIGKILL, torchrun cannot stop its processes."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "prctl"):
        libc.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def end_distributed():
    """The last call of a script: ends this process if torchrun started it.

    A normal exit can abort it (torch 2.13). DDP keeps gloo's threads alive, and one of them may
    still free the tensors of the last collective while Python shuts down.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def pick_device(wanted="auto", local_rank=0):
    """'auto': CUDA, else MPS, else the CPU; or one of the three by name. -> torch.device. Raises
    UserError."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
                 "cpu": True}
    kind = next(name for name in available if available[name]) if wanted == "auto" else wanted
    if not available[kind]:
        raise UserError(f"device='{kind}' is not available here; leave it at 'auto' or use "
                        "--device=cpu", each_rank=True)
    if kind != "cuda":
        return torch.device(kind)
    if local_rank >= torch.cuda.device_count():
        raise UserError(f"process {local_rank} of this machine has no GPU of its own: there are "
                        f"{torch.cuda.device_count()}; start at most that many with "
                        "--nproc_per_node", each_rank=True)
    return torch.device("cuda", local_rank)


def autocast_dtype(amp, device):
    """The 16-bit type to compute in, or None for float32.

    'auto': bfloat16 on CUDA where supported, float16 on older CUDA, None elsewhere (a CPU without
    bfloat16 units is about 100 times slower in it).
    """
    if amp == "auto" and device.type == "cuda":
        amp = "bfloat16" if torch.cuda.is_bf16_supported(False) else "float16"
    return {"auto": None, "off": None, "bfloat16": torch.bfloat16, "float16": torch.float16}[amp]


def keep_freed_memory():
    """Makes glibc keep memory freed in one step for the next. By default it returns large blocks,
    and the end of its heap, to the system, which hands them out again page by page, filled with
    zeros."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # macOS has none
        libc.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        libc.mallopt(-2, 2**26)  # M_TOP_PAD


def print0(text, file=None):
    """Prints on rank 0 only."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=file, flush=True)


def machine(world):
    """The run's hardware: its GPUs' name, or its processor's."""
    if world.device.type == "cuda":
        return f"{world.size} x {torch.cuda.get_device_name(world.device)}"
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{next(models, platform.machine())}, {os.cpu_count()} cores"


def map_parts(function, *tensors):
    """function(...) of parts of the tensors' first dimension, in a list: one part for each CPU
    thread where the threads share batches (see use_threads), else one."""
    n = min(n_parts, len(tensors[0]))
    if n == 1:
        return [function(*tensors)]
    return list(thread_pool(n_parts).map(function, *(x.tensor_split(n) for x in tensors)))


def map_matrices(function, matrices):
    """function(matrices), one matrix independent of the other: (n, rows, columns) -> the same
    shape. The ranks, or the threads of a CPU, each take a part, and all get the whole."""
    if not dist.is_initialized():
        parts = map_parts(function, matrices)
        return parts[0] if len(parts) == 1 else torch.cat(parts)
    size, rank = dist.get_world_size(), dist.get_rank()
    n_each = -(-len(matrices) // size)
    padded = F.pad(matrices, (0, 0, 0, 0, 0, n_each * size - len(matrices)))
    mine = function(padded[rank * n_each:(rank + 1) * n_each]).contiguous()
    gathered = mine.new_empty(padded.shape)
    dist.all_gather_single(gathered, mine)
    return gathered[:len(matrices)]


# Parts of a batch, one for each CPU thread. 1: the threads share every operator instead.
n_parts = 1


def use_threads(n, shared):
    """Lets n CPU threads share every batch or, without `shared`, every operator.

    Threads that share a batch wait for each other once a step, the others hundreds of times. So a
    small model loses no time, and a run next to a busy core keeps about 0.6 of its speed instead of
    0.09 (docs/speed.md).
    """
    global n_parts
    n_parts = n if shared else 1
    torch.set_num_threads(1 if shared else n)


def n_threads():
    return max(n_parts, torch.get_num_threads())


@functools.cache
def thread_pool(n):
    return ThreadPoolExecutor(n, initializer=torch.set_num_threads, initargs=(1,))


class SharedModel(nn.Module):
    """A model, (inputs, targets, ...) -> mean loss, whose batches the threads share. A part has its
    own gradients. They are summed in the order of the parts: the bits do not depend on which
    thread ends first."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, inputs, targets, *options):
        return SharedLoss.apply(self.model, inputs, targets, options, torch.is_grad_enabled(),
                                *self.model.parameters())


class SharedLoss(torch.autograd.Function):
    """The mean loss over a batch, and at once its gradients."""

    @staticmethod
    def forward(ctx, model, inputs, targets, options, needs_grad, *parameters):
        autocasts, dtype = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")

        def run(part_inputs, part_targets):
            fraction = len(part_inputs) / len(inputs)
            with torch.set_grad_enabled(needs_grad), torch.autocast("cpu", dtype, autocasts):
                loss = fraction * model(part_inputs, part_targets, *options)
            return loss.detach(), torch.autograd.grad(loss, parameters) if needs_grad else ()

        (loss, grads), *others = map_parts(run, inputs, targets)
        for other_loss, other_grads in others:
            loss += other_loss
            if needs_grad:
                torch._foreach_add_(grads, other_grads)
        ctx.grads = grads
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss):
        grads, ctx.grads = ctx.grads, None
        torch._foreach_mul_(grads, grad_loss)
        return *[None] * 5, *grads
