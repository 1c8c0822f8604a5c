"""On a GPU: the CPU's numbers in every precision, compiled or not; one wait a step; flash
attention; the head's memory and time; CUDA graphs; resuming; two GPUs.

    python -m pytest -m gpu         # these alone
"""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import nanolab.memory
from conftest import assert_same_run, call, flag_sets, logged, losses, small_model_batch, stop_at
from nanolab.distributed import World
from nanolab.head import HeadLoss

if not torch.cuda.is_available():
    pytest.skip("no CUDA GPU here", allow_module_level=True)

# In one group, so that two processes of pytest-xdist do not share the GPU's memory and time.
pytestmark = [pytest.mark.gpu, pytest.mark.xdist_group("gpu")]

CUDA = torch.device("cuda", 0)
ON_CUDA = ["--device=cuda", "--tf32=False"]  # after SMALL: the last flag counts
FLAG_SETS = [flags | {"dropout": 0.0} for flags in flag_sets(6)]
# The precision, the scale of the loss, and how far the gradients may be from the CPU's in float32.
PRECISIONS = [(None, 1, 1e-4), (torch.bfloat16, 1, 0.05), (torch.float16, 2**12, 0.01)]


@pytest.fixture(autouse=True)
def own_process():
    """Each test starts as in a process of its own, and leaves it so: nothing compiled, full
    float32, waits allowed, any kernel."""
    torch._dynamo.reset()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.use_deterministic_algorithms(False)
    torch.cuda.set_sync_debug_mode("default")


def loss_and_gradients(gpt, loss_of, batch, dtype=None, scale=1):
    """-> the loss, {parameter: gradient in float32 on the CPU}. The loss is scaled for the backward
    pass only."""
    device = next(gpt.parameters()).device
    gpt.zero_grad()
    with World(device, dtype).autocast():
        loss = loss_of(*(tokens.to(device) for tokens in batch))
    (loss * scale).backward()
    return loss.item(), {name: p.grad.cpu() / scale for name, p in gpt.named_parameters()}


def assert_close(ours, theirs, tolerance):
    """Two results of loss_and_gradients: each gradient as a whole, against the largest of all where
    it is nearly 0."""
    assert ours[0] == pytest.approx(theirs[0], rel=tolerance / 10)
    largest = max(grad.norm() for grad in theirs[1].values())
    for name, grad in theirs[1].items():
        assert (ours[1][name] - grad).norm() <= tolerance * (grad.norm() + largest / 100), name


@pytest.mark.parametrize("i", range(6))
@pytest.mark.parametrize("dtype, scale, tolerance", PRECISIONS)
def test_loss_and_gradients_are_the_cpus(i, dtype, scale, tolerance):
    """Eager and, for half of the flags, in one compiled graph; there also in a validation of a
    batch of another size."""
    gpt, batch = small_model_batch(FLAG_SETS[i])
    on_cpu = loss_and_gradients(gpt, gpt, batch)
    gpt.to(CUDA)
    assert_close(loss_and_gradients(gpt, gpt, batch, dtype, scale), on_cpu, tolerance)
    if i % 2:
        compiled = torch.compile(gpt, fullgraph=True)
        for _ in range(2):
            assert_close(loss_and_gradients(gpt, compiled, batch, dtype, scale), on_cpu, tolerance)
        short = [tokens[:3].to(CUDA) for tokens in batch]
        with torch.no_grad(), World(CUDA, dtype).autocast():
            expected = gpt.eval()(*short).item()
            assert compiled(*short).item() == pytest.approx(expected, rel=tolerance / 10)


@pytest.mark.parametrize("amp, optimizer", [("off", "normuon"), ("bfloat16", "muon"),
                                            ("float16", "adamw")])
def test_a_step_waits_once(small_run, amp, optimizer):
    """With micro-steps, dropout, clipping and averaged weights: once all is compiled, a step waits
    as often as one tolist() does."""
    starts = []

    def n_waits():
        return sum("synchronizing" in str(warning.message) for warning in warned)
    with warnings.catch_warnings(record=True, action="always") as warned:
        torch.cuda.set_sync_debug_mode("warn")
        torch.ones(3, device=CUDA).tolist()
        of_tolist = n_waits()
        small_run("run", *ON_CUDA, f"--amp={amp}", f"--optimizer={optimizer}", "--batch_size=2",
                  "--dropout=0.1", "--grad_clip=0.1", "--tail_average=0.9", "--cautious_decay",
                  "--max_steps=8", on_step=lambda step, model: starts.append(n_waits()))
    waits = [end - start for start, end in zip(starts[3:], starts[4:])]
    assert of_tolist > 0 and waits == [of_tolist] * 4


@pytest.mark.skipif(torch.cuda.get_device_capability() < (8, 0),
                    reason="flash attention needs an Ampere GPU or a newer one")
