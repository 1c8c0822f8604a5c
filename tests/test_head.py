"""The head's loss: that of the formula, with its gradients; and, as a GPU computes it, one compiled
graph that moves and holds few bytes. Without a GPU."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_leaves

import model
import nanolab.head
from conftest import Operators, call, flag_sets, force_gpu_head, logged, losses, small_gpt_config
from model import GPT
from nanolab.head import (CPUHeadLoss, HeadLoss, head_loss, loss_and_gradient,
                          product_of_gradients, softcap)

N, C, V = 47, 32, 301
FLAG_SETS = flag_sets(5)


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# In float32, and in 16 bits, where 301 is padded to 320. A GradScaler's scale may exceed float16.
PRECISIONS = [(torch.float32, 1, 1e-6), (torch.bfloat16, 1, 0.02), (torch.float16, 2**24, 0.003)]


@pytest.mark.parametrize("head, chunks, cap, z_loss", [
    ("gpu", [12, 12, 12, 11], 0.0, 0.0), ("gpu", [12, 12, 12, 11], 2.0, 0.1), ("cpu", [], 0.0, 0.0),
    ("cpu", [], 2.0, 0.1), ("compiled", [47], 2.0, 0.1)])
def test_loss_and_gradients(monkeypatch, head, chunks, cap, z_loss):
    """In chunks with a shorter last one, and compiled by inductor. Gradients wanted or not; what is
    kept for the backward pass is no larger than they are."""
    sizes = []

    def watched(logits, *args):
        sizes.append(len(logits))
        return loss_and_gradient(logits, *args)
    monkeypatch.setattr(nanolab.head, "loss_and_gradient", watched)
    monkeypatch.setattr(nanolab.head, "EAGER_CHUNK", 320 * 12)
    monkeypatch.setattr(nanolab.head, "CPU_SLICE", 128)
    apply = {"gpu": HeadLoss.apply, "cpu": CPUHeadLoss.apply,
             "compiled": torch.compile(lambda *args: HeadLoss.apply(*args), fullgraph=True)}[head]
    draw = torch.Generator().manual_seed(1)
    hidden, weight = (torch.randn(n, C, generator=draw, requires_grad=True) for n in (N, V))
    targets = torch.randint(V, (N,), generator=draw)
    logits = softcap(hidden @ weight.T, cap)
    plain = F.cross_entropy(logits, targets) + z_loss * logits.logsumexp(-1).square().mean()
    expected = torch.autograd.grad(plain, (hidden, weight))
    # another compiled graph takes seconds
    for dtype, scale, tolerance in PRECISIONS[:1] if head == "compiled" else PRECISIONS:
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
            loss = apply(hidden, weight, targets, cap, dtype, True, z_loss)
        assert sizes == chunks and sum(x.numel() for x in kept) <= (N + 320) * C
        assert head == "compiled" or kept[1].dtype is torch.float32, "chunks are summed in 32 bits"
        sizes.clear()
        assert loss.item() == pytest.approx(plain.item(), rel=tolerance)
        grads = torch.autograd.grad(loss * scale, (hidden, weight))
        for one, other in zip(grads, expected, strict=True):
            assert one.dtype is torch.float32
            assert (one / scale - other).abs().max() <= tolerance * max(1, other.abs().max())
    if head != "compiled":
        with torch.no_grad():
            loss = apply(hidden, weight, targets, cap, torch.float32, False, z_loss)
        assert loss.item() == pytest.approx(plain.item(), rel=1e-6)


def test_the_product_that_cancels(monkeypatch):
    """Where products have 16-bit sums, the hidden states' gradient keeps 32 bits, by bfloat16."""
    draw = torch.Generator().manual_seed(1)
    grad, head = (torch.randn(8, 8, generator=draw).half() for _ in range(2))
    assert torch.equal(product_of_gradients(grad, head), grad @ head)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_fp16_accumulation", True)
    expected = (grad.bfloat16() @ head.bfloat16()).half()
    for product in (product_of_gradients, compile_to_graphs(product_of_gradients)[0]):
        assert torch.equal(product(grad, head), expected)


