"""16-bit products on a CPU: what fp16_sums does to sums, gradients and losses, without a GPU.

    python -m studies.fp16_sums.emulate products          # relative errors of single products
    python -m studies.fp16_sums.emulate gradients         # of a model of 163 million parameters
    python -m studies.fp16_sums.emulate show FILE.json    # what the two printed, as a table
    python -m studies.fp16_sums.emulate PRECISION config/modern.py ...     # a run, as by train.py

PRECISION is bfloat16, float16 (both with sums in 32 bits) or fp16_sums. In every product of a
linear layer and of the head, forward and backward, the inputs and the result are rounded to 16
bits. With fp16_sums so is each sum after every 16 terms, as by a tensor core that adds in float16;
the order of its terms differs. As in nanolab/head.py, the hidden states' gradient is then made in
bfloat16. Attention stays in float32 here, and on a GPU keeps 32-bit sums. Gradients are multiplied
by 65,536, where GradScaler starts, before they are rounded. What is beyond 65,504 becomes infinite,
and train.py skips that update.
"""

import json
import re
import runpy
import sys
from pathlib import Path

import torch
from torch import nn

import nanolab.head
from model import GPT, GPTConfig
from nanolab.common import run_script
from nanolab.study.tables import format_table

PRECISIONS = ("bfloat16", "float16", "fp16_sums")
TERMS = 16  # of a sum before it is rounded
SCALE = 2.0**16  # of the gradients

precision = "float32"


def rounded(x):
    return x.to(torch.bfloat16 if precision == "bfloat16" else torch.float16).float()


def product(a, b):
    """(M, K) @ (K, N) as tensor cores compute it, in float32 tensors."""
    a, b = rounded(a), rounded(b)
    if precision != "fp16_sums":
        return rounded(a @ b)
    total = torch.zeros(len(a), b.shape[1])
    for i in range(0, a.shape[1], TERMS):
        total.addmm_(a[:, i:i + TERMS], b[i:i + TERMS])
        total.copy_(total.half())
    return total


def product_of_gradients(grad, head):
    """As nanolab.head's."""
    if precision != "fp16_sums":
        return product(grad, head)
    return rounded(grad).bfloat16().float() @ rounded(head).bfloat16().float()


class EmulatedLinear(torch.autograd.Function):
    """F.linear with emulated products."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        y = product(x.flatten(0, -2), weight.T)
        return (y if bias is None else rounded(y + bias)).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        rows, grad = x.flatten(0, -2), grad.flatten(0, -2) * SCALE
        grad_x = product(grad, weight).view_as(x) / SCALE
        grad_weight = product(grad.T, rows) / SCALE
        return grad_x, grad_weight, grad.sum(0) / SCALE if ctx.has_bias else None


class EmulatedHead(torch.autograd.Function):
    """nanolab.head.HeadLoss with emulated products. It scales its gradients in float32."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, cap, dtype, needs_grad, z_loss):
        loss, grad = nanolab.head.loss_and_gradient(
            product(hidden, weight.T), targets[:, None], len(weight), cap, z_loss)
        if needs_grad:
            ctx.save_for_backward(product_of_gradients(grad, weight), product(grad.T, hidden))
        ctx.n_rows = len(hidden)
        return loss / len(hidden)

    @staticmethod
    def backward(ctx, grad_loss):
        scale = grad_loss / ctx.n_rows
        return *(grad * scale for grad in ctx.saved_tensors), *[None] * 5


def emulate(name):
    """All products of this process, from here on."""
    global precision
    precision = name
    nn.Linear.forward = lambda self, x: EmulatedLinear.apply(x, self.weight, self.bias)
    nanolab.head.cpu_head_loss = EmulatedHead.apply


def relative_error(x, exact):
    return float((x - exact).norm() / exact.norm())


