"""The measuring scripts measure. For nanoGPT there is a stand-in, for pypi Python's library."""

import json
import re
import shutil

import pytest

from conftest import call

NANOGPT = """
import os, types, torch

class GPTConfig(types.SimpleNamespace):
    pass

class GPT(torch.nn.Embedding):
    def __init__(self, config):
        super().__init__(config.vocab_size, config.vocab_size)
        with open(os.environ["WHAT_WAS_ASKED"], "a") as file:
            file.write(repr(sorted(vars(config).items())))

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.AdamW(self.parameters(), learning_rate, betas, weight_decay=weight_decay)

    def forward(self, x, y):
        assert x.shape == y.shape == (12, 64) and x[0, 1:].equal(y[0, :-1])
        logits = super().forward(x)
        return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())
"""


def test_pairs_with_nanogpt(tmp_path, data_dir):
    """It times both sides in processes of their own, prints a table and keeps the figures."""
    nanogpt = tmp_path / "nanoGPT"
    nanogpt.mkdir()
    (nanogpt / "model.py").write_text(NANOGPT)
    result = call("bench/nanogpt.py", nanogpt, "--pairs=2", "--shapes", "4x128", "--steps=5",
                  "--threads=1", "--biases", f"--data_dir={data_dir}", "--json",
                  tmp_path / "pairs.json", WHAT_WAS_ASKED=str(tmp_path / "asked"))
    assert result.returncode == 0, result.stderr
    pairs = json.loads((tmp_path / "pairs.json").read_text())["pairs"]["4x128"]
    assert len(pairs) == 2
    assert all(side["tokens_per_second"] > 0 and side["peak_memory_mb"] > 50 for pair in pairs
               for side in pair.values())
    ratios = [
        pair["nanolab"]["tokens_per_second"] / pair["nanogpt"]["tokens_per_second"]
        for pair in pairs
    ]
    row = result.stdout.splitlines()[-1]
    assert row.startswith("| 4 x 128, vocabulary 257, context 64, batch 12 |")
    assert f"{sum(ratios) / 2:.2f} ({min(ratios):.2f} to {max(ratios):.2f})" in row
    assert re.search(
        r"threads: 1; 20\d\d-\d\d-\d\d, commit .*, torch .*; pairs: 2, neither compiled",
        result.stdout)
    asked = (tmp_path / "asked").read_text()
    for option in ("('n_layer', 4)", "('n_embd', 128)", "('block_size', 64)", "('vocab_size', 257)",
                   "('dropout', 0.0)", "('bias', True)"):
        assert asked.count(option) == 2


def test_nanogpt_that_is_missing_or_fails(tmp_path, data_dir):
    result = call("bench/nanogpt.py", tmp_path)
    assert result.returncode == 1 and result.stderr.count(
        "\n") == 1 and "no model.py" in result.stderr
    (tmp_path / "model.py").write_text("raise ValueError('not nanoGPT')")
    result = call("bench/nanogpt.py", tmp_path, "--shapes", "4x128", "--steps=5", "--pairs=1",
                  f"--data_dir={data_dir}")
    assert result.returncode == 1 and result.stderr.count(
        "\n") == 1 and "not nanoGPT" in result.stderr


def test_where_a_steps_time_goes(tmp_path):
    """The shares of all kinds of operators add up to 1, and most of it is products."""
    result = call("bench/operators.py", "--shapes", "4x128", "--seconds=0.1", "--json",
                  tmp_path / "operators.json")
    assert result.returncode == 0, result.stderr
    profile = json.loads((tmp_path / "operators.json").read_text())["profiles"]["4x128"]
    shares = profile["shares"]
    assert sum(shares.values()) == pytest.approx(1)
    assert all(shares[kind] > 0 for kind in shares) and shares["products"] > 0.3
    assert f"| {profile['tokens_per_second']:,.0f} |" in result.stdout.splitlines()[-1]


def test_seconds_instead_of_tokens(tmp_path, data_dir):
    """The share of seconds is that of tokens, times the ratio of the two speeds."""
    shutil.copytree(f"{data_dir}/stdlib", tmp_path / "pypi")
    result = call("bench/seconds.py", "--sizes", "2x32", "--repeats=1", "--steps=8",
                  f"--data_dir={tmp_path}", "--json", tmp_path / "seconds.json")
    assert result.returncode == 0, result.stderr
    speeds = json.loads((tmp_path / "seconds.json").read_text())["tokens_per_second"]["2x32"]
    share, of_seconds = map(float, result.stdout.splitlines()[-1].split(" | ")[3:5])
    assert of_seconds == pytest.approx(share * speeds["published"][0] / speeds["modern"][0],
                                       rel=0.02)
