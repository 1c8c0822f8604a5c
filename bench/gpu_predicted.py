"""What nanolab should cost on GPUs, from its operations and the cards' data sheets, as Markdown.

    python bench/gpu_predicted.py

Nothing is measured. docs/gpu.md holds the output, and tests/test_gpu_docs.py compares the counts
with the code. f"{expression=}" prints each arithmetic expression as it is computed.
"""

import functools
import sys
from dataclasses import replace
from math import ceil
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

from config import Config
from model import GPT, GPTConfig
from nanolab.common import run_script
from nanolab.kernels import GPU_CHUNK
from nanolab.memory import MARGIN, count_training_memory
from nanolab.schedule import count_steps

# NVIDIA's data sheets: dense tensor-core TFLOP/s in 16 bits with float32 sums and in TF32, memory
# in GB/s and GiB. Assumed: the share of them that a training step reaches.
CARDS = {"RTX 3090": (71, 35.6, 936, 24, 0.55), "RTX 4090": (165.2, 82.6, 1008, 24, 0.55),
         "A100 40 GB": (312, 156, 1555, 40, 0.50), "H100 SXM": (989.4, 494.7, 3350, 80, 0.45)}
BANDWIDTH_SHARE = 0.85  # of the data sheet's, for kernels that only move memory
LINKS = {"PCIe 4.0 x16": 25, "NVLink of an A100": 230}  # GB/s that a gather reaches (assumed)

SHAPE = GPTConfig(dropout=0.0)
RANKS = 8

# The names in the expressions
B, T, C, V, L = 12, SHAPE.block_size, SHAPE.n_embd, SHAPE.vocab_size, SHAPE.n_layer
N = B * T
P = V + -V % 64
K = ceil(N * P / GPU_CHUNK)


def formula(shown):
    """From f"{expression=}": -> the expression, its value."""
    expression, _, value = shown.rpartition("=")
    return expression, int(value)


HEAD = [  # what, the expression of its bytes, their number
    ("hidden states to 16 bits", *formula(f"{N*C * (4+2)=}")),
    ("the head to 16 bits, padded with zeros", *formula(f"{V*C * (4+2) + (P-V)*C * 2=}")),
    ("both gradients start as zeros in float32", *formula(f"{(N*C + V*C) * 4=}")),
    ("logits = hidden @ head.T", *formula(f"{N*P*2 + N*C*2 + K * P*C*2=}")),
    ("logsumexp and the target's logit (compiled): reads the logits", *formula(f"{N*P*2=}")),
    ("logits to their gradient, in place (compiled): reads and writes", *formula(f"{N*P*2 * 2=}")),
    ("gradient of hidden = logits @ head", *formula(f"{N*P*2 + K * P*C*2 + N*C*2=}")),
    ("its copy to float32", *formula(f"{N*C * (2+4)=}")),
    ("gradient of the head = logits.T @ hidden", *formula(f"{N*P*2 + N*C*2 + K * P*C*2=}")),
    ("added up in float32", *formula(f"{K * V*C * (2+4+4)=}")),
    ("backward pass: both gradients times the loss's", *formula(f"{(N*C + V*C) * (4+4)=}")),
]
NANOGPT_HEAD = formula(f"{6 * N*P*2 + 3 * (N*C + P*C) * 2 + (N*C + P*C) * 2 * (4+2)=}")
HEAD_MEMORY = formula(f"{ceil(N/K) * P*2 + 2 * P*C*2 + N*C*2=}")
MATRICES = formula(f"{12 * L*C*C + V*C=}")
FLOPS = formula(f"{6 * (12 * L*C*C + V*C) + 12 * L*C*T=}")


def main():
    print("\n\n".join(paragraphs()))


def paragraphs():
    """A line that explains the names, and the tables."""
    return [card_table(), names(), work_table(), time_table(), muon_table(), graph_table()]


def names():
    return (f"`N` = {B} x {T:,} tokens of a micro-batch, `C` = {C} numbers a token, `V` = {V:,} "
            f"logits, `P` = {P:,} with those added for faster products, `K` = {K} chunks, `L` = "
            f"{L} layers, `T` = {T:,} tokens of a sequence, `n_params` = {count_parameters():,}:")


def adamw():
    n_params = count_parameters()
    return formula(f"{28 * n_params=}")


