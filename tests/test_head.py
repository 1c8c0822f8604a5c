"""The head's loss as a GPU computes it, on a CPU: the plain gradients, few bytes moved and held."""

import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import nanolab.kernels
from conftest import HERE
from nanolab.kernels import (head_loss_outside_graph, logits_to_gradient_, loss_of_logits,
                             softcap)
from probes import Traffic, force_gpu_head

ROWS, V, PADDED, C = 12 * 1024, 50257, 50304, 768  # one micro-batch of GPT-2 small


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("cap", [0.0, 2.0])
@pytest.mark.parametrize("rows, chunks, compiled", [
    (48, [48], False), (48, [12] * 4, False), (47, [12, 12, 12, 11], False),
    (47, [12, 12, 12, 11], True)])
def test_gradients_are_the_plain_ones(monkeypatch, rows, chunks, compiled, cap):
    """To 1e-6 in float32: in one chunk, in equal ones and with a shorter last one, with inductor's
    kernels and without, gradients wanted or not."""
    sizes = []
    sum_loss, to_gradient = loss_of_logits, logits_to_gradient_
    if compiled:
        sum_loss, to_gradient = torch.compile(sum_loss), torch.compile(to_gradient)

    def watched(logits, *args):
        sizes.append(len(logits))
        return sum_loss(logits, *args)
    force_gpu_head(monkeypatch, kernels=(watched, to_gradient))
    monkeypatch.setattr(nanolab.kernels, "GPU_CHUNK", 320 * chunks[0])
    draw = torch.Generator().manual_seed(1)
    hidden, weight = (torch.randn(n, 32, generator=draw, requires_grad=True) for n in (rows, 301))
    targets = torch.randint(301, (rows,), generator=draw)
    plain = F.cross_entropy(softcap(hidden @ weight.T, cap), targets)
    expected = torch.autograd.grad(plain, (hidden, weight))
    for needs_grad in (True, False):
        loss = head_loss_outside_graph(hidden, weight, targets, cap, needs_grad)
        assert loss.item() == pytest.approx(plain.item(), rel=1e-6)
        if needs_grad:
            ours = torch.autograd.grad(loss * 3, (hidden, weight))
            for one, other in zip(ours, expected, strict=True):
                assert (one / 3 - other).abs().max() <= 1e-6
    assert sizes == 2 * chunks


@pytest.mark.parametrize("amp, n_bytes", [(True, 2), (False, 4)])
@pytest.mark.parametrize("needs_grad", [True, False])
def test_memory(monkeypatch, amp, n_bytes, needs_grad):
    """Beside hidden states and head, their gradients and their copies in the products' type: one
    chunk of logits, half of them, and a product for the head's gradient. In 16 bits nothing as
    large as a chunk is in float32."""
    chunk = ROWS // 2 * PADDED
    traffic, sizes = measure_micro_batch(monkeypatch, amp, needs_grad)
    assert sizes == [ROWS // 2, ROWS // 2]
    copies = n_bytes * C * (ROWS + 2 * PADDED)
    gradients = 4 * C * (ROWS + V) if needs_grad else 0
    assert traffic.most_alive < chunk * n_bytes + copies + gradients + 2**20
    assert traffic.largest_float32 <= (V * C if amp else chunk)


@pytest.mark.skipif(sys.platform != "linux",
                    reason="pretends a GPU, which fake_cuda.py can on Linux")
def test_bytes_moved(monkeypatch):
    """At most 10 GB for one micro-batch in bfloat16, forward and backward, softcap or not: every
    input and output of the operators that run one by one, and of the kernels that inductor would
    make for an A100. Six times the logits (1.24 GB) are needed: the product writes them, the loss
    reads them, the gradient reads and writes them, and two products read that."""
    traffic, sizes = measure_micro_batch(monkeypatch, amp=True, needs_grad=True)
    assert sizes == [ROWS // 2, ROWS // 2]
    result = subprocess.run([sys.executable, HERE / "tests/fake_cuda.py", "bytes", str(ROWS // 2),
                             str(V), str(PADDED)], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    for cap, kernel_bytes in json.loads(result.stdout).items():
        total = traffic.bytes + 2 * kernel_bytes
        assert 6 * ROWS * PADDED * 2 < total <= 10e9, f"{total / 1e9:.2f} GB with softcap {cap}"


def measure_micro_batch(monkeypatch, amp, needs_grad):
    """-> Traffic of the head's forward and backward pass for one micro-batch but for the compiled
    kernels, and the sizes of its chunks, rows."""
    sizes = []

    def loss_of_nothing(logits, *args):
        sizes.append(len(logits))
        return torch.zeros(()), torch.empty(len(logits), 1)
    force_gpu_head(monkeypatch, kernels=(loss_of_nothing, lambda *args: None))
    with FakeTensorMode():
        hidden = torch.empty(ROWS, C, requires_grad=True)
        weight = torch.empty(V, C, requires_grad=True)
        targets = torch.zeros(ROWS, dtype=torch.int64)
        with Traffic() as traffic:
            with torch.autocast("cpu", torch.bfloat16, enabled=amp):
                loss = head_loss_outside_graph(hidden, weight, targets, 0.0, needs_grad)
            if needs_grad:
                loss.backward()
    return traffic, sizes
