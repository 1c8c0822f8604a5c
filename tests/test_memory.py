"""What fits in memory, and what a timing run reports."""

import os
import re
import subprocess
import sys
import types

import pytest
import torch

import nanolab.runlog
import train
from conftest import HERE, SMALL, call, equal_weights, losses, write_script
from model import GPT, GPTConfig
from nanolab.checkpoint import read_checkpoint
from nanolab.memory import count_training_memory


def test_batch_size_auto(small_run):
    """It takes the whole share of a process where memory allows, and does not change the run."""
    auto = small_run("auto", "--batch_size=auto")
    assert read_checkpoint(auto / "last.pt")["config"]["batch_size"] == 8
    assert losses(auto) == losses(small_run("eight"))


LIMIT_MEMORY = """
import resource
real = train.largest_batch_size

def largest_batch_size(*args):
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 60 * 2**20, resource.RLIM_INFINITY))
    try:
        return real(*args)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

train.largest_batch_size = largest_batch_size
train.main()
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"),
                    reason="only Linux limits a process's memory")
def test_batch_size_auto_under_a_limit(small_run, tmp_path, data_dir):
    """With too little memory for its whole share a process takes less at once, and the run stays
    the same."""
    flags = ["--n_embd=128", "--block_size=128", "--global_batch_size=64", "--max_steps=2"]
    script = write_script(tmp_path / "limit.py", LIMIT_MEMORY)
    result = call(script, *SMALL, "--dataset=stdlib", f"--data_dir={data_dir}",
                  f"--out_dir={tmp_path / 'auto'}", *flags, "--batch_size=auto")
    assert result.returncode == 0, result.stderr
    assert 1 <= read_checkpoint(tmp_path / "auto/last.pt")["config"]["batch_size"] < 64
    assert losses(tmp_path / "auto") == pytest.approx(
        losses(small_run("whole", *flags, "--batch_size=64")), rel=1e-5)


LESS_MEMORY_ON_ONE_RANK = """
import nanolab.memory
real = nanolab.memory.step_fits

def step_fits(model, dataset, size, *args):
    return real(model, dataset, size, *args) and (size <= 2 or os.environ["RANK"] == "0")

nanolab.memory.step_fits = step_fits
train.main()
"""


def test_ranks_agree_on_the_batch_size(small_run, tmp_path, data_dir):
    """A batch size that does not fit on one of two ranks is used on neither."""
    script = write_script(tmp_path / "less.py", LESS_MEMORY_ON_ONE_RANK)
    auto, one = tmp_path / "auto", small_run("one", "--max_steps=2")
    result = call(script, *SMALL, "--dataset=stdlib", f"--data_dir={data_dir}", f"--out_dir={auto}",
                  "--max_steps=2", "--batch_size=auto", processes=2)
    assert result.returncode == 0, result.stderr
    assert read_checkpoint(auto / "last.pt")["config"]["batch_size"] == 2
    assert losses(auto) == pytest.approx(losses(one), rel=1e-5)


def test_a_trial_changes_nothing(small_run):
    """Of the weights, the optimiser and a resumed run; Muon's state too is made and goes again."""
    for optimizer in ("adamw", "muon"):
        flags = [f"--optimizer={optimizer}", "--weight_decay=0.5"]
        whole = small_run(f"{optimizer}", *flags)
        small_run(f"{optimizer}_auto", *flags, "--batch_size=auto", "--max_steps=4")
        auto = small_run(f"{optimizer}_auto", *flags, "--batch_size=auto", "--resume")
        assert equal_weights(whole / "last.pt", auto / "last.pt")


