"""What a training step reaches of what the card allows, measured in one call.

    python bench/gpu.py                        # GPT-2 small's shape, tied, 12 x 1,024 tokens a step
    python bench/gpu.py --cards                # the limits of known cards; measures nothing

It times a large matrix product, attention, and a copy of 2 GB, from which follows the least time
of a step (least_seconds); then train.py. bench/nanogpt.py compares it. Close other programs first.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F

from bench.nanogpt import describe, flags_of, print_row, run_nanolab, shape_of
from nanolab.common import argument_parser, run_script
from nanolab.distributed import World, autocast_dtype, pick_device
from nanolab.runlog import matmul_peak, shortest

RATES = ("products", "attention", "its backward pass", "memory")  # TFLOP/s three times, GB/s
# What known cards should reach. Memory: 0.85 of NVIDIA's data sheets. Products: 0.95 of the data
# sheet on GeForce cards (152334H in modula-systems/modula PR #1, for a 3090), 0.85 on A100s
# (llm.c's 90 minutes for 10 billion tokens on eight imply it), on Hopper as in an H200's profile,
# which attention is from too (bench/results/gpu_h200/3_steps_and_pairs.txt). Other attention is
# assumed.
CARDS = {"RTX 3090": (0.95 * 71, 55, 45, 0.85 * 936),
         "RTX 4090": (0.95 * 165.2, 120, 100, 0.85 * 1008),
         "A100 40 GB": (0.85 * 312, 115, 95, 0.85 * 1555),
         "A100 80 GB": (0.85 * 312, 115, 95, 0.85 * 2039),
         "H100 SXM": (711, 300, 230, 0.85 * 3350),
         "H200": (711, 300, 230, 0.85 * 4800)}


def least_seconds(shape, rates):
    """The least time of one step of one micro-batch on a GPU in 16 bits: {part: seconds}.

    shape: from shape_of; rates: as RATES. Assumed: a compiled kernel reads its inputs and writes
    its outputs once, the head's loss is one kernel, and what a product moves is part of its rate.
    """
    L, C, V, T = (shape[key] for key in ("n_layer", "n_embd", "vocab_size", "block_size"))
    N, P = shape["batch_size"] * T, V + -V % 64  # tokens; logits of one, padded
    blocks, head = 12 * L * C * C, V * C  # weights in matrix products
    n_parameters = blocks + head + T * C  # tied; norms and biases are 0.1 % more
    forward = 2 * N * T * C * L  # operations of attention, half of them masked and left out
    n_bytes = (
        116 * N * C * L  # forward: residual and norm 24, GELU 16; backward: 32, norms 32, q k v 12
        + 4 * N * P  # the logits in 16 bits, read; their gradient, written
        + 6 * (blocks + head) + 6 * blocks)  # weights to 16 bits, and gradients to 32 bits
    products, attention, attention_backward, memory = rates
    return {"products": 6 * (blocks + head) * N / products / 1e12,
            "attention": (forward / attention + 2.5 * forward / attention_backward) / 1e12,
            "other kernels": n_bytes / memory / 1e9,
            "update": 40 * n_parameters / memory / 1e9}  # AdamW 28, gradient norm 4, clipping 8


def main():
    parser = argument_parser(__doc__)
    parser.add_argument("--cards", action="store_true", help="print the limits of known cards")
    args = parser.parse_args()
    shape = shape_of("12x768-gpt2", "cuda", batch_size=12)
    rates = CARDS if args.cards else {"the limit": print_rates(shape)}
    print_row("", "products, ms", "attention, ms", "other kernels, ms", "update, ms", "step, ms",
              "tokens/s", "of the limit", "peak memory, MB")
    print_row("---", *["---:"] * 8)
    for name in rates:
        parts = least_seconds(shape, rates[name]).values()
        print_row(name, *(f"{seconds * 1e3:.1f}" for seconds in [*parts, sum(parts)]),
                  f"{tokens_per_second(shape, rates[name]):,.0f}", "", "")
    if args.cards:
        return
    limit = tokens_per_second(shape, rates["the limit"])
    print_row("nanolab", *[""] * 5, *cells(run_nanolab([*flags_of(shape), "--device=cuda"]), limit))


def tokens_per_second(shape, rates):
    """The limit of a card."""
    return shape["batch_size"] * shape["block_size"] / sum(least_seconds(shape, rates).values())


def cells(figures, limit):
    """A run's tokens/s, their fraction of the limit, and MB, for a row of a table."""
    rate = figures["tokens_per_second"]
    return f"{rate:,.0f}", f"{rate / limit:.2f}", f"{figures['peak_memory_mb']:,}"


def print_rates(shape):
    """Measures this GPU. -> as RATES"""
    device = pick_device("cuda")
    rates = measure_rates(shape, World(device, autocast_dtype("auto", device)), 2 * 10**9)
    torch.cuda.empty_cache()  # the runs need the memory
    print(f"{describe('cuda')}\n\nRates here: "
          + ", ".join(f"{name} {rate:,.4g}" for name, rate in zip(RATES, rates)) + "\n", flush=True)
    return rates


def measure_rates(shape, world, n_bytes):
    """As RATES, in the precision that a run would choose. n_bytes: how many to copy."""
    T, H = shape["block_size"], shape["n_head"]
    q, k, v, grad = torch.randn(4, shape["batch_size"], H, T, shape["n_embd"] // H,
                                device=world.device, dtype=world.dtype).unbind()
    inputs = [x.requires_grad_() for x in (q, k, v)]

    def attention():
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    forward = shortest(attention, world)
    both = shortest(lambda: torch.autograd.grad(attention(), inputs, grad), world)
    flop = 2 * q.numel() * T  # of the forward pass, without those that the mask leaves out
    source, target = torch.zeros(2, n_bytes, dtype=torch.uint8, device=world.device)
    copy = shortest(lambda: target.copy_(source), world)  # it reads and writes each byte
    return (matmul_peak(world) / 1e12, flop / forward / 1e12, 2.5 * flop / (both - forward) / 1e12,
            2 * n_bytes / copy / 1e9)


if __name__ == "__main__":
    run_script(main)
