"""Faster forms of two operations: the matrix product on some CPUs, and the output head's loss
without all logits.

Shapes in comments: N tokens, C width, V vocabulary.
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

# torch multiplies float32 matrices with Intel's MKL and convolves with oneDNN. A matmul as a 1x1
# convolution gives the same sums to rounding. On some CPUs it takes half the time (Zen 5, where
# MKL leaves AVX-512 unused), on others as long or longer; nanolab/cpu.py times both.
ONEDNN_AVAILABLE = torch.backends.mkldnn.is_available()
USE_ONEDNN = False


def linear(x, weight, bias=None):
    """x @ weight.T + bias: (..., C), (D, C) and (D,) -> (..., D)."""
    if x.device.type != "cpu" or not USE_ONEDNN:
        return F.linear(x, weight, bias)
    y = F.conv2d(as_images(x), weight.view(*weight.shape, 1, 1), bias)
    return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], len(weight))


def linear_backward(grad, x, weight):
    """The gradients of x (N, C) and weight (D, C), given that of linear(x, weight), (N, D)."""
    if x.device.type != "cpu" or not USE_ONEDNN:
        return grad @ weight, grad.T @ x
    grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
        as_images(grad), as_images(x), weight.view(*weight.shape, 1, 1), bias_sizes=None,
        stride=[1, 1], padding=[0, 0], dilation=[1, 1], transposed=False, output_padding=[0, 0],
        groups=1, output_mask=[True, True, False])
    return grad_x.permute(0, 2, 3, 1).reshape(x.shape), grad_weight.view(weight.shape)


def as_images(x):
    """A view of (..., C) as images (n, C, height, width): 16 images, two pixels wide, if the rows
    divide; else one.

    torch sends a single thread's convolution to oneDNN from 16 images on. With images one pixel
    wide torch.compile assumes another memory layout.
    """
    n, width = (1, 1) if x.numel() // x.shape[-1] % 32 else (16, 2)
    return x.reshape(n, -1, width, x.shape[-1]).permute(0, 3, 1, 2)


class Linear(nn.Linear):
    def forward(self, x):
        return linear(x, self.weight, self.bias)


def softcap(logits, cap):
    """Squashes logits smoothly into (-cap, cap), as Gemma 2 does (Gemma Team, 2024). A cap of 0
    changes nothing."""
    return cap * torch.tanh(logits / cap) if cap else logits


def head_loss(hidden, weight, targets, cap):
    """Mean cross-entropy in nats of softcap(hidden @ weight.T, cap), (N, C) x (V, C), against N
    token ids. -> a scalar.

    The N x V logits never exist at once. A chunk of rows at a time, they are computed and turned
    into their gradient. So the gradients are ready when the forward pass ends. Under autocast the
    products run in its type and the sums in float32.
    """
    needs_grad = torch.is_grad_enabled()
    if torch.compiler.is_compiling():
        return head_loss_outside_graph(hidden, weight, targets, cap, needs_grad)
    return HeadLoss.apply(hidden, weight, targets, cap, needs_grad, False)


# For a compiled model: torch.compile would unroll the loop over the chunks, so it must not trace
# it. On a GPU, what the loop does with one chunk is compiled by itself. (_disable_dynamo is
# torch.compiler.disable, but does not import the compiler before it is needed.)
@torch._disable_dynamo
def head_loss_outside_graph(hidden, weight, targets, cap, needs_grad):
    return HeadLoss.apply(hidden, weight, targets, cap, needs_grad, True)


class HeadLoss(torch.autograd.Function):
    """head_loss with its gradients. The backward pass only scales them, in float32: the scale of a
    float16 loss is applied before anything is rounded to 16 bits again.

    Why not torch's own, F.linear_cross_entropy(..., options=LinearCrossEntropyOptions())? In torch
    2.13 on one CPU thread, 1024 x 384 x 50257 in float32, forward and backward took it 4.9 s of
    processor time, and this 0.7 s (medians of 3, Zen 5).
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, cap, needs_grad, compiled):
        device = hidden.device.type
        autocasts = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocasts else hidden.dtype
        grads = None
        if needs_grad:
            grads = [torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (hidden, weight)]
        if device == "cpu":
            loss = sum_chunks_cpu(hidden, weight, targets, cap, dtype, grads)
        else:
            loss = sum_chunks_gpu(hidden, weight, targets, cap, dtype, grads, compiled)
        if needs_grad:
            ctx.save_for_backward(*grads)
        ctx.n_rows = len(hidden)
        return loss / len(hidden)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss):
        scale = grad_loss / ctx.n_rows
        return *(grad.mul_(scale) for grad in ctx.saved_tensors), None, None, None, None


# How many logits exist at a time. Compiled, on a GPU: 640 MiB in 16 bits, so 12 x 1,024 rows of
# GPT-2's tokens are 2 chunks. Else several float32 copies exist in passing, of 128 MiB each.
GPU_CHUNK = 5 * 2**26
EAGER_CHUNK = 2**25
CPU_SLICE = 1024  # token ids at a time on a CPU: what a product reads stays in its cache


