"""On a GPU: the CPU's numbers in every precision, compiled or not; one wait a step; flash
attention; resuming; memory; several processes; speed.

    python -m pytest -m gpu         # these alone; at the end they print the table for docs/gpu.md
"""

import subprocess
import sys

import pytest
import torch

import bench.gpu
import nanolab.memory
import train
from conftest import (HERE, SMALL, assert_same_run, call, losses, runs_with_a_bad_update,
                      small_model_batch, watch_waits, write_script)
from model import GPT, GPTConfig
from nanolab.checkpoint import read_checkpoint
from nanolab.devices import autocast
from test_resume import DIE_ONCE, stop_at

if not torch.cuda.is_available():
    pytest.skip("no CUDA GPU here", allow_module_level=True)

# In one group, so that two processes of pytest-xdist do not share the GPU's memory and time.
pytestmark = [pytest.mark.gpu, pytest.mark.xdist_group("gpu")]

CUDA = torch.device("cuda", 0)
ON_CUDA = ["--device=cuda", "--tf32=False"]  # after SMALL: the last flag counts
N_GPUS = torch.cuda.device_count()

# The precision, the scale of the loss, and how far the gradients may be from the CPU's in float32.
PRECISIONS = [(None, 1, 1e-4), (torch.bfloat16, 1, 0.05), (torch.float16, 2**12, 0.01)]
ONE_FLAG = [{}, {"qkv_bias": True}, {"tie_weights": True}, {"init": "pytorch"},
            {"norm": "rmsnorm"}, {"position": "rope"}, {"qk_norm": True}, {"activation": "relu2"},
            {"activation": "swiglu"}, {"logit_softcap": 3.0}, {"zero_init": True},
            {"value_residual": True}, {"value_embeddings": True}, {"x0_lambdas": True},
            {"embed_norm": True}]
STACKS = [{}, {"tie_weights": True, "qkv_bias": True, "logit_softcap": 3.0},
          {"norm": "rmsnorm", "position": "rope", "qk_norm": True, "activation": "swiglu",
           "value_residual": True}]


