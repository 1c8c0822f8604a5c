"""The measuring scripts measure. For nanoGPT there is a stand-in."""

import json

import pytest

from conftest import run_main

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
