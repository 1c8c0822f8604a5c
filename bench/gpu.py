"""Speed and memory on one GPU, in float32 (with TF32), bfloat16 and float16, as a Markdown table.

    python bench/gpu.py                                     # GPT-2 small's shape, 12 x 1,024 tokens
    python bench/gpu.py --batch_size=4 --optimizer=muon     # other flags go to train.py

Each precision is measured in a process of its own: a run of config/bench.py, the head's loss
against what nanoGPT runs (F.cross_entropy of all logits, compiled), and the largest batch that
fits. The first steps compile and are not timed. Close other programs first. docs/gpu.md takes the
output as it is.
"""

import gc
import json
import statistics
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
import torch.nn.functional as F

import config as configuration
import train
from bench.shared import STEPS_NOT_TIMED, commit, log_mean, run_python
from model import GPT, GPTConfig
from nanolab.common import UserError, argument_parser, run_script
from nanolab.devices import autocast, autocast_dtype, machine, pick_device, synchronize
from nanolab.kernels import head_loss, head_loss_outside_graph, softcap
from nanolab.memory import largest_batch_size
from nanolab.optim import make_optimizer

PRECISIONS = {"off": "float32 (TF32)", "bfloat16": "bfloat16", "float16": "float16"}  # by amp
HEADER = ("precision", "tokens/s", "TFLOP/s", "of matrix products here", "peak memory, GiB",
          "largest batch", "head, ms", "compiled cross-entropy, ms", "head, GiB",
          "compiled cross-entropy, GiB")


def main():
    precisions, flags, largest = parse_arguments()
    figures = {}
    for amp in precisions:
        print(f"measuring {PRECISIONS[amp]}; the first steps compile", file=sys.stderr, flush=True)
        figures[amp] = measure_in_new_process([*flags, f"--amp={amp}"], largest)
    print(format_table(figures, flags))


def measure_in_new_process(flags, largest):
    job = json.dumps({"flags": flags, "largest": largest})
    return json.loads(run_python(__file__, "--one_precision", job).splitlines()[-1])


def measure(flags, largest):
    """The figures of one precision. flags: train.py's; largest: its divisors are tried as the
    largest batch; 0: none."""
    config = configuration.load([str(ROOT / "config/bench.py"), *flags])
    device = pick_device(config.device)
    dtype = autocast_dtype(config.amp, device)
    figures = {"machine": machine(device), **measure_training(config)}
    free_what_is_left(device)
    figures |= measure_head(config, device, dtype)
    free_what_is_left(device)
    figures["largest_batch"] = (find_largest_batch(config, device, dtype, largest) if largest
                                else "")
    return figures


def measure_training(config):
    with tempfile.TemporaryDirectory() as config.out_dir:
        train.train(config)
        rate, mfu = (log_mean(config.out_dir, key) for key in ("tokens_per_second", "mfu"))
        summary = json.loads(Path(config.out_dir, "summary.json").read_text())
    flops_per_token = GPT(GPTConfig.from_options(vars(config))).flops_per_token()
    return {"tokens_per_second": rate, "flops_per_second": rate * flops_per_token,
            "mfu": mfu, "peak_memory": summary["peak_memory_mb"] * 2**20}


def measure_head(config, device, dtype):
    """Seconds and bytes of the head's loss and gradients: nanolab's, and plain cross-entropy's."""
    n_rows, C, V = config.batch_size * config.block_size, config.n_embd, config.vocab_size
    compiled, cap = device.type == "cuda", config.logit_softcap
    hidden = torch.randn(n_rows, C, device=device, requires_grad=True)
    weight = torch.randn(V, C, device=device).mul_(0.02).requires_grad_()
    targets = torch.randint(V, (n_rows,), device=device)

    def plain_loss(hidden, weight):
        return F.cross_entropy(softcap(F.linear(hidden, weight), cap).float(), targets)

    def nanolab_loss(hidden, weight):
        if compiled:
            return head_loss_outside_graph(hidden, weight, targets, cap, True)
        return head_loss(hidden, weight, targets, cap)

    figures = {}
    losses = {"head": nanolab_loss,
              "cross_entropy": torch.compile(plain_loss) if compiled else plain_loss}
    for name, loss in losses.items():
        seconds, n_bytes = time_loss(loss, (hidden, weight), device, dtype)
        figures |= {f"{name}_seconds": seconds, f"{name}_bytes": n_bytes}
    return figures


