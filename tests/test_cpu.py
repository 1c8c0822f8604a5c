"""A CPU's kernel and threads are chosen by timing, kept in the checkpoint, and change the result in
rounding only."""

import time

import pytest
import torch

import config
from conftest import SMALL, call, equal_weights, losses, run_main
from model import GPT, GPTConfig
from nanolab import cpu, kernels
from nanolab.checkpoint import read_checkpoint
from nanolab.cpu import CPUPlan

ONE, SHARED = CPUPlan(), CPUPlan(n_threads=2, share_batch=True)


@pytest.fixture(autouse=True)
def threads_as_before():
    before, n_threads = cpu.current, torch.get_num_threads()
    yield
    cpu.use(before)
    torch.set_num_threads(n_threads)


def small_model(**options):
    return GPT(GPTConfig(**{"vocab_size": 257, "block_size": 32, "n_layer": 2, "n_head": 2,
                            "n_embd": 32, "dropout": 0.0, **options}))


@pytest.mark.parametrize("milliseconds, chosen", [
    # oneDNN, one thread, two that share operators, two that share the batch
    ((10, 10, 6, 6), CPUPlan(False, 2, True)),
    ((9.5, 10, 6, 6), CPUPlan(False, 2, True)),  # not worth another result
    ((5, 10, 6, 6), CPUPlan(True, 2, True)),
    ((10, 10, 6, 7), CPUPlan(False, 2, True)),  # sharing is worth a little speed
    ((10, 10, 5, 9), CPUPlan(False, 2, False)),
    ((10, 10, 40, 30), CPUPlan(False, 1)),  # a busy machine
])
def test_the_fastest_way_is_chosen_by_timing(monkeypatch, milliseconds, chosen):
    """A way that changes the bits must be clearly faster; sharing the batch, which a busy core does
    not stop, may be slower."""
    onednn, one, operators, batch = milliseconds

    def step(plan):
        slow = onednn / one if plan.onednn else 1
        time.sleep(slow * (one if plan.n_threads == 1 else batch if plan.share_batch else operators)
                   / 1000)

    monkeypatch.setattr(cpu, "make_trial", lambda *args: step)
    monkeypatch.setattr(kernels, "ONEDNN_AVAILABLE", True)
    monkeypatch.setattr(cpu, "DEFAULT_THREADS", 2)
    plan, _ = cpu.measure(small_model(), config.Config(batch_size=8, dropout=0.0), None)
    assert plan == chosen


@pytest.mark.parametrize("options", [{"dropout": 0.1}, {"compile": True}, {"batch_size": 1}])
def test_no_shared_batch_where_it_would_change_more_than_rounding(monkeypatch, options):
    """Dropout's masks, compiled code and a single sequence have no parts."""
    monkeypatch.setattr(cpu, "DEFAULT_THREADS", 2)
    plan, _ = cpu.measure(small_model(),
                          config.Config(**{"batch_size": 8, "dropout": 0.0, **options}), None)
    assert not plan.share_batch


def test_the_choice_takes_a_second():
    """Also for a model whose own step takes many."""
    model = small_model(n_layer=8, n_head=8, n_embd=512, block_size=1024, vocab_size=20_000)
    start = time.process_time()
    cpu.measure(model, config.Config(batch_size=8, dropout=0.0), None)
    assert time.process_time() - start < 3  # of a loaded core; 0.7 s on a quiet one


def test_shared_batches_compute_the_same():
    """Loss and gradients equal the plain ones to rounding, also of unequal parts, and each time to
    the last bit."""
    model, (inputs, targets) = small_model(), torch.randint(257, (2, 5, 32))

    def loss_and_gradients(plan):
        cpu.use(plan)
        model.zero_grad()
        loss = cpu.share_batches(model, plan)(inputs, targets)
        (loss / 3).backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters())]

    plain, *shared = [loss_and_gradients(plan) for plan in (ONE, *[SHARED] * 5)]
    for a, b in zip(plain, shared[0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    for again in shared[1:]:
        assert all(map(torch.equal, shared[0], again))
    with torch.no_grad():
        assert torch.equal(cpu.share_batches(model, SHARED)(inputs, targets), shared[0][0])


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_resumed_run_keeps_its_plan(small_run, monkeypatch, optimizer):
    """The same bits, although another plan would be the fastest when it goes on."""
    flags = [f"--optimizer={optimizer}", "--save_every=5"]
    monkeypatch.setattr(cpu, "measure", lambda *args: (SHARED, 0.0))
    whole = small_run("whole", *flags)
    half = small_run("half", *flags, "--max_steps=5", "--schedule=constant")
    assert read_checkpoint(half / "last.pt")["cpu_plan"] == vars(SHARED)
    monkeypatch.setattr(cpu, "measure", lambda *args: (ONE, 0.0))
    small_run("half", *flags, "--schedule=constant", "--resume")
    assert cpu.current == SHARED
    assert losses(half) == losses(whole) and equal_weights(half / "last.pt", whole / "last.pt")
    one = small_run("one", *flags)
    assert losses(one) == pytest.approx(losses(whole), rel=1e-4) and losses(one) != losses(whole)


def test_threads_are_printed_and_can_be_set(data_dir, tmp_path):
    """--threads wins over OMP_NUM_THREADS, and over the checkpoint's."""
    flags = [*SMALL, "--dataset=stdlib", f"--data_dir={data_dir}", f"--out_dir={tmp_path}/out"]
    first = call("train.py", *flags, "--threads=2", "--max_steps=5")
    assert "cpu:    2 threads, each with its part of every" in first.stdout
    then = call("train.py", *flags, "--threads=1", "--resume")
    assert "cpu:    1 thread, " in then.stdout
    assert read_checkpoint(tmp_path / "out/last.pt")["cpu_plan"]["n_threads"] == 1


@pytest.mark.parametrize("one, all_threads, chosen", [(10, 5, 2), (10, 9.5, 1), (5, 10, 1)])
def test_a_text_takes_no_more_threads_than_help(small_run, monkeypatch, one, all_threads, chosen):
    """sample.py, by what a token takes with one thread and with all."""
    run = small_run("run", "--max_steps=1")
    milliseconds = {1: one, 2: all_threads}
    monkeypatch.setattr(cpu, "DEFAULT_THREADS", 2)
    monkeypatch.setattr(GPT, "forward", lambda *_: time.sleep(
        milliseconds[torch.get_num_threads()] / 1000))
    run_main(monkeypatch, "sample", "--ckpt", run, "--max_new_tokens=1", "--device=cpu")
    assert torch.get_num_threads() == chosen


def test_a_busy_machine_is_noted(small_run, monkeypatch, capsys):
    monkeypatch.setattr(cpu, "measure", lambda *args: (ONE, 1.6))
    small_run("busy")
    assert "note:   other programs keep 1.6 of" in capsys.readouterr().out
    monkeypatch.setattr(cpu, "measure", lambda *args: (ONE, 0.1))
    small_run("quiet")
    assert "other programs" not in capsys.readouterr().out
