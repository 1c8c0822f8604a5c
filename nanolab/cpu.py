"""How a CPU computes a run: with which matrix product, in how many threads, and how the threads
share the work. No rule for this holds from one CPU to the next, so it is timed."""

import functools
import math
import os
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from nanolab import kernels
from nanolab.devices import from_rank_0

DEFAULT_THREADS = torch.get_num_threads()  # the cores, or OMP_NUM_THREADS
SECONDS = 0.2  # that each of two choices may take, after one round
KERNEL_GAIN = 1.15  # how many times as fast oneDNN must be: a rerun then makes the same choice
SHARING_LOSS = 1.35  # how many times as fast sharing every operator must be
TRIAL_FLOP = 4e9  # of one timed step, about; larger models are timed with fewer layers
LARGEST_SHARED = 2**24  # parameters up to which each part of a batch may have its own gradients


@dataclass(frozen=True)
class CPUPlan:
    """What the bits of a run on a CPU depend on, besides the run's own options.

    share_batch: each thread takes its part of the micro-batch through the model and back. They wait
    for each other once a step. Without it they share every operator, and wait for each other
    hundreds of times a step. If another program holds one core, all wait for it each time.
    """
    onednn: bool = False
    n_threads: int = 1
    share_batch: bool = False

    def __str__(self):
        product = "oneDNN's convolution" if self.onednn else "torch's matmul"
        if self.n_threads == 1:
            return f"1 thread, {product}"
        shared = "batch" if self.share_batch else "operator"
        return f"{self.n_threads} threads, each with its part of every {shared}, {product}"


def choose_plan(model, config, state, device, dtype):
    """The fastest plan for this model on this machine now, or that of `state` if the run is a
    resumed one. Puts it into effect and into `state`. -> CPUPlan; how many cores other programs
    kept busy (None: not known). On a GPU both are None.

    config: a Config; state: a RunState. Takes about a second. Rank 0 decides for all.
    """
    if device.type != "cpu":
        return None, None
    kept = state.cpu_plan
    if kept and config.threads in (0, kept["n_threads"]):
        plan, busy = CPUPlan(**kept), None
    else:
        plan, busy = from_rank_0(lambda: measure(model, config, dtype))
    use(plan)
    state.cpu_plan = vars(plan)
    return plan, busy


def plan_for_eval(checkpoint, device):
    """All threads share batches, and the matrix product is that of the checkpoint's own run. Puts
    it into effect. -> CPUPlan, or None on a GPU."""
    if device.type != "cpu":
        return None
    plan = CPUPlan((checkpoint.get("cpu_plan") or {}).get("onednn", False),
                   DEFAULT_THREADS, share_batch=DEFAULT_THREADS > 1)
    use(plan)
    return plan