def card_table():
    rows = [(card, f"{half:g}", f"{tf32:g}", f"{bandwidth:,}", str(gib), f"{share:.0%}")
            for card, (half, tf32, bandwidth, gib, share) in CARDS.items()]
    return table(("card", "16-bit TFLOP/s", "TF32 TFLOP/s", "memory, GB/s", "memory, GiB",
                  "assumed share of the TFLOP/s"), rows)


def work_table():
    """What does not depend on the card."""
    rows = [(what, f"`{expression}`", in_gb(n_bytes)) for what, expression, n_bytes in HEAD]
    rows += [
        ("**the head, all**", "the sum", f"**{in_gb(head_bytes())}**"),
        ("nanoGPT's head, counted likewise", f"`{NANOGPT_HEAD[0]}`", in_gb(NANOGPT_HEAD[1])),
        ("weights in matrix products", f"`{MATRICES[0]}`", f"{MATRICES[1] / 1e6:.1f} million"),
        ("operations a token", f"`{FLOPS[0]}`", f"{FLOPS[1] / 1e6:.1f} MFLOP"),
        ("operations of the micro-batch", "`N` times that",
         f"{N * FLOPS[1] / 1e12:.2f} TFLOP"),
        ("AdamW, once a step", f"`{adamw()[0]}`", in_gb(adamw()[1])),
        ("memory: 16 bytes a parameter, and what is stored for the backward pass",
         f"`count_training_memory` of {B} sequences", in_gib(stored_memory(B))),
        ("memory beside it while the head runs", f"`{HEAD_MEMORY[0]}`",
         in_gib(HEAD_MEMORY[1])),
        ("**peak memory**", "the sum", f"**{in_gib(stored_memory(B) + HEAD_MEMORY[1])}**"),
    ]
    return table(("what", "arithmetic", "predicted", "measured"), [(*row, "") for row in rows])