def row_of_product(name, a, b):
    """{"product": its name, precision: relative error of a @ b}"""
    exact, row = a.double() @ b.double(), {"product": name}
    for precision in PRECISIONS:
        emulate(precision)
        row[precision] = relative_error(product(a, b), exact)
    return row


def products():
    """Of random numbers, with sums of these lengths. Then of the two products of the head that make
    gradients: random hidden states and weights, logits of this SD, targets drawn from their
    softmax. What is summed up, the weights or the hidden states, has nothing in common, or a part
    that all share, as large as the rest."""
    draw, rows = torch.Generator().manual_seed(0), []
    for K in (64, 768, 3072, 12_288, 32_768):
        a, b = torch.randn(64, K, generator=draw), torch.randn(K, 64, generator=draw)
        rows.append(row_of_product(f"random numbers, {K:,} terms", a, b))
    for common in (0, 1):
        for sd in (0.5, 2):  # 0.5: about that of initial weights
            of_hidden, of_head = head_gradients(sd, common, draw)
            case = f"logits of SD {sd}, {'a part' if common else 'nothing'} in common"
            rows += [row_of_product(f"hidden states' gradient, {case}", *of_hidden),
                     row_of_product(f"head's gradient, {case}", *of_head)]
    return rows


def head_gradients(sd, common, draw):
    """-> the factors of 64 hidden states' gradient, summed over 50,257 token ids, and of the
    gradient of the head at 64 of 4,096 ids, summed over 12,288 hidden states"""
    def random_vectors(n, common=0):
        return torch.randn(n, 768, generator=draw) + common * torch.randn(768, generator=draw)

    def gradient_of_logits(hidden, weight):
        logits = hidden @ weight.T
        targets = torch.multinomial(logits.softmax(-1), 1, generator=draw)
        return nanolab.head.loss_and_gradient(logits, targets, len(weight), 0)[1]
    scale = sd / 768**0.5
    weight = random_vectors(50257, common) * scale
    of_hidden = gradient_of_logits(random_vectors(64), weight), weight
    hidden, weight = random_vectors(12_288, common), random_vectors(4096) * scale
    grad = torch.cat([gradient_of_logits(rows, weight)[:, ::64] for rows in hidden.split(1024)])
    return of_hidden, (grad.T, hidden)


def gradients():
    """Of the published shape at its initial weights, for 1,024 random tokens: the relative error of
    each kind of weight's gradient."""
    tokens = torch.randint(50257, (1, 1025), generator=torch.Generator().manual_seed(0))
    model = GPT(GPTConfig(dropout=0.0))

    def gradients_by_kind():
        model.zero_grad()
        model(tokens[:, :-1], tokens[:, 1:]).backward()
        found = {}
        for name, p in model.named_parameters():
            kind = re.sub(r"^\D+\.\d+\.", "", name) if p.ndim == 2 else "norms and biases"
            found.setdefault(kind, []).append(p.grad.flatten().clone())
        found = {kind: torch.cat(grads) for kind, grads in found.items()}
        return {**found, "all": torch.cat(list(found.values()))}
    exact = gradients_by_kind()
    rows = [{"gradient": kind} for kind in exact]
    for name in PRECISIONS:
        emulate(name)
        found = gradients_by_kind()
        for row, kind in zip(rows, exact):
            row[name] = relative_error(found[kind], exact[kind])
    return rows


def show(path):
    rows = json.loads(Path(path).read_text())
    cells = [[name, *(f"{100 * error:.2g} %" for error in errors)]
             for name, *errors in (row.values() for row in rows)]
    return format_table([list(rows[0]), *cells], markdown=True)


def main():
    what, *words = sys.argv[1:]
    if what in ("products", "gradients"):
        print(json.dumps({"products": products, "gradients": gradients}[what](), indent=1))
    elif what == "show":
        print(show(*words))
    else:
        emulate(what)
        sys.argv = ["train.py", *words]
        runpy.run_path("train.py", run_name="__main__")


if __name__ == "__main__":
    run_script(main)