def measure(model, config, dtype):
    """-> the fastest CPUPlan; how many cores other programs kept busy meanwhile, or None."""
    n_threads = config.threads or DEFAULT_THREADS
    batch_size = 2 * n_threads if config.batch_size == "auto" else config.batch_size
    n_params = sum(p.numel() for p in model.parameters())
    may_share = n_params <= LARGEST_SHARED and not config.dropout and config.compile is not True
    step = make_trial(model, batch_size, n_threads, may_share, dtype)

    before = busy_seconds(), time.process_time(), time.perf_counter()
    matmul = CPUPlan()
    times = time_plans([matmul, *[CPUPlan(onednn=True)] * kernels.ONEDNN_AVAILABLE], step)
    onednn = times[matmul] > KERNEL_GAIN * min(times.values())

    counts = [n_threads]
    while counts[-1] > 1 and not config.threads:
        counts.append(counts[-1] // 2)
    plans = [CPUPlan(onednn, n, share) for n in counts for share in (False, True)
             if not share or may_share and 1 < n <= batch_size]
    times = time_plans(plans, step)
    # sharing operators must be clearly faster than sharing batches
    plan = min(plans, key=lambda plan: times[plan] / (SHARING_LOSS if plan.share_batch else 1))

    busy = None
    if before[0] is not None:
        own, elapsed = time.process_time() - before[1], time.perf_counter() - before[2]
        busy = max(busy_seconds() - before[0] - own, 0.0) / elapsed
    return plan, busy


def use_enough_threads(step):
    """One thread, unless all of them are clearly faster at step(). Puts it into effect. Where other
    programs keep cores busy, threads that share every operator wait for them."""
    one, all_threads = CPUPlan(), CPUPlan(n_threads=DEFAULT_THREADS)
    times = time_plans([one, all_threads], lambda plan: step())
    use(all_threads if times[one] > KERNEL_GAIN * times[all_threads] else one)


def make_trial(model, batch_size, n_threads, may_share, dtype):
    """A function that runs forward and backward passes of a small form of the model: of its width,
    with fewer layers, sequences, positions and token ids if it is large."""
    config = model.config
    block_size = min(config.block_size, 256)
    flop_of_layer = 6 * 12 * config.n_embd**2 * block_size  # of one sequence
    smallest = min(n_threads, batch_size) if may_share else 1  # and a multiple of it: equal parts
    wanted = min(batch_size, 1024 // block_size, int(TRIAL_FLOP / flop_of_layer))
    batch_size = max(wanted // smallest, 1) * smallest
    n_layer = min(config.n_layer, max(int(TRIAL_FLOP / flop_of_layer / batch_size), 1))
    trial = type(model)(replace(config, n_layer=n_layer, block_size=block_size, dropout=0.0,
                                vocab_size=min(config.vocab_size, 4096)))
    inputs = torch.zeros(batch_size, block_size, dtype=torch.int64)

    def step(plan):
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            share_batches(trial, plan)(inputs, inputs).backward()
        trial.zero_grad()
    return step


def time_plans(plans, step):
    """The shortest time of a step by each plan, in seconds. They take turns."""
    if len(plans) == 1:
        return {plans[0]: 0.0}
    times = {}
    end = math.inf
    while time.perf_counter() < end:
        for plan in plans:
            use(plan)
            start = time.perf_counter()
            step(plan)
            times.setdefault(plan, []).append(time.perf_counter() - start)
        if end == math.inf:
            end = time.perf_counter() + SECONDS
    return {plan: min(each) for plan, each in times.items()}


current = CPUPlan()  # the plan in effect


def use(plan):
    """Puts a plan into effect in this process."""
    global current
    current = plan
    kernels.USE_ONEDNN = plan.onednn
    torch.set_num_threads(1 if plan.share_batch else plan.n_threads)


@functools.cache
def thread_pool(n_threads):
    return ThreadPoolExecutor(n_threads, initializer=torch.set_num_threads, initargs=(1,))


@contextmanager
def operators_in_threads():
    """Lets all threads share each operator, also where the plan is to share parts of a batch."""
    torch.set_num_threads(current.n_threads)
    yield
    use(current)


def map_parts(function, *tensors):
    """function(...) of each thread's part of the tensors, in a list. Parts of the first dimension,
    and one part unless the plan is to share batches."""
    n_parts = min(current.n_threads, len(tensors[0])) if current.share_batch else 1
    if n_parts == 1:
        return [function(*tensors)]
    return list(thread_pool(current.n_threads).map(
        function, *(tensor.tensor_split(n_parts) for tensor in tensors)))


def share_batches(model, plan):
    """The model, (inputs, targets) -> mean loss, with its batches shared if the plan says so."""
    return SharedModel(model) if plan and plan.share_batch else model


class SharedModel(nn.Module):
    """See share_batches. A part has its own gradients. They are summed in the order of the parts:
    the bits do not depend on which thread ends first."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, inputs, targets):
        return SharedLoss.apply(self.model, inputs, targets, torch.is_grad_enabled(),
                                *self.model.parameters())


class SharedLoss(torch.autograd.Function):
    """The mean loss over a batch, and at once its gradients."""

    @staticmethod
    def forward(ctx, model, inputs, targets, needs_grad, *parameters):
        autocasts, dtype = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")

        def run(part_inputs, part_targets):
            share = len(part_inputs) / len(inputs)
            with torch.set_grad_enabled(needs_grad), torch.autocast("cpu", dtype, autocasts):
                loss = share * model(part_inputs, part_targets)
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
        return None, None, None, None, *grads


def busy_seconds():
    """Processor time that all programs have used since the machine started, or None where the
    system does not say."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return None
    user, nice, system = (int(word) for word in stat.read_text().split(maxsplit=4)[1:4])
    return (user + nice + system) / os.sysconf("SC_CLK_TCK")
