"""torch.compile: what it makes of the model, how often it compiles, and compiled runs.

The head is the GPU's: the loop over chunks stays outside the graph.
"""

import pytest
import torch

from conftest import SMALL, call, losses
from model import GPT, GPTConfig
from nanolab.kernels import logits_to_gradient_, loss_of_logits
from nanolab.measure import mean_loss
from probes import (counting_backend, flag_combinations, force_gpu_head, small_gpt_config,
                    without_progress)

CPU = torch.device("cpu")


class Windows:
    """Stands for a data set."""

    def batch(self, ids, device):
        draw = torch.Generator().manual_seed(ids[0])
        tokens = torch.randint(301, (len(ids), 17), generator=draw)
        return tokens[:, :-1], tokens[:, 1:]


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_the_trunk_is_one_graph(monkeypatch):
    """Whatever the flags, with and without 16 bits; and a second step compiles nothing."""
    force_gpu_head(monkeypatch, kernels=(loss_of_logits, logits_to_gradient_))
    inputs, targets = Windows().batch(range(4), CPU)
    for i, flags in enumerate(flag_combinations(4)):
        torch._dynamo.reset()
        trunk = []
        compiled = torch.compile(GPT(small_gpt_config(**flags)), backend=counting_backend(trunk))
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16, enabled=i % 2 == 1):
                loss = compiled(inputs, targets)
            loss.backward()
            assert len(trunk) == 1, f"{len(trunk)} graphs with {flags}"


def test_a_run_compiles_few_graphs(monkeypatch):
    """Training and validation in turn, the last batch of a validation short: 3 graphs of the trunk
    (training, validation, a short batch) and 3 of the head's kernels (the short batch needs another
    for the loss; validation wants no gradient)."""
    trunk, head = [], []
    force_gpu_head(monkeypatch, kernels=[torch.compile(kernel, backend=counting_backend(head))
                                         for kernel in (loss_of_logits, logits_to_gradient_)])
    gpt = GPT(small_gpt_config(**flag_combinations(1)[-1]))
    compiled = torch.compile(gpt, backend=counting_backend(trunk))
    for step in range(3):
        compiled(*Windows().batch(range(step, step + 4), CPU)).backward()
        mean_loss(compiled, Windows(), 7 + step % 2, 4, CPU)
    compiled(*Windows().batch(range(4), CPU)).backward()
    assert len(trunk) <= 3 and len(head) <= 3


def test_two_compiled_processes(small_run, data_dir, tmp_path):
    """With more than one bucket of gradients (1 MiB, then 25) and 2 micro-steps: the loss curve of
    one process that is not compiled; and no warning from either."""
    flags = ["--n_layer=1", "--n_embd=160", "--max_steps=5", "--batch_size=2",
             "--optimizer=muon"]
    assert 4 * GPT(GPTConfig(257, 32, 1, 2, 160)).num_params() > 2**20
    one = small_run("one", *flags)
    result = call("train.py", *SMALL, "--dataset=stdlib", f"--data_dir={data_dir}", *flags,
                  "--compile=True", f"--out_dir={tmp_path / 'two'}", processes=2, timeout=300)
    assert result.returncode == 0, result.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(one), rel=1e-5)
    assert without_progress(result.stderr) == []
