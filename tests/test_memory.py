"""What fits in memory, and how steps are timed."""

import types

import pytest
import torch

import nanolab.memory
import nanolab.runlog
import train
from config import Config
from conftest import call, small_gpt_config
from model import GPT
from nanolab.checkpoint import read_checkpoint
from nanolab.common import UserError
from nanolab.distributed import World
from nanolab.memory import largest_batch_size
from nanolab.optim import make_optimizer, set_learning_rate
from nanolab.options import load

GPU = World(torch.device("meta"), None)  # a device that is no CPU


def make_model(optimizer):
    model = GPT(small_gpt_config())
    return model, make_optimizer(model, load(Config, [f"--optimizer={optimizer}"]))


def let_fit(monkeypatch, n_sequences, message="CUDA out of memory"):
    """Memory ends beyond so many sequences. -> a list that gets what is tried"""
    tried = []

    def forward_and_backward(model, dataset, size, world):
        tried.append(size)
        if size > n_sequences:
            raise RuntimeError(message)
        for p in model.parameters():
            p.grad += 1
    monkeypatch.setattr(nanolab.memory, "forward_and_backward", forward_and_backward)
    return tried


@pytest.mark.parametrize("fits, found", [(100, 96), (20, 16), (1, 1)])
def test_largest_batch_size(monkeypatch, fits, found):
    """The largest divisor of the global batch that fits; a size that fits is tried three times."""
    model, optimizer = make_model("adamw")
    tried = let_fit(monkeypatch, fits)
    assert largest_batch_size(model, optimizer, None, 96, GPU) == found
    assert tried == [size for size in (96, 48, 32, 24, 16, 12, 8, 6, 4, 3, 2, 1)
                     if size > found] + [found] * 3
    for message, error in (("CUDA out of memory", "not even batch_size=1 fits"),
                           ("an illegal memory access", "an illegal memory access")):
        let_fit(monkeypatch, 0, message)
        with pytest.raises((UserError, RuntimeError), match=error):
            largest_batch_size(model, optimizer, None, 96, GPU)


def test_ranks_agree(monkeypatch):
    """All processes take a size that fits on each; a third of the global batch is the most."""
    answers = []

    class OneOfThree(World):
        def all(self, condition):
            answers.append(condition)
            return condition and len(answers) > 2  # the others have less memory
    model, optimizer = make_model("adamw")
    let_fit(monkeypatch, 100)
    world = OneOfThree(torch.device("meta"), None, 0, 3)
    assert largest_batch_size(model, optimizer, None, 24, world) == 2  # 8 and 4 do not fit there
    assert answers == [True] * 3


def test_a_trial_changes_nothing(monkeypatch):
    """Of weights, gradients and the optimiser's state, whether it is new or not."""
    model, optimizer = make_model("muon")
    let_fit(monkeypatch, 2)

    def everything():
        states = [each for part in optimizer.state_dict() for each in part["state"].values()]
        return [*model.state_dict().values(), *(p.grad for p in model.parameters()),
                *(value for state in states for value in state.values())]
    for _ in range(2):
        before = [x.clone() if isinstance(x, torch.Tensor) else x for x in everything()]
        largest_batch_size(model, optimizer, None, 8, GPU)
        torch.testing.assert_close(everything(), before, rtol=0, atol=0)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        set_learning_rate(optimizer, 1e-3)
        optimizer.step()
        model.zero_grad()


def split_automatically(n_processes, global_batch_size):
    config = load(Config, ["--batch_size=auto", f"--global_batch_size={global_batch_size}"])
    world = World(torch.device("cpu"), None, 0, n_processes)
    return train.split_batch(config, torch.nn.Linear(1, 1), None,
                             types.SimpleNamespace(block_size=32), world)


def test_auto_on_a_cpu():
    """The largest part of the global batch of at most 8,192 tokens. Fewer sequences than processes
    are an error."""
    assert split_automatically(1, 384) == (192, 2)
    with pytest.raises(UserError, match="is not divisible by .*; global_batch_size could be 8"):
        split_automatically(8, 4)


def test_timed_seconds(small_run, monkeypatch):
    """Tokens per second are those of the steps after the first, without validations and samples:
    here a clock counts 100 s for the first step, 1 s for each later one and 1,000 s for each of the
    others."""
    now = [0.0]

    def advance(seconds, value=None):
        now[0] += seconds
        return value
    monkeypatch.setattr(nanolab.runlog, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(train, "mean_loss", lambda *args: advance(1000, 3.0))
    monkeypatch.setattr(nanolab.runlog, "make_sampler", lambda *args: lambda model:
                        advance(1000, "text"))
    run = small_run("run", "--max_steps=4", "--eval_every=1", "--sample_every=2",
                    on_step=lambda step, model: advance(1 if step else 100))
    state = read_checkpoint(run / "last.pt")
    assert (state["timed_tokens"], state["timed_seconds"]) == (3 * 8 * 32, 3)
    assert state["seconds"] == 100 + 3 + (1 + 4 + 2) * 1000  # validations: step 0 and each step


def test_validation_keeps_no_memory():
    """What a batch leaves must not split the memory that the next one reuses: it once took 0.5 MB
    more a batch."""
    script = """
import resource, types, torch
from model import GPT, GPTConfig
from nanolab.distributed import World, keep_freed_memory
from nanolab.evaluation import mean_losses
keep_freed_memory()
torch.set_num_threads(1)
model = GPT(GPTConfig(vocab_size=257, n_layer=2, n_head=2, n_embd=32, block_size=128))
data = types.SimpleNamespace(batch=lambda ids, device: torch.ones(2, len(ids), 128, dtype=int))
for n in (20, 120):
    groups = [range(5 + i % 40) for i in range(n)]
    mean_losses(model, data, groups, 12, World(torch.device("cpu"), None))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    done = call("-c", script)
    few, many = map(int, done.stdout.split() or pytest.fail(done.stderr))
    assert many < few + 30_000  # KB, on Linux