def time_loss(loss, leaves, device, dtype):
    """Median seconds of a forward and backward pass, and the bytes it needs beside its inputs (None
    on a CPU)."""
    seconds = []
    for _ in range(STEPS_NOT_TIMED + 10):
        for leaf in leaves:
            leaf.grad = None
        synchronize(device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
        start = time.perf_counter()
        with autocast(dtype, device):
            value = loss(*leaves)
        value.backward()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    n_bytes = None
    if device.type == "cuda":
        n_bytes = torch.cuda.max_memory_allocated(device) - before
    return statistics.median(seconds[STEPS_NOT_TIMED:]), n_bytes


def find_largest_batch(config, device, dtype, largest):
    model = GPT(GPTConfig.from_options(vars(config))).to(device)
    compiled_model = train.compile_model(model, config, device)
    return largest_batch_size(model, compiled_model, make_optimizer(model, config),
                              train.open_split(config, "train"), largest, 1, device, dtype)


def free_what_is_left(device):
    """Compiled code, and memory that the next measurement needs."""
    if device.type == "cuda":
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()


def format_table(figures, flags):
    """A caption and a Markdown table. figures: what measure returned, by amp."""
    where = next(iter(figures.values()))["machine"]
    lines = [f"{where}; {date.today()}, commit {commit()}, torch {version('torch')}. "
             f"Flags of train.py: `config/bench.py {' '.join(flags)}`", "",
             f"| {' | '.join(HEADER)} |", "| --- |" + " ---: |" * (len(HEADER) - 1)]
    for amp, one in figures.items():
        cells = (PRECISIONS[amp], f"{one['tokens_per_second']:,.0f}",
                 f"{one['flops_per_second'] / 1e12:,.3g}", f"{one['mfu']:.1%}",
                 in_gib(one["peak_memory"]), str(one["largest_batch"]),
                 f"{one['head_seconds'] * 1e3:,.3g}", f"{one['cross_entropy_seconds'] * 1e3:,.3g}",
                 in_gib(one["head_bytes"]), in_gib(one["cross_entropy_bytes"]))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def in_gib(n_bytes):
    return "" if n_bytes is None else f"{n_bytes / 2**30:.2f}"


def parse_arguments():
    """-> the precisions, flags for train.py, the largest batch to try. Raises UserError."""
    parser = argument_parser(__doc__)
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS),
                        help="values of train.py's amp (default: all)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda",
                        help="cpu only tries the script (default: cuda)")
    parser.add_argument("--batch_size", type=int, default=12, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=30, help="default: %(default)s")
    parser.add_argument("--largest", type=int, default=5040, metavar="N",
                        help="its divisors are tried as the largest batch; 0: none (default: "
                        "%(default)s)")
    args, flags = parser.parse_known_args()
    if args.batch_size < 1 or args.largest < 0 or args.steps < 5:
        parser.error("--batch_size must be at least 1, --largest at least 0, --steps at least 5")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("there is no CUDA GPU here; --device=cpu tries the script without one")
    flags = [f"--device={args.device}", f"--batch_size={args.batch_size}",
             f"--global_batch_size={args.batch_size}", f"--max_steps={args.steps}", *flags]
    configuration.load([str(ROOT / "config/bench.py"), *flags])  # a mistake ends the script here
    return args.precisions, flags, args.largest


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one_precision"]:
        print(json.dumps(measure(**json.loads(sys.argv[2]))))
    else:
        run_script(main)
