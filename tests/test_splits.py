"""One process or many, one micro-step or many, one machine or two: the same run."""

import json
import socket
import subprocess
import sys

import pytest
import torch

import train
from conftest import HERE, SMALL, call, losses, write_script
from nanolab.logfile import read_log
from probes import without_progress


NEW = ["--cautious_decay", "--weight_decay=5", "--tail_average=0.3", "--x0_lambdas",
       "--value_embeddings", "--embed_norm", "--embedding_lr=9", "--head_lr=2", "--scalar_lr=3"]


@pytest.mark.parametrize("order, optimizer", [("sequential", "adamw"), ("shuffled", "normuon")])
def test_any_split_is_the_same_run(small_run, data_dir, tmp_path, order, optimizer):
    """1 process x 8 sequences, 2, 4 and 8 micro-steps, 4 processes or two machines: one loss curve
    over 50 steps."""
    flags = ["--max_steps=50", "--eval_every=25", f"--order={order}", f"--optimizer={optimizer}",
             *NEW * (optimizer == "normuon")]
    command = ["train.py", *SMALL, "--dataset=stdlib", f"--data_dir={data_dir}", *flags]
    whole = small_run("whole", *flags)
    others = [small_run(f"micro{size}", *flags, f"--batch_size={size}") for size in (4, 2, 1)]
    others.append(tmp_path / "out")
    command += [f"--out_dir={others[-1]}", "--batch_size=2"]
    if order == "sequential":
        two_machines(*command)
    else:
        result = call(*command, processes=4)
        assert result.returncode == 0, result.stderr
    for folder in others:
        assert losses(folder) == pytest.approx(losses(whole), rel=1e-5)
        ours, theirs = (read_log(f / "log.jsonl")[1] for f in (folder, whole))
        assert [e["val_loss"] for e in ours] == pytest.approx([e["val_loss"] for e in theirs],
                                                              rel=1e-5)


def two_machines(*command):
    """Two torchrun agents that meet on the loopback, as two machines with one device each would."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    agents = [
        subprocess.Popen([
            sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1",
            "--rdzv_id=test", "--rdzv_backend=c10d", f"--rdzv_endpoint={endpoint}",
            *map(str, command)
        ], cwd=HERE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for _ in range(2)
    ]
    assert [agent.wait(timeout=120) for agent in agents] == [0, 0]


def test_dropout_does_not_depend_on_the_split(small_run, data_dir, tmp_path):
    """Two micro-steps on each of two processes draw the masks of four on one process; and not the
    same mask twice."""
    flags = ["--dropout=0.5", "--batch_size=2"]
    one = small_run("one", *flags)
    call("train.py", *SMALL, "--dataset=stdlib", f"--data_dir={data_dir}",
         f"--out_dir={tmp_path}/two", *flags, processes=2)
    assert losses(tmp_path / "two") == pytest.approx(losses(one), rel=1e-5)
    masks = []
    for step, micro_batch in ((0, 0), (0, 1), (1, 0)):
        train.seed_dropout(42, step, micro_batch)
        masks.append(torch.rand(100))
    assert not any(torch.equal(masks[i], masks[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


COUNT_ALL_REDUCES = """
with torch.profiler.profile() as profile:
    train.train(config.load(sys.argv[1:]))
if os.environ["RANK"] == "0":
    print("ALL-REDUCES", sum(e.count for e in profile.key_averages() if e.key == "gloo:all_reduce"))
end_distributed()
"""


def test_gradients_are_reduced_once_a_step(tmp_path, data_dir):
    """4 micro-steps cost one all-reduce for the gradients and one for the logged loss, not four and
    one. (Five more are of the start and of the validation.)"""
    script = write_script(tmp_path / "count.py", COUNT_ALL_REDUCES)
    result = call(script, *SMALL, "--dataset=stdlib", f"--data_dir={data_dir}",
                  f"--out_dir={tmp_path}/out", "--max_steps=10", "--batch_size=1", processes=2)
    count = next(
        int(line.split()[1]) for line in result.stdout.splitlines()
        if line.startswith("ALL-REDUCES"))
    assert count == 2 * 10 + 5


WATCH_RANKS = """
import json
import torch.distributed as dist
import nanolab.optim
storages, matrices, parameters = [], [], []
backward, newton_schulz, wrap_ddp = torch.Tensor.backward, nanolab.optim.newton_schulz, train.wrap_ddp

def watch_parameters(model, *args):
    parameters.extend(model.parameters())
    return wrap_ddp(model, *args)

def watch_gradients(*args):
    backward(*args)
    if parameters:  # not in the timed steps that choose a CPU's plan
        storages.append([p.grad.untyped_storage().data_ptr() for p in parameters])

def count_matrices(stack):
    matrices.append(len(stack))
    return newton_schulz(stack)

def report(*args):
    weights = torch.cat([p.detach().flatten() for p in parameters])
    others = [torch.empty_like(weights) for _ in range(dist.get_world_size())]
    dist.all_gather(others, weights)
    if dist.get_rank() == 0:
        print("SEEN", json.dumps([storages, matrices, all(map(weights.equal, others))]))

torch.Tensor.backward, nanolab.optim.newton_schulz = watch_gradients, count_matrices
train.wrap_ddp = watch_parameters
train.train(config.load(sys.argv[1:]))
report()
end_distributed()
"""


@pytest.mark.parametrize("processes, n_layer", [(2, 2), (4, 1)])
def test_ranks_share_muon_and_store_gradients_once(small_run, data_dir, tmp_path, processes,
                                                   n_layer):
    """Each process orthogonalises its share of the matrices, also where there are fewer of a shape
    than processes, and all have the same weights after it. The gradients are views of DDP's buckets
    (of 1 MiB, then of 25) in every micro-step from the second step on: there is no second copy of
    them."""
    flags = ["--n_embd=128", f"--n_layer={n_layer}", "--n_head=4", "--max_steps=4",
             "--optimizer=muon"]
    one = small_run("one", *flags)
    script = write_script(tmp_path / "watch.py", WATCH_RANKS)
    result = call(script, *SMALL, "--dataset=stdlib", f"--data_dir={data_dir}", *flags,
                  "--batch_size=1", f"--out_dir={tmp_path / 'many'}", processes=processes)
    assert result.returncode == 0 and without_progress(result.stderr) == []
    assert losses(tmp_path / "many") == pytest.approx(losses(one), rel=1e-5)
    line = next(line for line in result.stdout.splitlines() if line.startswith("SEEN"))
    storages, matrices, same_weights = json.loads(line.removeprefix("SEEN"))
    assert same_weights
    stacks = [3 * n_layer, n_layer, n_layer,
              n_layer]  # Q, K and V; the MLP's two and attention's projection
    assert sorted(matrices) == sorted(4 * [-(-n // processes)
                                           for n in stacks]), "each rank does its share"
    micro_steps = 8 // processes
    assert len(storages) == 4 * micro_steps
    later = storages[micro_steps:]
    assert all(pointers == later[0] for pointers in later) and len(set(later[0])) <= 2
