"""The output head's loss without keeping all logits.

Shapes in comments: N tokens, C width, V vocabulary.
"""

import math

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


def softcap(logits, cap):
    """Squashes logits smoothly into (-cap, cap), as Gemma 2 does (Gemma Team, 2024). A cap of 0
    changes nothing."""
    return cap * torch.tanh(logits / cap) if cap else logits


def head_loss(hidden, weight, targets, cap, z_loss=0.0):
    """Mean cross-entropy in nats of softcap(hidden @ weight.T, cap), (N, C) x (V, C), against N
    token ids, plus z_loss times the mean of log(Z)^2, where Z is the sum of exp(logits) of a token
    (Chowdhery et al., "PaLM", 2022). -> a scalar.

    The forward pass makes the gradients too, so no logits are kept for the backward pass. In eager
    code and on a CPU, they never exist at once either: a chunk of rows at a time is computed and
    turned into its gradient. Under autocast the products run in its type and the sums in float32.

    Why not torch's F.linear_cross_entropy? torch.compile runs it as eager code (torch 2.13).
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    loss = cpu_head_loss if device == "cpu" else HeadLoss.apply
    with torch.autocast(device, enabled=False):  # it would undo product_of_gradients' bfloat16
        return loss(hidden, weight, targets, cap, dtype, torch.is_grad_enabled(), z_loss)


EAGER_CHUNK = 2**25  # logits at a time: several float32 copies of 128 MiB


class HeadLoss(torch.autograd.Function):
    """On a GPU. torch.compile makes one kernel of loss_and_gradient, so it takes all rows at once;
    nothing here stops its graph."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, cap, dtype, needs_grad, z_loss=0.0):
        N, V = len(hidden), len(weight)
        # zero rows up to a multiple of 64, which GPUs multiply faster
        hidden, head = hidden.to(dtype), F.pad(weight.to(dtype), (0, 0, 0, -V % 64))
        n_chunks = math.ceil(N * len(head) / EAGER_CHUNK)
        if torch.compiler.is_compiling():  # float16 could not hold the weight's gradient of more
            n_chunks = math.ceil(N / 2**16) if dtype is torch.float16 else 1
        loss, grads, grad_weight = 0, [], 0
        for chunk, target in zip(hidden.chunk(n_chunks), targets[:, None].chunk(n_chunks)):
            chunk_loss, grad = loss_and_gradient(chunk @ head.T, target, V, cap, z_loss)
            loss = loss + chunk_loss
            if needs_grad:
                grads.append(product_of_gradients(grad, head))
                product = (grad.T @ chunk)[:V]
                grad_weight = grad_weight + (product if n_chunks == 1 else product.float())
        if needs_grad:
            ctx.save_for_backward(torch.cat(grads), grad_weight)
        ctx.n_rows = N
        return loss / N

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss):
        # in float32: the scale of a float16 loss is applied before anything is rounded again
        scale = grad_loss / ctx.n_rows
        return *(grad.float() * scale for grad in ctx.saved_tensors), *[None] * 5


def product_of_gradients(grad, head):
    """grad @ head. Its terms cancel, for each row of grad sums to 0. Where the rows of head have a
    part in common, sums in 16 bits were off by 13 and 31 % (studies/fp16_sums, emulated). So it is
    then made in bfloat16, which has 32-bit sums."""
    if grad.dtype is torch.float16 and sums_have_16_bits():
        return (grad.bfloat16() @ head.bfloat16()).to(grad.dtype)
    return grad @ head


def sums_have_16_bits():
    return torch.backends.cuda.matmul.allow_fp16_accumulation


# torch.compile cannot trace it. (torch.compiler.assume_constant_result is this, and imports the
# compiler.)
sums_have_16_bits._dynamo_marked_constant = True


