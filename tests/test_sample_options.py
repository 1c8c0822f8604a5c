"""sample.py: what it draws from, and where prompt, weights and vocabulary come from."""

import json
import re
import shutil

import pytest
import torch
from conftest import call, run_main

import model
from nanolab import tokenizer
from nanolab.checkpoint import read_checkpoint
from nanolab.common import UserError
from nanolab.tokenizer import get_tokenizer, gpt2_vocabulary_files


@pytest.fixture
def sample(small_run, monkeypatch, capsys):
    """sample(*flags): what sample.py prints, from a run that has hardly learned."""
    run = small_run("run", "--max_steps=1")

    def run_sample(*flags):
        capsys.readouterr()
        run_main(monkeypatch, "sample", "--ckpt", run, "--prompt=def main", "--max_new_tokens=60",
                 "--device=cpu", *flags)
        return capsys.readouterr().out
    return run_sample


def test_top_p():
    """The likeliest tokens, as many as it takes; all at 1, one near 0, each row for itself."""
    probs = torch.tensor([[0.1, 0.5, 0.4], [0.8, 0.15, 0.05]])

    def drawn(top_p):
        draw = torch.Generator().manual_seed(1)
        rows = [model.sample_token(probs.log(), None, top_p, draw).tolist() for _ in range(200)]
        return [set(column) for column in zip(*rows)]

    assert drawn(1e-9) == [{1}, {0}]
    assert drawn(0.51) == [{1, 2}, {0}]
    assert drawn(0.92) == [{0, 1, 2}, {0, 1}]
    assert drawn(None) == drawn(1.0) == [{0, 1, 2}] * 2


def test_options_of_sample(sample):
    """By the command line: a run's folder, top_p, and defaults that --help shows."""
    assert sample("--top_p=1e-6", "--num_samples=2").count(sample("--temperature=0")) == 2
    assert sample("--top_p=1") == sample() != sample("--top_p=0.3")
    text = call("sample.py", "--help").stdout
    for option in re.findall(r"^  --\w+", text, re.M):
        assert re.search(rf"^  {option.strip()}\b(?:(?!^  -).)*default", text, re.M | re.S), option


def test_prompt_from_a_file(sample, tmp_path, small_run):
    (tmp_path / "prompt.txt").write_text("def é:\n")
    text = sample("--prompt_file", tmp_path / "prompt.txt")
    assert text.startswith("def é:\n") and text == sample("--prompt=def é:\n")
    with open(tmp_path / "prompt.txt") as file:
        result = call("sample.py", "--ckpt", tmp_path / "run", "--prompt_file=-", "--device=cpu",
                      "--max_new_tokens=60", stdin=file)
    assert result.stdout == text


def test_tokenizer_of_foreign_weights(sample, tmp_path):
    """Weights that name no tokenizer are read as what --tokenizer says."""
    expected = sample()
    path = tmp_path / "run" / "best.pt"
    torch.save({**read_checkpoint(path), "tokenizer": "unknown"}, path)
    assert sample("--tokenizer=bytes") == expected


@pytest.mark.parametrize("names", [("vocab.bpe", "encoder.json"), ("merges.txt", "vocab.json")])
def test_vocabulary_from_a_folder(tmp_path, monkeypatch, names):
    """GPT-2's two files by their own names, which tiktoken would not find."""
    text = "Été 12\n  spaces, 木<|endoftext|>"
    ours = get_tokenizer("gpt2")
    expected = ours.encode(text, allowed_special="all")
    for source, name in zip(gpt2_vocabulary_files(), names):
        shutil.copy(source, tmp_path / name)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tokenizer, "reachable", lambda host: False)
    get_tokenizer.cache_clear()
    found = get_tokenizer("gpt2")
    assert found.encode(text, allowed_special="all") == expected and found.decode(expected) == text
    assert (found.n_vocab, found.eot_token) == (50257, 50256)
    assert len(list(tmp_path.iterdir())) == 2, "and nothing is written there"

    words = json.loads((tmp_path / names[1]).read_text())
    words["a"], words["b"] = words["b"], words["a"]
    (tmp_path / names[1]).write_text(json.dumps(words))
    get_tokenizer.cache_clear()
    with pytest.raises(UserError, match=f"{names[1]} is damaged, or not GPT-2's vocabulary"):
        get_tokenizer("gpt2")
    get_tokenizer.cache_clear()