def sum_chunks_gpu(hidden, weight, targets, cap, dtype, grads, compiled):
    """The loss summed over the rows; adds that sum's gradients to grads (of hidden, of weight).

    Of the memory traffic, nearly all is that of the logits: one write by the product, then 2 reads
    and one write of their own arithmetic, and 2 reads by the products of the gradients.
    """
    N, V = len(hidden), len(weight)
    hidden, head = hidden.to(dtype), padded_head(weight, dtype)  # (N, C), (padded V, C)
    n_chunks = math.ceil(N * len(head) / (GPU_CHUNK if compiled else EAGER_CHUNK))
    n_chunks = next((n for n in range(n_chunks, 2 * n_chunks) if N % n == 0), n_chunks)
    rows = math.ceil(N / n_chunks)
    kernels = compiled_kernels() if compiled else (loss_of_logits, logits_to_gradient_)
    sum_loss, to_gradient = kernels
    loss = torch.zeros((), device=hidden.device)
    for start in range(0, N, rows):
        chunk, chunk_targets = hidden[start:start + rows], targets[start:start + rows, None]
        logits = chunk @ head.T  # (rows, padded V)
        chunk_loss, log_sum_exp = sum_loss(logits, chunk_targets, V, cap)
        loss += chunk_loss
        if grads:
            grad_hidden, grad_weight = grads
            to_gradient(logits, chunk_targets, log_sum_exp, V, cap)
            grad_hidden[start:start + rows] = logits @ head
            grad_weight += (logits.T @ chunk)[:V]
        del logits  # before the next chunk has its own
    return loss


def padded_head(weight, dtype):
    """(V, C) in dtype, with rows of zeros up to a multiple of 64, which GPUs multiply faster."""
    V, C = weight.shape
    head = torch.empty(V + -V % 64, C, dtype=dtype, device=weight.device)
    head[:V], head[V:] = weight, 0
    return head


def loss_of_logits(logits, targets, V, cap):
    """(rows, padded V) logits, (rows, 1) targets -> the summed loss, and each row's logsumexp."""
    is_token = torch.arange(logits.shape[1], device=logits.device) < V
    x = torch.where(is_token, softcap(logits.float(), cap), -math.inf)
    # not x.logsumexp: in this form torch.compile finds maximum and sum in one pass over a row
    top = x.amax(-1, keepdim=True)
    log_sum_exp = top + (x - top).exp_().sum(-1, keepdim=True).log()
    target_logits = softcap(logits.gather(1, targets).float(), cap)
    return (log_sum_exp - target_logits).sum(), log_sum_exp


def logits_to_gradient_(logits, targets, log_sum_exp, V, cap):
    """Turns logits into the gradient of their summed loss, in place; 0 for the padded columns."""
    token = torch.arange(logits.shape[1], device=logits.device)
    x = softcap(logits.float(), cap)
    grad = (x - log_sum_exp).exp()
    grad = torch.where(token == targets, grad - 1, grad)
    if cap:
        grad = grad * (1 - (x / cap).square())  # the derivative of softcap
    logits.copy_(torch.where(token < V, grad, 0))


@functools.cache
def compiled_kernels():
    """Two, for in one torch.compile would store the logits in float32 between its two passes."""
    return torch.compile(loss_of_logits), torch.compile(logits_to_gradient_)


def sum_chunks_cpu(hidden, weight, targets, cap, dtype, grads):
    """The same on a CPU, which takes the vocabulary in slices."""
    N, V = len(hidden), len(weight)
    slices = [slice(first, min(first + CPU_SLICE, V)) for first in range(0, V, CPU_SLICE)]
    heads = [pad(weight[ids].to(dtype)) for ids in slices]
    rows = min(max(EAGER_CHUNK // V // 32 * 32, 32), N)
    # reused for every chunk: fresh memory costs a CPU more than the softmax
    buffer = hidden.new_empty(rows, V, dtype=torch.float32)
    loss = torch.zeros(())
    minus_one = loss - 1
    for start in range(0, N, rows):
        chunk, target = hidden[start:start + rows].to(dtype), targets[start:start + rows, None]
        logits = buffer[:len(chunk)]  # (rows, V)
        for ids, head in zip(slices, heads):
            logits[:, ids] = linear(chunk, head)[:, :ids.stop - ids.start]
        logits = softcap(logits, cap)
        top, target_logit = logits.amax(dim=-1, keepdim=True), logits.gather(1, target)
        if cap and grads:
            slope = 1 - (logits / cap).square()  # the derivative of softcap
        probs = torch.softmax(logits, dim=-1, out=logits)
        # the log of the sum of exp(logits) is top - log(max(probs))
        loss += (top - target_logit - probs.amax(dim=-1, keepdim=True).log()).sum()
        if not grads:
            continue
        grad_hidden, grad_weight = grads
        grad = probs.scatter_add_(1, target, minus_one.expand_as(target))  # probs - one_hot(target)
        if cap:
            grad *= slope
        for ids, head in zip(slices, heads):
            grad_logits = pad(grad[:, ids].to(dtype), dim=1)
            grad_chunk, grad_head = linear_backward(grad_logits, chunk, head)
            grad_hidden[start:start + rows] += grad_chunk
            grad_weight[ids] += grad_head[:ids.stop - ids.start]
    return loss


def pad(x, dim=0):
    """In 16 bits, a 2-D x with zeros up to a multiple of 64 along dim; else x."""
    missing = -x.shape[dim] % 64
    if x.dtype.itemsize != 2 or not missing:
        return x
    return F.pad(x, (0, missing) if dim else (0, 0, 0, missing))
