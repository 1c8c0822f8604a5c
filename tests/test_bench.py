"""The measuring scripts measure. For nanoGPT there is a stand-in."""

import argparse
import json
import subprocess
from pathlib import Path

import pytest
import torch
import torch._inductor.config

from bench import first_minutes
from bench.nanogpt import shape_of
from config import Config
from conftest import run_main
from nanolab.common import UserError
from nanolab.options import load

NANOGPT = """
import types, torch

class GPTConfig(types.SimpleNamespace):
    pass

class GPT(torch.nn.Embedding):
    def __init__(self, config):
        assert (config.n_layer, config.n_embd, config.dropout, config.bias) == (4, 128, 0.0, True)
        super().__init__(config.vocab_size, config.vocab_size)

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.AdamW(self.parameters(), learning_rate, betas, weight_decay=weight_decay)

    def forward(self, x, y):
        assert x.shape == y.shape == (12, 64) and x[0, 1:].equal(y[0, :-1])
        logits = super().forward(x)
        return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())
"""


def run_bench(monkeypatch, capsys, script, *argv):
    """-> the lines that it prints"""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # which it may set
    run_main(monkeypatch, f"bench.{script}", "--steps=5", *argv)
    return capsys.readouterr().out.splitlines()


def test_pairs_with_nanogpt(tmp_path, data_dir, monkeypatch, capsys):
    """It times both sides in processes of their own, prints a table and keeps the figures."""
    (tmp_path / "model.py").write_text(NANOGPT)
    lines = run_bench(monkeypatch, capsys, "nanogpt", tmp_path, "--pairs=1", "--shapes", "4x128",
                      "--threads=1", "--biases", f"--data_dir={data_dir}", "--json",
                      tmp_path / "pairs.json")
    pair, = json.loads((tmp_path / "pairs.json").read_text())["pairs"]["4x128"]
    rates = [pair[side]["tokens_per_second"] for side in ("nanogpt", "nanolab")]
    assert min(rates) > 0 and all(side["peak_memory_mb"] > 50 for side in pair.values())
    cells = lines[-1].split(" | ")
    assert cells[1:3] == [f"{rate:,.0f}" for rate in rates]
    assert cells[3].startswith(f"{rates[1] / rates[0]:.2f} (")


def test_gpu_on_a_cpu(data_dir, monkeypatch, capsys):
    """It measures rates and a run, next to a limit that it calls none."""
    lines = run_bench(monkeypatch, capsys, "gpu", "--device=cpu", f"--data_dir={data_dir}")
    assert any("Its limit below is none" in line for line in lines)
    limit, run = [line.split("|") for line in lines[-2:]]
    fraction = float(run[7].replace(",", "")) / float(limit[7].replace(",", ""))
    assert fraction > 0 and float(run[8]) == pytest.approx(fraction, abs=0.01)


@pytest.fixture
def fake_gpu(monkeypatch):
    """For first_minutes.py. -> a list that gets each run's Config and the compiler's settings"""
    started = []

    def run(command, **options):
        settings, config = json.loads(command[3]), load(Config, command[4:])
        for name in settings:
            getattr(torch._inductor.config, name)  # AttributeError for an unknown one
        started.append((config, settings))
        if config.fp16_sums:
            return subprocess.CompletedProcess(command, 1, "", "Traceback\nout of memory\n")
        log = [{"step": step, "loss": 3.0, "tokens_per_second": 1000.0}
               for step in range(config.max_steps)]
        Path(config.out_dir, "log.jsonl").write_text("".join(f"{json.dumps(x)}\n" for x in log))
        Path(config.out_dir, "summary.json").write_text(
            '{"peak_memory_mb": 5000, "skipped_steps": 0}')
        return subprocess.CompletedProcess(command, 0, "", "")
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (25 * 2**30, 25 * 2**30))
    for name, fake in {"pick_device": torch.device, "describe": lambda device: f"fake {device}",
                       "World": lambda device, dtype: None,
                       "autocast_dtype": lambda amp, device: None,
                       "measure_rates": lambda shape, world: (700.0, 300.0, 230.0, 4000.0)}.items():
        monkeypatch.setattr(first_minutes, name, fake)
    return started


def test_first_minutes_on_a_fake_gpu(fake_gpu, tmp_path, monkeypatch, capsys):
    """It compiles all variants, then times them in turn, twice. Each row is printed and on disk
    before the next run. Variants and a nanoGPT that fail are rows too."""
    nanogpt, rows, before = tmp_path / "model.py", tmp_path / "rows.json", []
    nanogpt.write_text("")

    def run_nanogpt(*args):
        before.append((len(json.loads(rows.read_text())["rows"]),
                       capsys.readouterr().out.splitlines()[-1]))
        raise UserError("nanoGPT failed")
    monkeypatch.setattr(first_minutes, "run_nanogpt", run_nanogpt)
    lines = run_bench(monkeypatch, capsys, "first_minutes", f"--nanogpt={tmp_path}", "--steps=9",
                      f"--data_dir={tmp_path}", f"--json={rows}")
    names = [*first_minutes.VARIANTS, *first_minutes.SMALL_VARIANTS]
    steps = [config.max_steps for config, _ in fake_gpu]
    assert steps == [2] * len(names) + [9] * 2 * len(names)
    timed = [(vars(config) | {"out_dir": ""}, settings) for config, settings in fake_gpu]
    half = len(names)
    assert timed[half:2 * half] == timed[2 * half:]
    assert [n for n, _ in before] == [half, half + 1, 2 * half + 2, 2 * half + 3]
    assert before[0][1].startswith(f"| {names[-1]} | 1,000 |")
    assert lines[-1].startswith("| nanoGPT with biases | nanoGPT failed |")
    record = json.loads(rows.read_text())
    assert record["conditions"] == "fake cuda" and record["rates"]["products"] == 700.0
    assert [row["variant"] for row in record["rows"]] == 2 * [*names, "nanoGPT",
                                                              "nanoGPT with biases"]
    by_name = {row["variant"]: row for row in record["rows"]}
    assert by_name["V7 16-bit sums"] == {"variant": "V7 16-bit sums", "turn": 2,
                                         "error": "out of memory"}
    assert by_name["V0 as it is"]["tokens_per_second"] == 1000.0


def test_a_run_of_first_minutes(data_dir, tmp_path):
    """A real one, in a process of its own; and one that cannot be."""
    args = argparse.Namespace(device="cpu", data_dir=data_dir)
    flags = [f"--{key}={value}" for key, value in shape_of("4x128", 4, 6).items()]
    good, bad = (first_minutes.run_variant([*flags, *more], {"triton.mix_order_reduction": False}, 6,
                                           args) for more in ([], ["--n_head=3"]))
    assert good["tokens_per_second"] > 0 and 5 < good["loss"] < 7 and good["skipped"] == 0
    assert list(bad) == ["error"] and "n_head" in bad["error"]
