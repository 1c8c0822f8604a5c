"""Compiled runs: how often torch.compile compiles, and two compiled processes. The head is the
GPU's, and inductor is left out, which takes minutes on a slow CPU."""

import pytest
import torch

import fake_graphs
import nanolab.head
import train
from config import Config
from conftest import losses, run_quickly, run_ranks
from model import GPT, GPTConfig
from nanolab.distributed import World
from nanolab.evaluation import mean_loss
from probes import flag_sets, force_gpu_head, small_gpt_config


class Windows:
    """Stands for a data set."""
    block_size = 16

    def __len__(self):
        return 100

    def batch(self, ids, device):
        draw = torch.Generator().manual_seed(ids[0])
        tokens = torch.randint(301, (len(ids), 17), generator=draw)
        return tokens[:, :-1], tokens[:, 1:]


def test_a_run_compiles_few_graphs(monkeypatch):
    """Training and validation in turn, the last batch of a validation short: one graph for each."""
    force_gpu_head(monkeypatch)
    torch._dynamo.reset()
    graphs, world = [], World(torch.device("cpu"), None)
    compiled = torch.compile(GPT(small_gpt_config(**flag_sets(2)[-1])),
                             backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
    for step in range(3):
        compiled(*Windows().batch(range(step, step + 4), None)).backward()
        mean_loss(compiled, Windows(), 16 * (7 + step % 2), 4, world)
    compiled(*Windows().batch(range(4), None)).backward()
    assert len(graphs) <= 3


@pytest.mark.parametrize("compile, batch_size, n_gpus, one_graph, cuda_graphs", [
    ("auto", 12, 1, True, False), ("graphs", 12, 1, True, True), ("graphs", "auto", 1, True, False),
    ("graphs", 12, 8, False, False)])
def test_cuda_graphs(monkeypatch, compile, batch_size, n_gpus, one_graph, cuda_graphs):
    """On one GPU, without the trees that would overwrite gradients, and not while sizes are
    tried."""
    asked, real_compile = {}, torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **options: (
        asked.update(options) or real_compile(model, **options)))  # refuses unknown options
    config = Config(compile=compile, batch_size=batch_size, dropout=0.0)
    train.make_fast(GPT(small_gpt_config()), config,
                    World(torch.device("cuda", 0), None, 0, n_gpus))
    assert asked == {"fullgraph": one_graph, "options": {
        "triton.cudagraphs": cuda_graphs, "triton.cudagraph_trees": False}}


def as_with_trees(outputs):
    """Tensors that nobody else holds, so autograd takes them, and their memory, as .grad."""
    return [x.view_as(x) if isinstance(x, torch.Tensor) else x for x in outputs]


@pytest.mark.parametrize("give, same", [(list, True), (as_with_trees, False)])
def test_gradients_of_cuda_graphs_add_up(small_run, monkeypatch, give, same):
    """A run of 4 micro-steps with fake graphs, and a validation between its steps, is the eager
    run. With what trees would do it is another."""
    flags = ["--batch_size=2", "--eval_every=2", "--grad_clip=0.1", "--max_steps=3", "--n_layer=1"]
    eager = small_run("eager", *flags)
    force_gpu_head(monkeypatch)
    graphs, compile = fake_graphs.use_fake_graphs(monkeypatch), torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **options: (
        compile(model, fullgraph=True, backend=fake_graphs.backend(give))))
    torch._dynamo.reset()
    captured = small_run("graphs", *flags, "--compile=graphs")
    assert len(graphs) == 3  # forward, backward, validation
    assert (losses(captured) == pytest.approx(losses(eager), rel=1e-6)) == same


def test_a_validation_copies_each_loss():
    """A CUDA graph writes every result to the same place."""
    class Graph(torch.nn.Module):
        place = torch.zeros(())

        def forward(self, inputs, targets):
            return self.place.add_(1)
    world = World(torch.device("cpu"), None)
    assert mean_loss(Graph(), Windows(), 16 * 12, 4, world) == (1 + 2 + 3) / 3


def compiled_rank(argv):
    compile = torch.compile
    torch.compile = lambda model, **options: compile(model, backend="eager")
    nanolab.head.cpu_head_loss = nanolab.head.HeadLoss.apply
    run_quickly(argv)


def test_two_compiled_processes(small_run, small_flags, tmp_path):
    """With more than one bucket of gradients (1 MiB, then 25) and 2 micro-steps: the loss curve of
    one process that is not compiled; and no warning from either."""
    flags = ["--n_layer=1", "--n_embd=160", "--max_steps=3", "--batch_size=2", "--optimizer=muon"]
    assert 4 * GPT(GPTConfig(257, 32, 1, 2, 160)).num_params() > 2**20
    one = small_run("one", *flags)
    printed = run_ranks(2, compiled_rank, small_flags("two", *flags, "--compile=True"),
                        output=tmp_path / "printed.txt", timeout=300)
    assert losses(tmp_path / "two") == pytest.approx(losses(one), rel=1e-5)
    assert "Warning" not in printed
