"""The measuring scripts measure. For nanoGPT there is a stand-in."""

import json
from pathlib import Path

import pytest
import torch
import torch._inductor.config

from bench import first_minutes, gpu, nanogpt
from config import Config
from conftest import read_json, run_main
from nanolab.common import UserError
from nanolab.distributed import World
from nanolab.options import load

NANOGPT = """
import types, torch

class GPTConfig(types.SimpleNamespace):
    pass

class GPT(torch.nn.Embedding):
    def __init__(self, config):
        assert (config.n_layer, config.n_embd, config.dropout, config.bias) == (4, 128, 0.0, False)
        super().__init__(config.vocab_size, config.vocab_size)

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.AdamW(self.parameters(), learning_rate, betas, weight_decay=weight_decay)

    def forward(self, x, y):
        assert x.shape == y.shape == (12, 64) and x[0, 1:].equal(y[0, :-1])
        logits = super().forward(x)
        return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())
"""


@pytest.fixture
def quick(monkeypatch, data_dir):
    """Few steps, one thread, the tests' data."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(nanogpt, "DATA_DIR", data_dir)
    monkeypatch.setitem(nanogpt.SHAPES, "4x128", (4, 4, 128, 257, 64, 12, 5))


def test_pairs_with_nanogpt(quick, tmp_path, output_of):
    """It times both sides in processes of their own, prints a table and keeps the figures."""
    (tmp_path / "model.py").write_text(NANOGPT)
    printed = output_of("bench.nanogpt", tmp_path, "--pairs=1", "--shapes", "4x128", "--json",
                        tmp_path / "pairs.json")
    pair, = read_json(tmp_path / "pairs.json")["pairs"]["4x128"]
    rates = [pair[side]["tokens_per_second"] for side in ("nanogpt", "nanolab")]
    assert min(rates) > 0 and all(side["peak_memory_mb"] > 50 for side in pair.values())
    cells = printed.splitlines()[-1].split(" | ")
    assert cells[1:3] == [f"{rate:,.0f}" for rate in rates]
    assert cells[3].startswith(f"{rates[1] / rates[0]:.2f} (")


def test_a_run_with_settings_of_the_compiler(quick):
    """In a process of its own; and one that fails."""
    flags = [*nanogpt.flags_of(nanogpt.shape_of("4x128", "cpu")), "--device=cpu"]
    good = nanogpt.run_nanolab(flags, {"triton.mix_order_reduction": False})
    assert good["tokens_per_second"] > 0 and 3 < good["loss"] < 6 and good["skipped"] == 0
    with pytest.raises(UserError, match="exit code 1: out of memory"):
        nanogpt.run_python("-c", "raise SystemExit('out of memory')")


def test_rates_are_measured():
    world = World(torch.device("cpu"), None)
    assert min(gpu.measure_rates(nanogpt.shape_of("4x128", "cpu"), world, 10**7)) > 0


@pytest.fixture
def fake_gpu(monkeypatch, tmp_path):
    """Rates, and runs of 1,000 tokens/s. -> a list that gets each run's command line"""
    started = []

    def run_python(*command):
        started.append(command)
        config = load(Config, command[command.index("config/bench.py"):])
        if config.fp16_sums:
            raise UserError("out of memory")
        log = [{"step": step, "tokens": 0, "loss": 3.0, "tokens_per_second": 1000.0}
               for step in range(config.max_steps)]
        Path(config.out_dir, "log.jsonl").write_text("".join(f"{json.dumps(x)}\n" for x in log))
        Path(config.out_dir, "summary.json").write_text(
            '{"peak_memory_mb": 5000, "skipped_steps": 0}')
    monkeypatch.setattr(nanogpt, "run_python", run_python)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (25 * 2**30, 25 * 2**30))
    for module in (gpu, first_minutes):
        monkeypatch.setattr(module, "print_rates", lambda shape: gpu.CARDS["H200"])
    monkeypatch.setattr(first_minutes, "describe", lambda device: f"fake {device}")
    monkeypatch.setattr(first_minutes, "matmul_peak", lambda world: (
        1e14 * (1 + torch.backends.cuda.matmul.allow_fp16_accumulation)))
    (tmp_path / "model.py").write_text("")
    return started


def test_limits(fake_gpu, output_of):
    """Those of docs/gpu.md; and the fraction of one that a run reaches."""
    assert "| RTX 3090 | 135.0 | 17.1 | 21.2 | 6.3 | 179.6 | 68,429 |" in output_of(
        "bench.gpu", "--cards")
    limit, run = output_of("bench.gpu").splitlines()[-2:]
    assert "| 572,734 |" in limit and "| 1,000 | 0.00 | 5,000 |" in run


def test_first_minutes(fake_gpu, tmp_path, monkeypatch, capsys):
    """It compiles all variants, then times them in turn, twice. Each row is printed and on disk
    before the next run. Variants and a nanoGPT that fail are rows too."""
    file, names, n_rows = tmp_path / "rows.json", list(first_minutes.VARIANTS), []

    def run_nanogpt(*args):
        n_rows.append(len(read_json(file)["rows"]))
        for line, name, figure in zip(capsys.readouterr().out.splitlines()[-2:], names[-2:],
                                      ("1,000 | 0.00 | 5,000 | 3.0000 | 0", "out of memory")):
            assert line.startswith(f"| {name} | {len(n_rows)} | {figure} |")
        raise UserError("nanoGPT failed")
    monkeypatch.setattr(first_minutes, "run_nanogpt", run_nanogpt)
    run_main(monkeypatch, "bench.first_minutes", f"--nanogpt={tmp_path}", f"--json={file}")
    n = len(names)
    assert ["--max_steps=4" in command for command in fake_gpu] == [True] * n + [False] * 2 * n
    assert n_rows == [n, 2 * n + 1]
    record = read_json(file)
    assert record["conditions"] == "fake cuda" and record["rates"]["products"] == 711
    assert [record["rates"][f"float16, {bits}-bit sums"] for bits in (32, 16)] == [100, 200]
    assert [row["variant"] for row in record["rows"]] == 2 * [*names, "nanoGPT"]
    assert [row["error"] for row in record["rows"] if "error" in row] == [
        "out of memory", "nanoGPT failed"] * 2


def test_variants():
    """The compiler's settings exist; overnight is measured as it is."""
    for _, settings in first_minutes.VARIANTS.values():
        with torch._inductor.config.patch(settings):  # an error for an unknown one
            pass
    overnight = load(Config, ["config/bench.py", *first_minutes.VARIANTS["V6 overnight"][0]])
    as_it_is = load(Config, ["config/overnight_3090.py"])
    for key in ("n_head", "n_embd", "batch_size", "grad_clip", "learning_rate", "tie_weights"):
        assert getattr(overnight, key) == getattr(as_it_is, key)