@pytest.mark.parametrize("flags", [{"dropout": 0.1}, FLAG_SETS[1]], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_is_flash(flags, dtype):
    """With all other kernels forbidden, forward and backward passes still run."""
    gpt, batch = small_model_batch({"n_embd": 128, **flags})  # heads of 64, as GPT-2's
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        loss, _ = loss_and_gradients(gpt.to(CUDA), gpt, batch, dtype)
    assert 0 < loss < 20


def test_memory_and_time_of_the_head():
    """Compiled, for a micro-batch of GPT-2 small: the loss of compiled cross_entropy in at most
    1.25 times its time; and at most the logits, their gradient, 16-bit copies and the gradients."""
    N, C, V, P = 12 * 1024, 768, 50257, 50304
    hidden = torch.randn(N, C, device=CUDA, requires_grad=True)
    weight = torch.randn(V, C, device=CUDA).mul_(0.02).requires_grad_()
    targets = torch.randint(V, (N,), device=CUDA)

    def measure(loss_of):
        compiled, times = torch.compile(loss_of, fullgraph=True), []
        for _ in range(8):  # the first compiles
            hidden.grad = weight.grad = None
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            loss = compiled(hidden, weight)
            loss.backward()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        return loss.item(), min(times), torch.cuda.max_memory_allocated() - before
    plain_loss, plain_time, plain_bytes = measure(lambda hidden, weight: F.cross_entropy(
        (hidden.bfloat16() @ weight.bfloat16().T).float(), targets))
    loss, time, n_bytes = measure(lambda hidden, weight: HeadLoss.apply(
        hidden, weight, targets, 0.0, torch.bfloat16, True))
    assert loss == pytest.approx(plain_loss, rel=1e-3)
    assert n_bytes <= 4 * N * P + 8 * C * (N + P) + 2**24 and n_bytes < plain_bytes
    assert time < 1.25 * plain_time


def test_cuda_graphs(small_run):
    """The losses of eager code, with micro-steps, and validations between."""
    flags = [*ON_CUDA, "--amp=off", "--batch_size=2", "--eval_every=2", "--grad_clip=0.1",
             "--max_steps=6", "--tail_average=0.4"]
    eager, graphs = (small_run(compile, *flags, f"--compile={compile}")
                     for compile in ("False", "graphs"))
    for key in ("loss", "val_loss"):
        assert logged(key, graphs) == pytest.approx(logged(key, eager), rel=1e-4)


@pytest.mark.parametrize("amp, optimizer", [("off", "adamw"), ("float16", "adamw"),
                                            ("bfloat16", "muon")])
def test_resume_is_exact(small_run, tiny_data, monkeypatch, amp, optimizer):
    """Bit for bit, where torch uses deterministic kernels only: by default some add up in any
    order."""
    flags = [*tiny_data, *ON_CUDA, "--eval_every=4", "--max_steps=12", f"--amp={amp}",
             f"--optimizer={optimizer}", "--tail_average=0.6"]
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    whole = small_run("whole", *flags)
    parts = small_run("parts", *flags, on_step=stop_at(6))
    small_run("parts", *flags, "--resume")
    assert_same_run(whole, parts)


def test_batch_size_auto(small_run, monkeypatch, capsys):
    """With memory for all it takes the whole part of the process; with less it takes less, and the
    run stays the same."""
    flags = [*ON_CUDA, "--amp=off", "--n_layer=4", "--n_embd=256", "--block_size=256",
             "--global_batch_size=64", "--max_steps=2", "--batch_size=auto"]
    whole = small_run("whole", *flags)
    assert "x 1 micro-steps x batch_size 64" in capsys.readouterr().out
    total = torch.cuda.get_device_properties(CUDA).total_memory
    monkeypatch.setattr(nanolab.memory, "MARGIN", 1 - 400 * 2**20 / total)
    less = small_run("less", *flags)
    assert "x 1 micro-steps x batch_size" not in capsys.readouterr().out
    assert losses(less) == pytest.approx(losses(whole), rel=1e-4)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="only one CUDA GPU here")
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_two_gpus_equal_one(small_run, small_flags, tmp_path, optimizer):
    flags = [*ON_CUDA, "--amp=off", f"--optimizer={optimizer}", "--batch_size=2", "--max_steps=30",
             "--eval_every=15"]
    two = call("train.py", *small_flags("two", *flags), processes=2, timeout=600)
    assert two.returncode == 0, two.stderr
    tolerance = 1e-3 if optimizer == "muon" else 1e-4  # Muon orthogonalises in 16 bits
    assert losses(tmp_path / "two") == pytest.approx(losses(small_run("one", *flags)),
                                                     rel=tolerance)


def test_quickstart(tmp_path, data_dir):
    """Its three commands, with device and precision as they come."""
    best = tmp_path / "out/best.pt"
    for command in (["train.py", "config/quickstart.py", f"--data_dir={data_dir}",
                     f"--out_dir={tmp_path / 'out'}", "--max_steps=200", "--eval_every=100"],
                    ["eval.py", "--ckpt", best], ["sample.py", "--ckpt", best]):
        result = call(*command, timeout=600)
        assert result.returncode == 0 and result.stdout, result.stderr
    assert losses(tmp_path / "out")[-1] < 3