@pytest.fixture(autouse=True)
def own_process():
    """Each test starts as in a process of its own: nothing compiled, full float32, waits
    allowed."""
    torch._dynamo.reset()
    torch.set_float32_matmul_precision("highest")
    torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def deterministic(monkeypatch):
    """torch uses deterministic kernels only."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def loss_and_gradients(gpt, loss_of, batch, dtype=None, scale=1):
    """-> the loss, {parameter: gradient in float32 on the CPU}. The loss is scaled for the backward
    pass only."""
    device = next(gpt.parameters()).device
    gpt.zero_grad()
    with autocast(dtype, device):
        loss = loss_of(*(tokens.to(device) for tokens in batch))
    (loss * scale).backward()
    return loss.item(), {name: p.grad.cpu() / scale for name, p in gpt.named_parameters()}


def assert_close(ours, theirs, tolerance):
    """Two results of loss_and_gradients. Each gradient as a whole; where it is nearly 0, against
    the largest of all."""
    (loss, grads), (their_loss, their_grads) = ours, theirs
    assert loss == pytest.approx(their_loss, rel=tolerance / 10)
    largest = max(grad.norm() for grad in their_grads.values())
    for name, grad in their_grads.items():
        assert (grads[name] - grad).norm() <= tolerance * (grad.norm() + 0.01 * largest), name


@pytest.mark.parametrize("flags", ONE_FLAG, ids=str)
@pytest.mark.parametrize("dtype, scale, tolerance", PRECISIONS)
def test_loss_and_gradients_are_the_cpus(flags, dtype, scale, tolerance):
    gpt, batch = small_model_batch(flags)
    on_cpu = loss_and_gradients(gpt, gpt, batch)
    gpt.to(CUDA)
    assert_close(loss_and_gradients(gpt, gpt, batch, dtype, scale), on_cpu, tolerance)


@pytest.mark.parametrize("flags", STACKS, ids=str)
@pytest.mark.parametrize("dtype, scale, tolerance", PRECISIONS)
def test_compiled_is_eager(flags, dtype, scale, tolerance):
    """In training, and in a validation of a batch of another size."""
    gpt, batch = small_model_batch(flags)
    gpt.to(CUDA)
    eager = loss_and_gradients(gpt, gpt, batch, dtype, scale)
    compiled = torch.compile(gpt)
    for _ in range(2):
        assert_close(loss_and_gradients(gpt, compiled, batch, dtype, scale), eager, tolerance)
    short = [tokens[:3].to(CUDA) for tokens in batch]
    with torch.no_grad(), autocast(dtype, CUDA):
        expected = gpt.eval()(*short).item()
        assert compiled(*short).item() == pytest.approx(expected, rel=tolerance / 10)


@pytest.mark.parametrize("amp, optimizer", [("off", "adamw"), ("bfloat16", "muon"),
                                            ("float16", "adamw"), ("float16", "muon")])
def test_a_step_waits_once(small_run, monkeypatch, amp, optimizer):
    """With micro-steps, dropout and clipping: once all is compiled, a step waits only for the copy
    of its numbers."""
    steps = watch_waits(monkeypatch, torch.cuda.set_sync_debug_mode, first_step=3)
    small_run("run", *ON_CUDA, f"--amp={amp}", f"--optimizer={optimizer}", "--batch_size=2",
              "--dropout=0.1", "--grad_clip=0.1", "--max_steps=8")
    assert steps == [3, 4, 5, 6, 7]


@pytest.mark.skipif(torch.cuda.get_device_capability() < (8, 0),
                    reason="flash attention needs an Ampere GPU or a newer one")
@pytest.mark.parametrize("flags", [{}, {"qkv_bias": True, "dropout": 0.1}, STACKS[2]], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_is_flash(flags, dtype):
    """With all other kernels forbidden, forward and backward passes still run."""
    gpt, batch = small_model_batch({"n_embd": 128, **flags})  # heads of 64, as GPT-2's
    gpt.to(CUDA)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        loss, _ = loss_and_gradients(gpt, gpt, batch, dtype)
    assert 0 < loss < 20


@pytest.mark.parametrize("amp, optimizer", [("off", "adamw"), ("float16", "adamw"),
                                            ("bfloat16", "muon")])
def test_resume_is_exact(small_run, tiny_data, monkeypatch, deterministic, amp, optimizer):
    """Bit for bit, where torch uses deterministic kernels only: by default some add up in any
    order."""
    flags = [*tiny_data, *ON_CUDA, "--eval_every=4", "--max_steps=12", f"--amp={amp}",
             f"--optimizer={optimizer}"]
    whole = small_run("whole", *flags)
    with monkeypatch.context() as patch:
        patch.setattr(train, "learning_rate_at", stop_at(6))
        small_run("parts", *flags)
    assert read_checkpoint(small_run("parts", *flags, "--resume") / "last.pt")["step"] == 12
    assert_same_run(whole, whole.parent / "parts")


@pytest.mark.parametrize("amp", ["off", "float16"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_bad_update_is_left_out(small_run, monkeypatch, deterministic, optimizer, amp):
    """AdamW, queued before the wait, leaves it out by itself: bit for bit as when it waits."""
    waiting, queued = runs_with_a_bad_update(small_run, monkeypatch, ("cuda",), *ON_CUDA,
                                             f"--amp={amp}", f"--optimizer={optimizer}")
    assert_same_run(waiting, queued)


def test_batch_size_auto(small_run, monkeypatch):
    """With memory for all it takes the whole share of the process; with less it takes less, and the
    run stays the same."""
    flags = [*ON_CUDA, "--amp=off", "--n_layer=4", "--n_embd=256", "--block_size=256",
             "--global_batch_size=64", "--max_steps=2"]
    whole = small_run("whole", *flags, "--batch_size=auto")
    assert read_checkpoint(whole / "last.pt")["config"]["batch_size"] == 64
    total = torch.cuda.get_device_properties(CUDA).total_memory
    monkeypatch.setattr(nanolab.memory, "MARGIN", 1 - 400 * 2**20 / total)
    torch.cuda.empty_cache()
    less = small_run("less", *flags, "--batch_size=auto")
    assert 1 <= read_checkpoint(less / "last.pt")["config"]["batch_size"] < 64
    assert losses(less) == pytest.approx(losses(whole), rel=1e-4)


@pytest.mark.skipif(N_GPUS < 2, reason="only one CUDA GPU here")
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_two_gpus_equal_one(small_run, tmp_path, data_dir, optimizer):
    flags = [*ON_CUDA, "--amp=off", f"--optimizer={optimizer}", "--batch_size=2", "--max_steps=30",
             "--eval_every=15"]
    one = small_run("one", *flags)
    two = call("train.py", *SMALL, "--dataset=stdlib", f"--data_dir={data_dir}",
               f"--out_dir={tmp_path / 'two'}", *flags, processes=2, timeout=600)
    assert two.returncode == 0, two.stderr
    tolerance = 1e-3 if optimizer == "muon" else 1e-4  # Muon orthogonalises in 16 bits
    assert losses(tmp_path / "two") == pytest.approx(losses(one), rel=tolerance)


def test_torchrun_restarts_resume(small_run, tmp_path, tiny_data):
    """A rank dies, of one or two as there are GPUs, and the run goes on from its last checkpoint by
    itself."""
    processes = min(N_GPUS, 2)
    script = write_script(tmp_path / "die.py", DIE_ONCE.replace('== "1"', f'== "{processes - 1}"'))
    flags = [*tiny_data, *ON_CUDA, "--amp=off", "--batch_size=4", "--save_every=3"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts=3",
                f"--nproc_per_node={processes}"]
    result = subprocess.run([*torchrun, str(script), *SMALL, *flags,
                             f"--out_dir={tmp_path / 'out'}"], cwd=HERE, capture_output=True,
                            text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    assert "resume: at step 6" in result.stdout
    one = small_run("one", *flags)
    assert losses(tmp_path / "out") == pytest.approx(losses(one), rel=1e-4)


def test_train_evaluate_sample(tmp_path, data_dir):
    """The quickstart's three commands, with device and precision as they come."""
    run = [f"--data_dir={data_dir}", f"--out_dir={tmp_path / 'out'}", "--max_steps=200",
           "--eval_every=100", "--eval_tokens=4096"]
    trained = call("train.py", "config/quickstart.py", *run, timeout=600)
    assert trained.returncode == 0 and "cuda" in trained.stdout, trained.stderr
    assert losses(tmp_path / "out")[-1] < 3
    for command in (["eval.py", f"--data_dir={data_dir}"],
                    ["sample.py", "--prompt=def main", "--max_new_tokens=20"]):
        result = call(*command, "--ckpt", tmp_path / "out/best.pt", timeout=600)
        assert result.returncode == 0 and result.stdout, result.stderr


def test_table(data_dir, record_property):
    """GPT-2 small's shape: the head takes at most a quarter longer than compiled cross-entropy of
    all logits and needs less memory. The largest batch is left out: a search takes minutes."""
    flags = [f"--data_dir={data_dir}", "--device=cuda", "--batch_size=12",
             "--global_batch_size=12", "--max_steps=12"]
    figures = {}
    for amp in bench.gpu.PRECISIONS:
        if amp != "bfloat16" or torch.cuda.is_bf16_supported(False):
            figures[amp] = bench.gpu.measure_in_new_process([*flags, f"--amp={amp}"], 0)
    record_property("table", bench.gpu.format_table(figures, flags))
    for amp, one in figures.items():
        assert one["head_seconds"] < 1.25 * one["cross_entropy_seconds"], amp
        assert one["head_bytes"] < one["cross_entropy_bytes"], amp
        assert 0.1 < one["mfu"] < 1.1, amp