def test_what_fits_is_the_docs_table():
    """The batch sizes by card in docs/speed.md: the largest whose count_training_memory is at most
    90 % of it, which is also where batch_size=auto begins to try."""
    gpt = GPT(GPTConfig(dropout=0.0))
    count = {size: count_training_memory(gpt, size, torch.bfloat16) for size in (8, 9, 12)}
    each = count[9] - count[8]  # of fewer sequences the MLP stores more
    assert count[12] == count[8] + 4 * each, "it grows by the same for each sequence"
    assert count[
        8] > 16 * gpt.num_params() + 8 * 1024 * 768 * 12 * 2, "more than an activation a layer"
    fits = {
        card: int((0.9 * card * 2**30 - count[8]) // each) + 8
        for card in (8, 12, 16, 24, 40, 80)
    }
    text = (HERE / "docs/speed.md").read_text()
    rows = re.findall(r"^\| (\d+) GiB \| (\d+) \|", text, re.MULTILINE)
    assert {int(card): int(size) for card, size in rows} == fits, (
        f"{count[8] / 2**20:.0f} MiB for 8 sequences, {each / 2**20:.0f} MiB more for each other")
    assert f"{each / 2**20:.0f} MiB a sequence" in text


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"),
                    reason="reads a process's memory as Linux shows it")
def test_freed_memory_is_kept():
    code = """if True:
        import torch, nanolab.devices
        def left_by_a_large_tensor():
            memory = lambda: int(open("/proc/self/statm").read().split()[1]) * 4096
            before = memory()
            torch.ones(2**26)  # 256 MiB
            return memory() - before
        given_back = left_by_a_large_tensor()
        nanolab.devices.init_distributed("cpu")
        print(given_back, left_by_a_large_tensor())"""
    result = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
    given_back, kept = map(int, result.stdout.split())
    assert given_back < 2**26 < 2**27 < kept


def test_timed_seconds(small_run, monkeypatch):
    """Tokens per second are those of the steps after the first, without validations and samples:
    here a clock counts 100 s for the first step, 1 s for each later one and 1,000 s for each of the
    others."""
    now = [0.0]

    def advance(seconds, value):
        now[0] += seconds
        return value

    monkeypatch.setattr(nanolab.runlog, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(train, "learning_rate_at",
                        lambda step, *args: advance(1 if step else 100, 1e-3))
    monkeypatch.setattr(train, "mean_loss", lambda *args: advance(1000, 3.0))
    monkeypatch.setattr(train, "make_sampler", lambda *args: lambda: advance(1000, "text"))
    run = small_run("run", "--max_steps=4", "--eval_every=1", "--sample_every=2")
    state = read_checkpoint(run / "last.pt")
    assert (state["timed_tokens"], state["timed_seconds"]) == (3 * 8 * 32, 3)
    assert state["seconds"] == 100 + 3 + (4 + 2) * 1000


def test_bench(tmp_path):
    """A timing run needs no data and keeps no weights, so a second one may follow; the last line
    has its figures."""
    flags = ["--n_layer=2", "--n_head=2", "--n_embd=64", "--block_size=32", "--vocab_size=300",
             "--max_steps=30", "--batch_size=8", "--global_batch_size=8", "--device=cpu"]
    for _ in range(2):
        result = call("train.py", "config/bench.py", *flags, f"--data_dir={tmp_path / 'none'}",
                      f"--out_dir={tmp_path / 'out'}")
        assert result.returncode == 0, result.stderr
    numbers = re.search(
        r"speed:  ([\d,.]+) tokens/s, ([\d.]+) GFLOP/s of the ([\d.,]+) .* \(([\d.]+)%\); "
        r"peak memory ([\d,]+) MB; ([\d.]+)% of the time outside", result.stdout)
    rate, done, peak, share, megabytes, outside = (float(number.replace(",", ""))
                                                   for number in numbers.groups())
    assert done == pytest.approx(rate * GPT(GPTConfig(300, 32, 2, 2, 64)).flops_per_token() / 1e9,
                                 rel=0.05, abs=0.06)
    assert share == pytest.approx(100 * done / peak, rel=0.1,
                                  abs=0.2) and 50 < megabytes < 4000 and 0 < outside < 20
    assert sorted(file.name
                  for file in (tmp_path / "out").iterdir()) == ["log.jsonl", "summary.json"]
