"""One process or many, one micro-step or many, one machine or two, one CPU thread or many, quiet or
busy: the same run."""

import json
import os
import pathlib
import sys

import pytest
import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

import eval as eval_script
import nanolab.optim
import train
from config import Config
from conftest import (assert_same_run, flag_sets, logged, losses, read_json, run_quickly,
                      run_ranks, small_gpt_config, start)
from model import GPT
from nanolab import distributed
from nanolab.distributed import SharedModel, World, machine, use_threads

NEW = ["--cautious_decay", "--weight_decay=5", "--tail_average=0.3", "--x0_lambdas",
       "--value_embeddings", "--embed_norm", "--embedding_lr=9", "--head_lr=2", "--scalar_lr=3"]


@pytest.fixture(autouse=True)
def threads_as_before():
    n_parts, n_threads = distributed.n_parts, torch.get_num_threads()
    yield
    distributed.n_parts = n_parts
    torch.set_num_threads(n_threads)


@pytest.mark.parametrize("order, optimizer, sizes, n_ranks, n_machines", [
    ("sequential", "adamw", (4, 1), 2, 2), ("shuffled", "normuon", (2,), 4, 1)])
def test_any_split_is_the_same_run(small_run, order, optimizer, sizes, n_ranks, n_machines):
    """1, 2 or 4 processes, two machines, 1 to 8 micro-steps: one loss curve over 20 steps."""
    flags = ["--max_steps=20", "--eval_every=10", f"--order={order}", f"--optimizer={optimizer}",
             *NEW * (optimizer == "normuon")]
    whole = small_run("whole", *flags)
    others = [small_run(f"micro{size}", *flags, f"--batch_size={size}") for size in sizes]
    others.append(small_run("ranks", *flags, "--batch_size=2", ranks=n_ranks,
                            n_machines=n_machines))
    for folder in others:
        assert numbers(folder) == pytest.approx(numbers(whole), rel=1e-5)


def numbers(run):
    return [*losses(run), *logged("grad_norm", run), *logged("val_loss", run)]


def evaluate_on_a_rank(*argv):
    sys.argv = ["eval.py", *argv]
    eval_script.main()


def test_test_loss_on_two_processes(small_run, tiny_data, tmp_path):
    """eval.py finds the same test loss, and one process saves it."""
    run, results = small_run("run", *tiny_data, "--block_size=4", "--max_steps=1"), []
    for n in (1, 2):
        run_ranks(n, evaluate_on_a_rank, "--ckpt", str(run), "--device=cpu", f"--batch_size={n}",
                  output=tmp_path / "output")
        results.append(read_json(run / "best.test.json")["results"])
        (run / "best.test.json").unlink()  # or it would not be measured again
    [one], [two] = results
    assert one["test_loss"] == pytest.approx(two["test_loss"], abs=1e-6)


def test_dropout_does_not_depend_on_the_split(small_run):
    """Two micro-steps on two processes draw the masks of four on one; no mask is drawn twice."""
    flags = ["--dropout=0.5", "--batch_size=2"]
    one, two = small_run("one", *flags), small_run("two", *flags, ranks=2)
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    masks = set()
    for step, micro_batch in ((0, 0), (0, 1), (1, 0)):
        train.seed_dropout(Config(dropout_seed=42), step, micro_batch)
        masks.add(tuple(torch.rand(100).tolist()))
    assert len(masks) == 3


def test_ranks_share_muon_and_gradients(small_run, small_flags, tmp_path):
    """Each process orthogonalises its part of the matrices, and all have the same weights after it.
    The gradients are reduced in the last micro-step only. From the second step on they are views of
    DDP's buckets (of 1 MiB, then of 25), so there is no second copy of them."""
    flags = ["--n_embd=128", "--n_layer=1", "--max_steps=4", "--optimizer=muon"]
    one = small_run("one", *flags)
    run_ranks(2, watch_ranks, small_flags("two", *flags, "--batch_size=1"),
              tmp_path / "seen.json", output=tmp_path / "output")
    assert losses(tmp_path / "two") == pytest.approx(losses(one), rel=1e-5)
    seen = read_json(tmp_path / "seen.json")
    # Q, K and V are one stack of 3 matrices; the MLP's two and attention's projection one each
    assert sorted(seen["matrices"]) == sorted(4 * [2, 1, 1, 1])
    assert len(seen["storages"]) == 4 * 4, "four steps of four micro-steps"
    later = seen["storages"][4:]
    assert all(pointers == later[0] for pointers in later) and len(set(later[0])) <= 2
    assert set(seen["reduced"]) == {3, 7, 11, 15}


def watch_ranks(argv, report):
    """A run that notes where gradients are stored after each backward pass, in which passes they
    are reduced, and how many matrices each call orthogonalises."""
    storages, reduced, matrices, models = [], [], [], []
    backward, newton_schulz = torch.Tensor.backward, nanolab.optim.newton_schulz
    wrap_ddp = train.wrap_ddp

    def watch_gradients(*args):
        backward(*args)
        storages.append([p.grad.untyped_storage().data_ptr() for p in models[0].parameters()])

    def watch_reductions(model, world):
        def reduce(state, bucket):
            reduced.append(len(storages))
            return allreduce_hook(None, bucket)
        ddp_model = wrap_ddp(model, world)
        ddp_model.register_comm_hook(None, reduce)
        return ddp_model

    def count_matrices(stack):
        matrices.append(len(stack))
        return newton_schulz(stack)

    torch.Tensor.backward, nanolab.optim.newton_schulz = watch_gradients, count_matrices
    train.wrap_ddp = watch_reductions
    run_quickly(argv, lambda step, model: models.append(model))
    if dist.get_rank() == 0:
        pathlib.Path(report).write_text(json.dumps({
            "storages": storages, "reduced": reduced, "matrices": matrices}))


