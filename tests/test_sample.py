"""Samples, by sample.py and while training; where prompt, weights and vocabulary come from."""

import builtins
import json
import math
import re
import shutil
from unittest.mock import Mock

import pytest
import torch

import model
import nanolab
import sample
from conftest import assert_same_run, call, equal_weights, losses, stop_at
from nanolab import tokenizer
from nanolab.checkpoint import load_model, read_checkpoint
from nanolab.common import UserError
from nanolab.log import having, read_entries
from nanolab.tokenizer import get_tokenizer, gpt2_vocabulary_files


@pytest.fixture
def run(shared_run):
    return shared_run("--max_steps=1", "--sample_prompt=import o")  # it has hardly learned


@pytest.fixture
def text(run, output_of):
    """text(*flags): what sample.py prints."""
    return lambda *flags, ckpt=("--ckpt", run): output_of(
        "sample", *ckpt, "--max_new_tokens=60", "--device=cpu", *flags)


def test_a_sample_depends_on_its_own_seed(text):
    side_by_side = re.split(r"^--- sample \d\n", text("--num_samples=3", "--seed=1"),
                            flags=re.M)[1:]
    assert side_by_side == [text(f"--seed={seed}") for seed in (1, 2, 3)]
    assert len(set(side_by_side)) == 3


def test_prompts(text, run, tmp_path):
    """The run's own is the default; --prompt, a file or standard input give another."""
    assert text().startswith("import o")
    (tmp_path / "prompt.txt").write_text("def é:\n")
    expected = text("--prompt_file", tmp_path / "prompt.txt")
    assert expected.startswith("def é:\n") and expected == text("--prompt=def é:\n")
    with open(tmp_path / "prompt.txt") as file:
        result = call("sample.py", "--ckpt", run, "--prompt_file=-", "--device=cpu",
                      "--max_new_tokens=60", stdin=file, PYTHONIOENCODING="ascii")
    expected = expected.encode("ascii", "backslashreplace").decode()
    assert result.stdout == expected and not result.stderr


def test_nanogpt_flags(text, run, tmp_path):
    """--out_dir, --init_from=resume and --start are --ckpt and --prompt; FILE: reads a file."""
    (tmp_path / "prompt.txt").write_text("12 t")
    expected = text("--prompt=12 t", "--num_samples=2")
    assert expected.count("12 t") == 2
    for flags in ([f"--out_dir={run}", "--init_from=resume", "--start=12 t"],
                  ["--out_dir=elsewhere", f"--init_from={run}",
                   f"--start=FILE:{tmp_path / 'prompt.txt'}"]):
        assert text(*flags, "--num_samples=2", ckpt=()) == expected


def test_typed_prompts(monkeypatch, capsys):
    """A text is continued; an empty line goes on with what was printed, also after Ctrl-C; a prompt
    that the model cannot read is told."""
    asked, typed = [], ["", "ab", "", "é", "", "x", EOFError]

    def stream(text):
        asked.append(text)
        if text == "é":
            raise UserError("no tokens for é")
        yield from ("-", "1" if text == "ab" else "2")
        if text != "x":
            raise KeyboardInterrupt

    monkeypatch.setattr(builtins, "input", Mock(side_effect=typed))
    sample.continue_prompts(stream)
    assert asked == ["ab", "ab-1", "é", "x"]
    assert "-1\n-2\nno tokens for é\n\n-2\n\n" in capsys.readouterr().out


def test_top_k():
    probs = torch.tensor([[0.8, 0.15, 0.05], [0.1, 0.5, 0.4]]).log().repeat(200, 1)
    drawn = model.sample_token(probs, 2, None, torch.Generator().manual_seed(1))
    assert [set(drawn[row::2].tolist()) for row in (0, 1)] == [{0, 1}, {1, 2}]


def test_temperature(run, monkeypatch):
    """Divides the logits."""
    seen, gpt = [], load_model(read_checkpoint(run))
    monkeypatch.setattr(model, "sample_token", lambda logits, *_: (
        seen.append(logits), logits.argmax(-1))[1])
    for temperature in (1.0, 0.5):
        gpt.generate(torch.tensor([[1]]), 1, temperature=temperature)
    assert torch.equal(seen[1], 2 * seen[0])


