"""Float16 products on a CPU, with sums in 32 bits or in 16, emulated in every product of a run.

    python -m studies.fp16_sums.emulate 32 config/modern.py config/ladder.py ...   # train.py's words
    python -m studies.fp16_sums.emulate 16 config/modern.py config/ladder.py ...
    python -m studies.fp16_sums.emulate error       # relative errors of the products of one batch
    python -m studies.fp16_sums.emulate gradients   # of a model of 163 million parameters, one batch

Inputs and outputs of a product are rounded to float16. With 16, so is its sum after every 16 terms,
as tensor cores that add in float16 do; their order of terms differs. Attention and the head's
gradient of the hidden states keep 32-bit sums, as fp16_sums does on a GPU (nanolab/head.py). The
gradients are scaled by 65,536 before they are rounded, as GradScaler does at its start; a product
beyond 65,504 becomes infinite, and train.py skips that update.
"""

import sys

import torch
import torch.nn.functional as F
from torch import nn

import nanolab.head
import train
from config import Config
from model import GPT, GPTConfig
from nanolab.common import run_script
from nanolab.options import load
from nanolab.start import options_of_run

TERMS = 16  # of a sum before it is rounded
SCALE = 2.0**16  # of the gradients
sums_in_16_bits = False


def to_half(x):
    return x.half().float()


def product(a, b, keep_32=False):
    """(M, K) @ (K, N) as float16 tensor cores compute it, in float32 tensors."""
    a, b = to_half(a), to_half(b)
    K = a.shape[1]
    if keep_32 or not sums_in_16_bits or K <= TERMS:
        return to_half(a @ b)
    n = -(-K // TERMS)
    a, b = F.pad(a, (0, n * TERMS - K)), F.pad(b, (0, 0, 0, n * TERMS - K))
    total = to_half(a[:, :TERMS] @ b[:TERMS])
    for i in range(TERMS, n * TERMS, TERMS):
        total = to_half(torch.addmm(total, a[:, i:i + TERMS], b[i:i + TERMS]))
    return total


class EmulatedLinear(torch.autograd.Function):
    """F.linear, whose three products are emulated."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        y = product(x.flatten(0, -2), weight.T)
        return (y if bias is None else to_half(y + bias)).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        rows, grad = x.flatten(0, -2), grad.flatten(0, -2) * SCALE
        grad_x = product(grad, weight).view_as(x) / SCALE
        grad_weight = product(grad.T, rows) / SCALE
        return grad_x, grad_weight, grad.sum(0) / SCALE if ctx.has_bias else None


class EmulatedHead(torch.autograd.Function):
    """nanolab.head.HeadLoss, whose products are emulated."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, cap, dtype, needs_grad):
        logits = product(hidden, weight.T)
        loss, grad = nanolab.head.loss_and_gradient(logits, targets[:, None], len(weight), cap)
        grad = grad * SCALE / len(hidden)
        if needs_grad:
            ctx.save_for_backward(product(grad, weight, keep_32=True) / SCALE,
                                  product(grad.T, hidden) / SCALE)
        return loss / len(hidden)

    @staticmethod
    def backward(ctx, grad_loss):
        return *(grad * grad_loss for grad in ctx.saved_tensors), None, None, None, None


def emulate(bits):
    """From here on in this process."""
    global sums_in_16_bits
    sums_in_16_bits = bits == 16
    nn.Linear.forward = lambda self, x: EmulatedLinear.apply(x, self.weight, self.bias)
    nanolab.head.cpu_head_loss = EmulatedHead.apply


def relative_error(x, exact):
    return float((x - exact).norm() / exact.norm())


def print_errors():
    """Of one product of random numbers with sums of this length, and of the head's own."""
    global sums_in_16_bits
    draw = torch.Generator().manual_seed(0)
    print("| sum of | bfloat16 | float16, 32-bit sums | 16-bit sums |\n| ---: | ---: | ---: | ---: |")
    for K in (64, 768, 3072, 12_288):
        a, b = torch.randn(64, K, generator=draw), torch.randn(K, 64, generator=draw)
        exact, errors = a.double() @ b.double(), []
        errors.append(relative_error((a.bfloat16().float() @ b.bfloat16().float()).bfloat16(),
                                     exact))
        for sums_in_16_bits in (False, True):
            errors.append(relative_error(product(a, b), exact))
        print(f"| {K:,} | {' | '.join(f'{error:.1e}' for error in errors)} |", flush=True)


def print_gradient_errors():
    """Of the published shape at its initial weights, 128 tokens: the relative error of the whole
    gradient, and of the worst parameter."""
    tokens = torch.randint(50257, (1, 129), generator=torch.Generator().manual_seed(0))
    model = GPT(GPTConfig(dropout=0.0, init="gpt2"))
    gradients = {}
    plain, head = nn.Linear.forward, nanolab.head.cpu_head_loss
    for name, bits in (("float32", 0), ("float16, 32-bit sums", 32), ("16-bit sums", 16)):
        if bits:
            emulate(bits)
        model.zero_grad()
        model(tokens[:, :-1], tokens[:, 1:]).backward()
        gradients[name] = {key: p.grad.clone() for key, p in model.named_parameters()}
        if bits:
            mine, exact = gradients[name], gradients["float32"]
            whole = relative_error(*(torch.cat([g[key].flatten() for key in exact])
                                     for g in (mine, exact)))
            worst = max(exact, key=lambda key: relative_error(mine[key], exact[key]))
            print(f"{name}: gradient off by {whole:.1e}; worst {worst}, "
                  f"{relative_error(mine[worst], exact[worst]):.1e}", flush=True)
    nn.Linear.forward, nanolab.head.cpu_head_loss = plain, head


def main():
    what, *words = sys.argv[1:]
    if what == "error":
        print_errors()
    elif what == "gradients":
        print_gradient_errors()
    else:
        emulate(int(what))
        train.train(load(Config, words, options_of_run))


if __name__ == "__main__":
    run_script(main)
