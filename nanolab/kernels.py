"""Faster forms of two operations: the matrix product on some CPUs, and the output head's loss
without all logits.

Shapes in comments: N tokens, C width, V vocabulary.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

# torch multiplies matrices with Intel's MKL, which does not use AVX-512 on AMD CPUs. Convolutions
# go to oneDNN, which does. So on such a CPU we run matmuls as 1x1 convolutions: the same sums to
# rounding, in half the time on Zen 5 (torch 2.13).
CPUINFO = Path("/proc/cpuinfo")
USE_ONEDNN = (torch.backends.cpu.get_cpu_capability() == "AVX512"
              and torch.backends.mkldnn.is_available()
              and CPUINFO.exists() and "AuthenticAMD" in CPUINFO.read_text())


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


class HeadLoss(torch.autograd.Function):
    """Mean cross-entropy in nats of softcap(hidden @ weight.T, cap), (N, C) x (V, C), against N
    token ids.

    The N x V logits never exist at once. A chunk of rows at a time, they are computed and turned
    into their gradient in place. So the gradients are ready when the forward pass ends. The
    backward pass only scales them, in float32: the scale of a float16 loss is applied before
    anything is rounded to 16 bits again.

    Under autocast the products run in its type and the sums in float32. In 16 bits the vocabulary
    is padded to a multiple of 64, which GPUs multiply faster; the padded logits never reach the
    softmax. A CPU takes the vocabulary in slices, whose data stays in its cache.

    Why not torch's own, F.linear_cross_entropy(..., options=LinearCrossEntropyOptions())? In torch
    2.13 on one CPU thread, 1024 x 384 x 50257 in float32, forward and backward took it 4.9 s of
    processor time, and this 0.7 s (medians of 3, Zen 5).
    """

    CHUNK = 2**25  # logits at a time, 128 MiB in float32: large for a product, small for a model
    SLICE = 1024  # token ids at a time on a CPU

    @staticmethod
    def forward(ctx, hidden, weight, targets, cap, needs_grad):
        device = hidden.device.type
        autocasts = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocasts else hidden.dtype
        N, V = len(hidden), len(weight)
        width = HeadLoss.SLICE if device == "cpu" else V
        slices = [slice(first, min(first + width, V)) for first in range(0, V, width)]
        heads = [pad(weight[ids].to(dtype)) for ids in slices]
        rows = min(max(HeadLoss.CHUNK // V // 32 * 32, 32), N)
        # reused for every chunk: fresh memory costs a CPU more than the softmax
        buffer = hidden.new_empty(rows, V, dtype=torch.float32)
        loss = torch.zeros((), device=hidden.device)
        minus_one = loss - 1
        if needs_grad:
            grad_hidden, grad_weight = torch.zeros_like(hidden), torch.zeros_like(weight)

        for start in range(0, N, rows):
            chunk, target = hidden[start:start + rows].to(dtype), targets[start:start + rows, None]
            logits = buffer[:len(chunk)]  # (rows, V)
            for ids, head in zip(slices, heads):
                logits[:, ids] = linear(chunk, head)[:, :ids.stop - ids.start]
            logits = softcap(logits, cap)
            top, target_logit = logits.amax(dim=-1, keepdim=True), logits.gather(1, target)
            if cap and needs_grad:
                slope = 1 - (logits / cap).square()  # the derivative of softcap
            probs = torch.softmax(logits, dim=-1, out=logits)
            # the log of the sum of exp(logits) is top - log(max(probs))
            loss += (top - target_logit - probs.amax(dim=-1, keepdim=True).log()).sum()
            if needs_grad:
                # probs - one_hot(target)
                grad = probs.scatter_add_(1, target, minus_one.expand_as(target))
                if cap:
                    grad *= slope
                for ids, head in zip(slices, heads):
                    grad_logits = pad(grad[:, ids].to(dtype), dim=1)
                    grad_chunk, grad_head = linear_backward(grad_logits, chunk, head)
                    grad_hidden[start:start + rows] += grad_chunk
                    grad_weight[ids] += grad_head[:ids.stop - ids.start]
        if needs_grad:
            ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.n_rows = N
        return loss / N

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss):
        scale = grad_loss / ctx.n_rows
        return *(grad.mul_(scale) for grad in ctx.saved_tensors), None, None, None


def pad(x, dim=0):
    """In 16 bits, a 2-D x with zeros up to a multiple of 64 along dim; else x."""
    missing = -x.shape[dim] % 64
    if x.dtype.itemsize != 2 or not missing:
        return x
    return F.pad(x, (0, missing) if dim else (0, 0, 0, missing))