def time_table():
    """What depends on the card: one row a figure, one column a card."""
    flops = N * FLOPS[1]
    tokens = count_steps(Config()) * Config.global_batch_size * T
    each = (stored_memory(B) - stored_memory(8)) / (B - 8)  # of fewer, the MLP stores more
    columns = []
    for half, tf32, bandwidth, gib, share in CARDS.values():
        seconds, seconds_tf32 = (flops / (share * peak * 1e12) for peak in (half, tf32))
        moving = BANDWIDTH_SHARE * bandwidth * 1e9  # bytes per second
        rate = N / seconds
        columns.append([
            f"{seconds * 1e3:.0f} ms", in_hundreds(rate), in_hundreds(N / seconds_tf32),
            f"{head_bytes() / moving * 1e3:.1f} ms", f"{head_bytes() / moving / seconds:.0%}",
            f"{adamw()[1] / moving * 1e3:.1f} ms", f"{tokens / rate / 3600:.1f} h",
            str(int(((1 - MARGIN) * gib * 2**30 - stored_memory(8)) // each) + 8)])
    labels = [
        ("micro-batch, 16 bits", "operations / (share x 16-bit TFLOP/s)"),
        ("tokens/s, 16 bits", "`N` / that"),
        ("tokens/s, float32 (TF32)", "the same with the TF32 TFLOP/s"),
        ("the head's memory traffic", f"its bytes / ({BANDWIDTH_SHARE:.0%} of the memory's GB/s)"),
        ("as a share of the micro-batch", "the two above"),
        ("AdamW", f"its bytes / ({BANDWIDTH_SHARE:.0%} of the memory's GB/s)"),
        (f"{tokens:,} tokens on one card", "tokens / (tokens/s, 16 bits)"),
        ("largest batch, 16 bits", f"`count_training_memory` in {1 - MARGIN:.0%} of the memory")]
    rows = [(*label, *cells, "") for label, cells in zip(labels, zip(*columns), strict=True)]
    return table(("what", "arithmetic", *CARDS, "measured"), rows)


def muon_table():
    """One step of Muon on each rank, for one rank and for RANKS, on A100s."""
    half, _, bandwidth, _, share = CARDS["A100 40 GB"]
    columns = []
    for n_ranks in (1, RANKS):
        flops, n_bytes, elementwise, received = muon_work(n_ranks)
        seconds = flops / (share * half * 1e12) + elementwise / (BANDWIDTH_SHARE * bandwidth * 1e9)
        columns.append([f"{flops / 1e12:.2f} TFLOP", in_gb(n_bytes), in_gb(elementwise),
                        f"{seconds * 1e3:.1f} ms", in_gb(received),
                        *(f"{received / (speed * 1e9) * 1e3:.1f} ms" for speed in LINKS.values())])
    labels = [
        ("operations", "`5 * (4 * m*m*n + 2 * m*m*m)` for each matrix of m x n, m at most n"),
        ("memory traffic", "all inputs and outputs of every operation"),
        ("of it, outside matrix products", "all but `bmm` and `baddbmm`"),
        ("time on an A100", "operations / (share x TFLOP/s) + traffic outside products / "
         f"({BANDWIDTH_SHARE:.0%} of the memory's GB/s)"),
        ("gathered updates, 16 bits", "the padded stacks"),
        *((f"gathered over {link}", f"bytes / ({speed} GB/s, assumed)")
          for link, speed in LINKS.items())]
    rows = [(*label, *cells, "") for label, cells in zip(labels, zip(*columns), strict=True)]
    return table(("Muon, each rank", "arithmetic", "1 rank", f"{RANKS} ranks", "measured"), rows)


def muon_work(n_ranks):
    """What one rank does in a step of Muon on a GPU: operations, bytes of all, bytes outside matrix
    products, bytes gathered."""
    flops = elementwise = products = gathered = 0
    stacks = [(3 * L, C, C), (L, C, C), (L, C, 4 * C), (L, 4 * C, C)]  # Q K V; proj; fc; proj
    for n, rows, columns in stacks:
        mine = ceil(n / n_ranks)
        m, size = min(rows, columns), rows * columns
        tall = rows > columns
        flops += mine * 5 * (4 * m * m * max(rows, columns) + 2 * m**3)
        # gram = x x', then b gram + c gram gram, then a x + that x: 2 bytes a number
        products += mine * 5 * 2 * (2 * size + m * m + 4 * m * m + 3 * size + m * m)
        # two lerps (3 tensors each), weight decay (2), the stack (2), the update in 16 bits
        elementwise += n * size * (3 * 4 + 3 * 4 + 2 * 4 + 2 * 4 + 4 + 2 + 4)
        elementwise += mine * size * (4 + 8 + 6)  # the norm; x / norm; to 16 bits
        if n_ranks > 1:
            padded = mine * n_ranks
            elementwise += (n + padded) * size * 4 + tall * mine * size * 4
            gathered += padded * size * 2
    return flops, elementwise + products, elementwise, gathered


# What train.py has torch.compile do in a run, and how many graphs that makes: of the model up to
# the head, and of the head's two kernels.
GRAPHS = [("the first training step", 1, 2), ("the first validation", 1, 0),
          ("a last batch of a validation that is smaller", 1, 1),
          ("any later step or validation", 0, 0)]


def graph_table():
    rows = [(when, str(trunk), str(head), "") for when, trunk, head in GRAPHS]
    return table(("when", "graphs of the model", "graphs of the head", "measured"), rows)


def head_bytes():
    return sum(n_bytes for _, _, n_bytes in HEAD)


@functools.cache
def count_parameters():
    return empty_model(SHAPE).num_params()


@functools.cache
def stored_memory(n_sequences):
    """Bytes that a step holds when its forward pass ends.

    Counted with few logits, which is faster. Each further one is a row of the embedding and a row
    of the head, with 16 bytes a parameter, and a row of the head's gradient in float32.
    """
    few = 64
    counted = count_training_memory(empty_model(replace(SHAPE, vocab_size=few)), n_sequences,
                                    torch.bfloat16)
    return counted + (V - few) * C * (2 * 16 + 4)


def empty_model(shape):
    """Without values in its weights: only their sizes count."""
    with torch.device("meta"):
        model = GPT(shape)
    return model.to_empty(device="cpu")


def in_hundreds(value):
    return f"{round(value, -2):,.0f}"


def in_gb(n_bytes):
    return f"{n_bytes / 1e9:.2f} GB"


def in_gib(n_bytes):
    return f"{n_bytes / 2**30:.2f} GiB"


def table(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    run_script(main)
