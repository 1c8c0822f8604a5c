"""Compiled runs: how often torch.compile compiles, and two compiled processes. The head is the
GPU's, and inductor is left out, which takes minutes on a slow CPU."""

import pytest
import torch

import fake_graphs
import nanolab.head
import train
from config import Config
from conftest import (flag_sets, force_gpu_head, logged, losses, run_quickly, run_ranks,
                      small_gpt_config, stop_at)
from model import GPT, GPTConfig
from nanolab.distributed import World


def compile_with(monkeypatch, backend):
    """Runs are compiled by this backend, and with the GPU's head."""
    force_gpu_head(monkeypatch)
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **options: compile(
        model, fullgraph=True, backend=backend, dynamic=options["dynamic"],
        isolate_recompiles=options.get("isolate_recompiles", False)))
    torch._dynamo.reset()


def test_a_run_compiles_few_graphs(small_run, monkeypatch):
    """Training, validation, and its last batch, which is short: each for one size of batch."""
    graphs = []
    compile_with(monkeypatch, lambda graph, inputs: graphs.append(inputs) or graph.forward)
    small_run("run", "--compile=True", "--batch_size=4", "--max_steps=3", "--eval_every=1",
              "--z_loss=0.1", f"--eval_tokens={30 * 32}", *(f"--{key}={value}"
                                            for key, value in flag_sets(2)[-1].items()))
    assert len(graphs) == 3
    assert not any(isinstance(x, torch.SymInt) for inputs in graphs for x in inputs)


@pytest.mark.parametrize("compile, batch_size, n_gpus, one_graph, cuda_graphs", [
    ("auto", 12, 1, True, False), ("graphs", 12, 1, True, True), ("auto", "auto", 1, True, False),
    ("graphs", 12, 8, False, False)])
def test_cuda_graphs(monkeypatch, compile, batch_size, n_gpus, one_graph, cuda_graphs):
    """On one GPU, without the trees that would overwrite gradients."""
    asked, real_compile = {}, torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **options: (
        asked.update(options) or real_compile(model, **options)))  # refuses unknown options
    config = Config(compile=compile, batch_size=batch_size, dropout=0.0, tail_average=0.1)
    train.make_fast(GPT(small_gpt_config()), config, batch_size,
                    World(torch.device("cuda", 0), None, 0, n_gpus))
    assert asked.pop("dynamic") is (None if batch_size == "auto" else False)
    assert asked.pop("isolate_recompiles", False) == (compile == "graphs")
    assert asked == {"fullgraph": one_graph, "options": {
        "triton.cudagraphs": cuda_graphs, "triton.cudagraph_trees": False}}


def as_with_trees(outputs):
    """Tensors that nobody else holds, so autograd takes them, and their memory, as .grad."""
    return [x.view_as(x) if isinstance(x, torch.Tensor) else x for x in outputs]


@pytest.mark.parametrize("give, same", [(list, True), (as_with_trees, False)])
def test_cuda_graphs_change_no_loss(small_run, monkeypatch, give, same):
    """A run of 4 micro-steps with fake graphs, and validations of several batches between its
    steps, is the eager run, in one piece or resumed. With what trees would do it is another."""
    flags = ["--batch_size=2", "--eval_every=2", "--grad_clip=0.1", "--max_steps=4", "--n_layer=1",
             "--tail_average=0.5"]
    eager = small_run("eager", *flags)
    graphs = fake_graphs.use_fake_graphs(monkeypatch)
    compile_with(monkeypatch, fake_graphs.backend(give))
    captured = small_run("graphs", *flags, "--compile=graphs")
    assert len(graphs) == 4  # forward, backward, validation, that of the averaged weights
    assert (losses(captured) == pytest.approx(losses(eager), rel=1e-6)) == same
    if same:
        expected = pytest.approx(logged("val_loss", eager), rel=1e-6)
        assert logged("val_loss", captured) == expected
        small_run("parts", *flags, "--compile=graphs", on_step=stop_at(2))
        parts = small_run("parts", *flags, "--compile=graphs", "--resume")
        assert losses(parts) == losses(captured)


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
