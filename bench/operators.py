"""Where a training step's time goes on a CPU, by kind of operator.

    python bench/operators.py
    python bench/operators.py --shapes 6x384 --json operators.json

The shapes are those of bench/nanogpt.py. The model runs as in train.py, with the plan that a run
would choose. Shares are of the processor time inside operators, as torch's profiler counts it, over
all threads.

Prints a Markdown table. "products": those of weights, with their speed in GFLOP/s, and its share of
that of a square product here. Close other programs first.
"""

import time

import torch
from nanogpt import SHAPES
from shared import STEPS_NOT_TIMED, write_json
from torch._C._profiler import _ExperimentalConfig
from torch.nn.utils import clip_grad_norm_
from torch.profiler import ProfilerActivity, profile

import config
from model import GPT, GPTConfig
from nanolab.common import argument_parser, run_script
from nanolab.cpu import measure, share_batches, use
from nanolab.devices import keep_freed_memory
from nanolab.measure import matmul_peak
from nanolab.optim import make_optimizer

KINDS = {  # how the names of a kind's operators begin; "other" has the rest
    "products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm",
                 "aten::mkldnn_convolution", "aten::convolution"),
    "attention": ("aten::_scaled_dot",),
    "GELU": ("aten::gelu",),
    "norms": ("aten::native_layer_norm", "aten::_fused_rms_norm"),
    "softmax": ("aten::_softmax", "aten::amax", "aten::gather", "aten::scatter"),
    "optimiser": ("aten::_fused_adamw", "Optimizer.", "aten::linalg_vector_norm",
                  "aten::_foreach"),
}


def main():
    args = parse_arguments()
    keep_freed_memory()
    rows = {name: profile_shape(name, args) for name in args.shapes}
    print("| job | plan | tokens/s | product speed, GFLOP/s | " + " | ".join([*KINDS, "other"])
          + " |\n" + "| --- " * (len(KINDS) + 5) + "|")
    for name, row in rows.items():
        shares = " | ".join(f"{share:.0%}" for share in row["shares"].values())
        print(f"| {name} | {row['plan']} | {row['tokens_per_second']:,.0f} "
              f"| {row['product_gflops']:.0f}, {row['product_gflops'] / row['peak_gflops']:.0%} "
              f"| {shares} |")
    if args.json:
        write_json(args.json, profiles=rows)


def profile_shape(name, args):
    """-> the plan, tokens/s, GFLOP/s of the products and of a square one, {kind: its share}"""
    shape = {key: value for key, value in SHAPES[name].items() if key != "max_steps"}
    options = config.Config(**shape, global_batch_size=shape["batch_size"], tie_weights=True,
                            init="gpt2", dropout=0.0)
    model = GPT(GPTConfig.from_options(vars(options)), seed=1)
    optimizer = make_optimizer(model, options)
    plan, _ = measure(model, options, None)
    use(plan)
    run = share_batches(model, plan)
    inputs = torch.randint(257, (shape["batch_size"], shape["block_size"]))

    def step():
        run(inputs, inputs).backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(STEPS_NOT_TIMED):
        step()
    start, n_steps = time.perf_counter(), 0
    while time.perf_counter() - start < args.seconds or n_steps < 2:
        step()
        n_steps += 1
    seconds = (time.perf_counter() - start) / n_steps
    all_threads = _ExperimentalConfig(profile_all_threads=True)
    with profile(activities=[ProfilerActivity.CPU], experimental_config=all_threads) as profiler:
        for _ in range(n_steps):
            step()
    times = dict.fromkeys([*KINDS, "other"], 0.0)
    for row in profiler.key_averages():
        if row.key == "SharedLoss":  # waits for the threads
            continue
        kind = next((kind for kind, starts in KINDS.items() if row.key.startswith(starts)), "other")
        times[kind] += row.self_cpu_time_total / 1e6 / n_steps
    # times of threads that work at the same time are added up
    product_seconds = times["products"] / (plan.n_threads if plan.share_batch else 1)
    flop = inputs.numel() * 6 * sum(m.weight.numel() for m in model.modules()
                                    if isinstance(m, torch.nn.Linear))
    return {"plan": str(plan), "tokens_per_second": inputs.numel() / seconds,
            "product_gflops": flop / product_seconds / 1e9,
            "peak_gflops": matmul_peak(torch.device("cpu"), None) / 1e9,
            "shares": {kind: each / sum(times.values()) for kind, each in times.items()}}


def parse_arguments():
    parser = argument_parser(__doc__)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES),
                        help="default: all")
    parser.add_argument("--seconds", type=float, default=5, help="per shape (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write the figures")
    return parser.parse_args()


if __name__ == "__main__":
    run_script(main)