def test_logits_that_are_not_finite():
    for bad in (math.nan, math.inf):
        with pytest.raises(FloatingPointError, match="not finite"):
            model.check_finite(torch.tensor([[0.0, bad]]))


def test_a_sample_of_the_average(small_run, tiny_data):
    """At the end of a run, it is of the weights that the run leaves."""
    run = small_run("run", *tiny_data, "--tail_average=0.9", "--learning_rate=0.1")
    [entry] = having("sample", read_entries(run / "log.jsonl"))
    lm = nanolab.load(run / "last.pt", "cpu")
    assert entry["sample"] == lm.generate("Every effort moves you", 128, seed=42)


def test_top_p():
    """The most likely tokens, as many as it takes; all at 1, one near 0, each row for itself."""
    probs = torch.tensor([[0.1, 0.5, 0.4], [0.8, 0.15, 0.05]]).log().repeat(200, 1)
    for top_p, expected in ((1e-9, [{1}, {0}]), (0.51, [{1, 2}, {0}]), (0.92, [{0, 1, 2}, {0, 1}]),
                            (1.0, [{0, 1, 2}] * 2), (None, [{0, 1, 2}] * 2)):
        drawn = model.sample_token(probs, None, top_p, torch.Generator().manual_seed(1)).flatten()
        assert [set(drawn[row::2].tolist()) for row in (0, 1)] == expected


def test_options_of_sample(text):
    most_likely = text("--temperature=0")
    assert text("--top_p=1e-6", "--num_samples=2").count(most_likely) == 2
    assert text("--top_k=1") == most_likely != text()
    assert text("--top_p=1") == text("--top_k=999") == text() != text("--top_p=0.3")


def test_tokenizer_of_foreign_weights(text, run, tmp_path):
    """Weights that name no tokenizer are read as what --tokenizer says."""
    torch.save({**read_checkpoint(run), "tokenizer": "unknown"}, tmp_path / "a.pt")
    assert text("--ckpt", tmp_path / "a.pt", "--tokenizer=bytes") == text()


@pytest.mark.parametrize("names", [("vocab.bpe", "encoder.json"), ("merges.txt", "vocab.json")])
def test_vocabulary_from_a_folder(tmp_path, monkeypatch, request, names):
    """GPT-2's two files by their own names, which tiktoken would not find."""
    text = "Été 12\n  spaces, 木<|endoftext|>"
    expected = get_tokenizer("gpt2").encode(text, allowed_special="all")
    for source, name in zip(gpt2_vocabulary_files(), names):
        shutil.copy(source, tmp_path / name)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tokenizer, "reachable", lambda host: False)
    request.addfinalizer(get_tokenizer.cache_clear)
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


def samples(run):
    return {entry["step"]: entry["sample"]
            for entry in having("sample", read_entries(run / "log.jsonl"))}


def test_samples_leave_no_trace(small_run, tiny_data, capsys):
    """In one process or two, with dropout, stopped or not: the bits are those without samples."""
    flags = [*tiny_data, "--batch_size=4", "--eval_every=4", "--max_steps=8"]
    sampling = [*flags, "--sample_every=3", "--sample_prompt=12 t"]
    without, whole = small_run("without", *flags), small_run("whole", *sampling)
    texts = samples(whole)
    assert list(texts) == [3, 6, 8] and len(set(texts.values())) > 1
    assert all(text.startswith("12 t") and len(text) > 9 for text in texts.values())
    assert "step 6, a sample:\n  | 12 t" in capsys.readouterr().out
    parts = small_run("parts", *sampling, on_step=stop_at(4))
    small_run("parts", *sampling, "--resume")
    assert_same_run(whole, parts)
    assert samples(parts) == texts
    assert equal_weights(parts / "last.pt", without / "last.pt")
    assert losses(parts) == losses(without)
    two = small_run("two", *sampling, ranks=2)
    assert losses(two) == pytest.approx(losses(whole), rel=1e-5)
    assert list(samples(two)) == list(texts)


def test_a_model_that_diverged_still_trains(small_run, tiny_data):
    run = small_run("run", *tiny_data, "--learning_rate=1e25", "--sample_every=1", "--max_steps=3")
    assert "no sample" in samples(run)[3]
