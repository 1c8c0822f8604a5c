"""CPU threads that share batches compute what one thread does, with the same bits each time."""

import pytest
import torch

from conftest import flag_sets, losses, read_json, small_gpt_config
from model import GPT
from nanolab import distributed
from nanolab.distributed import SharedModel, World, machine, use_threads


@pytest.fixture(autouse=True)
def threads_as_before():
    n_parts, n_threads = distributed.n_parts, torch.get_num_threads()
    yield
    distributed.n_parts = n_parts
    torch.set_num_threads(n_threads)


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