def keep_busy():
    while True:
        pass


def test_quiet_or_busy_is_the_same_run(small_flags, tmp_path):
    """The same command gives the same bits, whatever else keeps the cores busy."""
    flags = ["--threads=3", "--optimizer=muon", "--eval_every=5"]  # the sum of 3 has an order
    busy = [start(keep_busy) for _ in range(os.cpu_count())]
    try:
        start(run_quickly, small_flags("busy", *flags)).join(60)
    finally:
        for process in busy:
            process.kill()
    start(run_quickly, small_flags("quiet", *flags), output=tmp_path / "output").join()
    assert "3 threads" in (tmp_path / "output").read_text()
    assert_same_run(tmp_path / "quiet", tmp_path / "busy")


@pytest.mark.parametrize("is_large, options, n_threads, is_shared", [
    (False, {}, 4, True), (False, {"threads": 2}, 2, True), (False, {"threads": 1}, 1, False),
    # a small model whose threads cannot share batches does not wait for busy cores
    (False, {"dropout": 0.1}, 1, False), (False, {"batch_size": 1}, 1, False),
    (False, {"compile": True}, 1, False), (False, {"dropout": 0.1, "threads": 2}, 2, False),
    # a large one shares operators
    (True, {}, 4, False), (True, {"dropout": 0.1}, 4, False), (True, {"threads": 2}, 2, False)])
def test_threads_follow_from_a_rule(monkeypatch, is_large, options, n_threads, is_shared):
    chosen = []
    monkeypatch.setattr(train, "DEFAULT_THREADS", 4)
    monkeypatch.setattr(train, "use_threads", lambda n, shared: chosen.append((n, shared)))
    monkeypatch.setattr(torch, "compile", lambda model, **options: model)
    model = torch.nn.Linear(2**12, 2**12, bias=is_large, device="meta")  # of 2**24 weights
    config = Config(**{"dropout": 0.0, "batch_size": 8, **options})
    world = World(torch.device("cpu"), None)
    fast = train.make_fast(model, config, config.batch_size, world)
    assert chosen == [(n_threads, is_shared)]
    assert isinstance(fast, SharedModel) == is_shared


@pytest.mark.parametrize("dtype, tolerance", [(None, 1e-5), (torch.bfloat16, 0.02)])
def test_shared_batches_compute_the_same(dtype, tolerance):
    """Loss and gradients of unequal parts; with accumulated and scaled gradients, and without."""
    gpt = GPT(small_gpt_config(**flag_sets(6)[1] | {"dropout": 0.0}))
    inputs, targets = torch.randint(301, (2, 5, 16), generator=torch.Generator().manual_seed(1))
    world, dtypes = World(torch.device("cpu"), dtype), set()
    gpt.blocks[0].attn.qkv.register_forward_hook(lambda m, args, out: dtypes.add(out.dtype))

    def loss_and_gradients(model):
        gpt.zero_grad()
        for _ in range(2):
            with world.autocast():
                loss = model(inputs, targets)
            (loss / 3).backward()
        return [loss.detach(), *(p.grad.clone() for p in gpt.parameters())]
    plain = loss_and_gradients(gpt)
    use_threads(2, shared=True)
    first, *others = [loss_and_gradients(SharedModel(gpt)) for _ in range(4)]
    for ours, expected in zip(first, plain, strict=True):
        assert (ours - expected).norm() <= tolerance * (expected.norm() + 1e-3)
    for again in others:
        assert all(map(torch.equal, first, again))
    assert dtypes == {dtype or torch.float32}
    with torch.no_grad(), world.autocast():
        assert torch.equal(SharedModel(gpt)(inputs, targets), first[0])


def test_a_run_with_two_threads(small_run, tiny_data, monkeypatch, tmp_path, output_of):
    """Training and eval.py have the losses of one thread, up to rounding."""
    runs, results = [], []
    for n in (1, 2):
        runs.append(small_run(f"run{n}", *tiny_data, "--dropout=0", f"--threads={n}",
                              "--optimizer=muon"))
        assert distributed.n_parts == n
        monkeypatch.setattr(distributed, "DEFAULT_THREADS", n)
        file = tmp_path / f"{n}.json"
        output_of("eval", "--ckpt", runs[0] / "best.pt", "--json", file, "--device=cpu")
        results.append(read_json(file)["runs"][0]["test_loss"])
        (runs[0] / "best.test.json").unlink()  # or it would not be measured again
    assert losses(runs[0]) == pytest.approx(losses(runs[1]), rel=1e-5)
    assert results[0] == pytest.approx(results[1], rel=1e-6)


def test_machine_is_what_the_run_used(monkeypatch):
    """A CPU's name for a run on the CPU, also where there is a GPU."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    on_cpu = machine(World(torch.device("cpu"), None))
    assert "cores" in on_cpu and "NVIDIA" not in on_cpu
    assert machine(World(torch.device("cuda", 0), None, 1, 8)) == "8 x NVIDIA A100"


def test_each_machine_makes_stdlib(monkeypatch, tmp_path):
    made, world = [], distributed.World(torch.device("cpu"), None, 2, 4)
    monkeypatch.setattr(train, "prepare_stdlib", made.append)
    monkeypatch.setattr(dist, "barrier", lambda: None)
    for local_rank in "01":
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        train.make_stdlib_if_missing(Config(dataset="stdlib", data_dir=str(tmp_path)), world)
    assert made == [str(tmp_path)]