def loss_and_gradient(logits, targets, V, cap, z_loss=0.0):
    """(rows, padded V) logits, (rows, 1) targets -> the summed loss, and its gradient in the type
    of the logits; 0 for the padded columns."""
    token = torch.arange(logits.shape[1], device=logits.device)
    x = torch.where(token < V, softcap(logits.float(), cap), -math.inf)
    # not x.logsumexp: in this form torch.compile finds maximum and sum in one pass over a row
    top = x.amax(-1, keepdim=True)
    log_sum_exp = top + (x - top).exp().sum(-1, keepdim=True).log()
    # not a gather: it would be part of the next kernel, and the logits would be kept until then
    target_logits = torch.where(token == targets, x, 0).sum(-1, keepdim=True)
    loss, probs = log_sum_exp - target_logits, (x - log_sum_exp).exp()
    if z_loss:
        loss = loss + z_loss * log_sum_exp.square()
        probs = probs * (1 + 2 * z_loss * log_sum_exp)
    grad = probs - (token == targets).float()
    if cap:
        grad = grad * torch.where(token < V, 1 - (x / cap).square(), 0)  # softcap's derivative
    return loss.sum(), grad.to(logits.dtype)


# torch.compile would unroll the loops. (torch.compiler.disable is this, and imports the compiler.)
@torch._disable_dynamo
def cpu_head_loss(*args):
    return CPUHeadLoss.apply(*args)


CPU_SLICE = 1024  # token ids at a time on a CPU: what a product reads stays in its cache


class CPUHeadLoss(torch.autograd.Function):
    """On a CPU, which takes the rows in chunks and the vocabulary in slices."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, cap, dtype, needs_grad, z_loss=0.0):
        N, V = len(hidden), len(weight)
        slices = [slice(first, min(first + CPU_SLICE, V)) for first in range(0, V, CPU_SLICE)]
        heads = [pad(weight[ids].to(dtype)) for ids in slices]
        rows = min(max(EAGER_CHUNK // V // 32 * 32, 32), N)
        # reused for every chunk: fresh memory costs a CPU more than the softmax
        buffer = hidden.new_empty(rows, V, dtype=torch.float32)
        loss = torch.zeros(())
        grad_hidden, grad_weight = (torch.zeros_like(x) if needs_grad else None
                                    for x in (hidden, weight))
        for start in range(0, N, rows):
            chunk, target = hidden[start:start + rows].to(dtype), targets[start:start + rows, None]
            logits = buffer[:len(chunk)]  # (rows, V)
            for ids, head in zip(slices, heads):
                logits[:, ids] = (chunk @ head.T)[:, :ids.stop - ids.start]
            logits = softcap(logits, cap)
            top, target_logit = logits.amax(dim=-1, keepdim=True), logits.gather(1, target)
            if cap and needs_grad:
                slope = 1 - (logits / cap).square()  # the derivative of softcap
            probs = torch.softmax(logits, dim=-1, out=logits)
            # the log of the sum of exp(logits) is top - log(max(probs))
            log_max = probs.amax(dim=-1, keepdim=True).log()
            loss += (top - target_logit - log_max).sum()
            if z_loss:
                log_sum_exp = top - log_max
                loss += z_loss * log_sum_exp.square().sum()
                probs *= 1 + 2 * z_loss * log_sum_exp
            if not needs_grad:
                continue
            # probs - one_hot(target)
            grad = probs.scatter_add_(1, target, -torch.ones_like(target, dtype=torch.float32))
            if cap:
                grad *= slope
            for ids, head in zip(slices, heads):
                grad_logits = pad(grad[:, ids].to(dtype), dim=1)
                grad_hidden[start:start + rows] += grad_logits @ head
                grad_weight[ids] += (grad_logits.T @ chunk)[:ids.stop - ids.start]
        if needs_grad:
            ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.n_rows = N
        return loss / N

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss):
        scale = grad_loss / ctx.n_rows
        return *(grad.mul_(scale) for grad in ctx.saved_tensors), *[None] * 5


def pad(x, dim=0):
    """In 16 bits, a 2-D x with zeros up to a multiple of 64 along dim; else x."""
    missing = -x.shape[dim] % 64
    if x.dtype.itemsize != 2 or not missing:
        return x
    return F.pad(x, (0, missing) if dim else (0, 0, 0, missing))
