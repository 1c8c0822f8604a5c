"""Where a run happens: on which device, in which precision, in how many processes; and how it is
asked to stop."""

import ctypes
import os
import platform
import signal
import stat
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from nanolab.common import UserError


def init_distributed(wanted="auto"):
    """Picks this process's device and joins the other processes if torchrun started it. -> device,
    rank, world size."""
    if "RANK" in os.environ:
        end_with_parent()
    device = pick_device(wanted, int(os.environ.get("LOCAL_RANK", 0)))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if device.type == "cpu":
        keep_freed_memory()
    if "RANK" not in os.environ:
        return device, 0, 1
    if device.type == "mps":
        raise UserError("MPS cannot communicate between processes; start one without torchrun, or "
                        "use --device=cpu", each_rank=True)
    # After a restart, torchrun's store still holds the addresses of the processes that died (torch
    # 2.13, one machine). A prefix keeps them apart. Several machines do not count restarts alike,
    # so they cannot use it.
    store, rank, world_size = next(dist.rendezvous("env://"))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        store = dist.PrefixStore(f"restart {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=rank,
                            world_size=world_size,
                            device_id=device if device.type == "cuda" else None)
    return device, rank, world_size


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


def keep_freed_memory():
    """Makes glibc keep memory freed in one step for the next. By default it returns large blocks,
    and the end of its heap, to the system, which hands them out again page by page, filled with
    zeros."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # macOS has none
        libc.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        libc.mallopt(-2, 2**26)  # M_TOP_PAD


def autocast_dtype(amp, device):
    """The 16-bit type to compute in, or None for float32.

    'auto': bfloat16 on CUDA where supported, float16 on older CUDA, None elsewhere (a CPU without
    bfloat16 units is about 100 times slower in it).
    """
    if amp == "auto" and device.type == "cuda":
        amp = "bfloat16" if torch.cuda.is_bf16_supported(False) else "float16"
    return {"auto": None, "off": None, "bfloat16": torch.bfloat16, "float16": torch.float16}[amp]


def autocast(dtype, device):
    """The context to compute in `dtype`, which autocast_dtype gave."""
    return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


def print0(text):
    """Prints on rank 0 only."""
    if os.environ.get("RANK", "0") == "0":
        print(text, flush=True)


def all_reduce_scalar(op, value, device):
    """The sum, minimum or maximum of a number over all processes."""
    if not dist.is_initialized():
        return value
    value = torch.tensor(value, device=device)
    dist.all_reduce(value, op)
    return value.item()


def from_rank_0(compute):
    """What compute() returns on rank 0, on all ranks."""
    if not dist.is_initialized():
        return compute()
    box = [compute() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(box)
    return box[0]


def begin_read(numbers):
    """Begins to copy a tensor from its device. -> a function that waits for the copy, not for work
    queued after it, and returns a list."""
    if numbers.device.type != "cuda":
        return numbers.tolist
    copy = numbers.to("cpu", non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def read():
        copied.synchronize()
        return copy.tolist()
    return read


def synchronize(device):
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def machine(device):
    """The run's hardware: its GPUs' name, or its processor's."""
    if device.type == "cuda":
        n_gpus = dist.get_world_size() if dist.is_initialized() else 1
        return f"{n_gpus} x {torch.cuda.get_device_name(device)}"
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{next(models, platform.machine())}, {os.cpu_count()} cores"


def same_on_all_ranks(value, device):
    lowest = all_reduce_scalar(dist.ReduceOp.MIN, float(value), device)
    return lowest == all_reduce_scalar(dist.ReduceOp.MAX, float(value), device)


def torchrun_restarted(device):
    """Whether torchrun restarted this run after a process died. Machines do not count restarts
    alike."""
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return bool(all_reduce_scalar(dist.ReduceOp.MAX, float(restarts != "0"), device))


class StopSignal:
    """Turns Ctrl-C, SIGTERM and SIGHUP into a request to stop after the current step, on which the
    ranks then agree.

    A second Ctrl-C ends the process at once. A repeated SIGTERM is ignored; use SIGKILL. SIGHUP
    means that the terminal is gone; under nohup it stays ignored.
    """

    def __init__(self):
        self.requested = False
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self.request)

    def request(self, number, frame):
        self.requested = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        if number == signal.SIGHUP:
            leave_terminal()


def leave_terminal():
    """Sends what goes to the terminal to nowhere: a write to one that is gone would be an error."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for number in (1, 2):
        if stat.S_ISCHR(os.fstat(number).st_mode):
            os.dup2(nowhere, number)