def test_the_product_that_cancels_under_autocast(monkeypatch):
    """Which would turn its bfloat16 into float16 again."""
    force_gpu_head(monkeypatch)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_fp16_accumulation", True)
    draw = torch.Generator().manual_seed(1)
    inputs = [torch.randn(8, 8, generator=draw).requires_grad_() for _ in range(2)]
    targets = torch.arange(8)
    expected = torch.autograd.grad(HeadLoss.apply(*inputs, targets, 0, torch.float16, True), inputs)
    for loss in (head_loss, torch.compile(head_loss, fullgraph=True, backend="eager")):
        with torch.autocast("cpu", torch.float16):
            grads = torch.autograd.grad(loss(*inputs, targets, 0), inputs)
        assert all(map(torch.equal, grads, expected))


def compile_to_graphs(module):
    """The module compiled without inductor, and a list that gets its graphs."""
    graphs = []
    return torch.compile(module, fullgraph=True, backend=lambda graph, inputs: (
        graphs.append(graph) or graph.forward)), graphs


def small_batch():
    tokens = torch.randint(V, (4, 17), generator=torch.Generator().manual_seed(1))
    return tokens[:, :-1], tokens[:, 1:]


@pytest.mark.parametrize("i", range(len(FLAG_SETS)))
def test_the_model_is_one_graph(monkeypatch, i):
    """With the GPU's head, whatever the flags, with and without 16 bits. It has the eager model's
    loss and gradients, and a second step compiles nothing."""
    monkeypatch.setattr(model.MLP, "RECOMPUTE_ABOVE", 0 if i % 3 == 0 else 2**22)
    gpt = GPT(small_gpt_config(**FLAG_SETS[i]))

    def loss_and_gradients(run):
        gpt.zero_grad()
        torch.manual_seed(1)  # for dropout
        with torch.autocast("cpu", torch.bfloat16, enabled=i % 2 == 1):
            loss = run(*small_batch())
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in gpt.parameters())]
    expected = loss_and_gradients(gpt)
    force_gpu_head(monkeypatch)
    compiled, graphs = compile_to_graphs(gpt)
    for _ in range(2):
        for ours, eager in zip(loss_and_gradients(compiled), expected, strict=True):
            relative, rounding = (0.02, 2e-5) if i % 2 else (1e-5, 2e-8)
            assert (ours - eager).norm() <= relative * eager.norm() + rounding
    assert len(graphs) == 1


def test_no_copy_of_the_logits_or_the_head(monkeypatch):
    """In eager code, 21 operators make a tensor of at least the head's size, 12 of them one of the
    logits' size. The next test counts the bytes of HeadLoss's."""
    force_gpu_head(monkeypatch)
    gpt, are_large = GPT(small_gpt_config(n_layer=1)), []
    with Operators(lambda function, args, kwargs, results: are_large.append(any(
            isinstance(x, torch.Tensor) and x.numel() >= 32 * V for x in tree_leaves(results)))):
        gpt(*small_batch()).backward()
    assert sum(are_large) == 21


def test_bytes_kernels_and_memory():
    """Of a micro-batch of GPT-2 small in bfloat16, forward and backward, by inductor's own count
    for an A100. The logits' 1.24 GB pass five times: a product writes them, one kernel turns them
    into their gradient, two products read that."""
    # in a process of its own, since fake_cuda.py changes torch
    result = call("tests/fake_cuda.py", timeout=300)
    assert result.returncode == 0, result.stderr
    found, n_logits = json.loads(result.stdout), 12 * 1024 * 50304  # padded
    assert 5 * n_logits * 2 < found["bytes"] <= 7.1e9 and found["kernels"] <= 10
    # at most the logits and their gradient exist at once, and copies of hidden states and head
    assert found["peak"] <= 2 * n_logits * 2 + 2 * 768 * (12 * 1024 + 50304) + 2**20
    assert found["largest_saved"] <= 768 * 50304  # for the backward pass


def test_z_loss_changes_the_training_loss_alone(small_run):
    """Validations have the cross-entropy: that of the initial weights is the same."""
    plain, with_z = (small_run(z, "--max_steps=1", "--eval_every=1", f"--z_loss={z}")
                     for z in ("0", "0.1"))
    assert logged("val_loss", with_z)[0] == logged("val_loss", plain)[0]
    assert 2 < losses(with_z)[0] - losses(plain)[0] < 5  # 0.1 log(Z)^2, and Z is about 257
