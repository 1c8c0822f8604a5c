"""Weights by name, and what takes a folder in Hugging Face's layout: eval.py, sample.py and
--init_from. The weights are random ones that transformers makes, so no network is needed."""

import json

import pytest
import torch
from huggingface_hub import constants
from torch import nn

from config import ARCHITECTURE_OPTIONS
from conftest import (assert_same_logits, equal_weights, losses, no_watch, run_main, run_quickly,
                      stop_at)
from model import GPTConfig
from nanolab import huggingface
from nanolab.checkpoint import load_model, read_checkpoint
from nanolab.common import UserError
from nanolab.data import TokenDataset, window_ids
from nanolab.huggingface import read_any
from nanolab.tokenizer import get_tokenizer
from test_weights import MODEL, make_hf_model, shard


def test_weights_of_openai_through_the_cache(tmp_path, monkeypatch):
    """`gpt2` is read from the hub's cache at the pinned revision, without network. If it is not
    there, the error is one line."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    monkeypatch.chdir(tmp_path)
    for answers in (True, False):
        monkeypatch.setattr(huggingface, "reachable", lambda host: answers)
        with pytest.raises(UserError, match="gpt2 is not on this machine and cannot be downloaded"):
            read_any("gpt2")
    snapshots = tmp_path / "models--openai-community--gpt2" / "snapshots"
    hf_model = make_hf_model(snapshots / huggingface.OPENAI_REVISIONS["gpt2"], vocab_size=50257,
                             n_embd=16)
    checkpoint = read_any("gpt2")
    assert (checkpoint["path"], checkpoint["config"]["name"]) == ("gpt2", "gpt2")
    assert_same_logits(load_model(checkpoint), hf_model)


def test_eval_and_sample_take_hugging_face(tmp_path, gpt2_data, monkeypatch, capsys):
    """transformers' loss on the test split, and its greedy text. Nothing is written beside it."""
    folder = tmp_path / "theirs"
    hf_model = make_hf_model(folder, vocab_size=50257, n_embd=16, n_positions=32)
    shard(MODEL)(folder)  # still a model, not a folder of runs
    run_main(monkeypatch, "eval", "--ckpt", folder, "--dataset=words", f"--data_dir={gpt2_data}",
             "--device=cpu", "--json", tmp_path / "result.json")
    result, = json.loads((tmp_path / "result.json").read_text())["runs"]
    dataset = TokenDataset(gpt2_data, "words", "test", 32)
    inputs, targets = dataset.batch(range(len(dataset)))
    with torch.no_grad():
        logits = hf_model(inputs).logits
        expected = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).item()
    assert result["test_loss"] == pytest.approx(expected, abs=1e-4)
    assert {file.name for file in tmp_path.iterdir()} == {"theirs", "result.json"}

    capsys.readouterr()
    run_main(monkeypatch, "sample", "--ckpt", folder, "--prompt=Every effort", "--temperature=0",
             "--max_new_tokens=9", "--device=cpu")
    tokenizer = get_tokenizer("gpt2")
    expected = hf_model.generate(torch.tensor([tokenizer.encode("Every effort")]), do_sample=False,
                                 max_new_tokens=9, eos_token_id=50256)
    assert capsys.readouterr().out == tokenizer.decode(expected[0].tolist()) + "\n"


def test_start_from_weights(tmp_path, data_dir):
    """By config/finetune.py, whose loss falls. Shape, bias, tying and vocabulary are the source's,
    positions are cropped, and the first loss is that of the weights. A stopped run goes on without
    the source. One of our checkpoints is a source too."""
    source = tmp_path / "source"
    make_hf_model(source, scale=0.1, vocab_size=257, nanolab_tokenizer="bytes")

    def run(name, *flags, init_from=source, on_step=no_watch):
        run_quickly(["config/finetune.py", "--dataset=stdlib", f"--data_dir={data_dir}",
                     "--learning_rate=5e-3", "--dropout=0", "--eval_tokens=2048", "--eval_every=0",
                     "--max_steps=10", "--device=cpu", f"--out_dir={tmp_path / name}",
                     f"--init_from={init_from}", *flags], on_step)
        return tmp_path / name

    whole = run("whole", "--block_size=24")
    options = read_checkpoint(whole / "last.pt")["config"]
    expected = GPTConfig(block_size=24, vocab_size=257, n_layer=2, n_head=4, n_embd=32,
                         qkv_bias=True, tie_weights=True)
    for key in ARCHITECTURE_OPTIONS:
        assert options[key] == getattr(expected, key), key
    data = TokenDataset(data_dir, "stdlib", "train", 24)
    batch = data.batch(window_ids("shuffled", 42, len(data), 0, 32))
    with torch.no_grad():
        first_loss = load_model(read_any(source))(*batch).item()
    assert losses(whole)[0] == pytest.approx(first_loss, abs=1e-5)
    assert losses(whole)[-1] < 0.95 * losses(whole)[0]

    parts = run("parts", "--block_size=24", on_step=stop_at(4))
    source.rename(tmp_path / "gone")
    run("parts", "--block_size=24", "--resume")
    assert equal_weights(whole / "last.pt", parts / "last.pt")
    with pytest.raises(UserError, match="another run: init_from was '.*source', is 'gpt2'"):
        run("parts", "--block_size=24", "--resume", init_from="gpt2")

    again = run("again", "--qkv_bias", "--max_steps=1", "--learning_rate=1e-30",
                init_from=whole / "last.pt")
    before, after = (read_checkpoint(folder / "last.pt")["model"] for folder in (whole, again))
    assert all(torch.equal(before[name], after[name]) for name in before)
