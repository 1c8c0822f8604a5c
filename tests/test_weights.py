"""Weights in: a folder in Hugging Face's layout gives transformers' logits or one true line; so do
OpenAI's names and nanoGPT's ckpt.pt. The weights are random, so no network is needed."""

import argparse
import json
import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from torch import nn

from config import ARCHITECTURE_OPTIONS
from conftest import (assert_same_logits, equal_weights, losses, no_watch, read_json, run_main,
                      run_quickly, stop_at)
from model import GPTConfig
from nanolab import huggingface
from nanolab.checkpoint import load_model, read_checkpoint
from nanolab.common import UserError
from nanolab.data import TokenDataset, window_ids
from nanolab.huggingface import read_any
from nanolab.tokenizer import get_tokenizer, gpt2_vocabulary_files

MODEL, PICKLE = "model.safetensors", "pytorch_model.bin"


def make_hf_model(folder, scale=0.5, **options):
    """A GPT2LMHeadModel with random weights and biases, saved in a folder. -> the model."""
    import transformers  # here: it takes seconds
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    options = {"vocab_size": 300, "n_positions": 48, "n_embd": 32, "n_layer": 2, "n_head": 4,
               "eos_token_id": 0, "bos_token_id": 0, **options}
    hf_model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**options)).eval()
    generator = torch.Generator().manual_seed(1)
    for p in hf_model.parameters():
        nn.init.normal_(p, std=scale, generator=generator)
    hf_model.save_pretrained(folder)
    return hf_model


# --- changes to such a folder: functions of its path

def weights(change):
    """change: {name: tensor} -> {name: tensor}"""
    def apply(folder):
        new = {name: tensor.clone() for name, tensor in change(load_file(folder / MODEL)).items()}
        save_file(new, folder / MODEL, metadata={"format": "pt"})
    return apply


def plus(**tensors):
    return weights(lambda w: w | {name.replace("__", "."): t for name, t in tensors.items()})


def head(factor):
    return weights(lambda w: w | {"lm_head.weight": factor * w["transformer.wte.weight"]})


def cast(dtype, part):
    return weights(lambda w: {name: t.to(dtype) if part in name else t for name, t in w.items()})


def config(**values):
    def apply(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(read_json(path) | values))
    return apply


def pickle(change):
    def apply(folder):
        torch.save(change(load_file(folder / MODEL)), folder / PICKLE)
        (folder / MODEL).unlink()
    return apply


def shard(kind, keep=False):
    """Two shards with an index, in which the last of three is a leftover; without model.safetensors
    unless it is kept."""
    def apply(folder):
        items = list(load_file(folder / MODEL).items())
        parts = [dict(items[:9]), dict(items[9:]), {"transformer.wte.weight": torch.zeros(300, 32)}]
        names = [f"shard-{i}{Path(kind).suffix}" for i in (1, 2, 3)]
        for name, part in zip(names, parts):
            (torch.save if kind == PICKLE else save_file)(part, folder / name)
        index = {name: names[i >= 9] for i, (name, _) in enumerate(items)}
        index = {"metadata": {}, "weight_map": index}
        (folder / f"{kind}.index.json").write_text(json.dumps(index))
        if not keep:
            (folder / MODEL).unlink()
    return apply


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


READ = {
    "safetensors": [],
    "safetensors by index": [shard(MODEL)],
    "pickle": [pickle(dict)],
    "pickles by index": [shard(PICKLE)],
    "one file before others": [shard(MODEL, keep=True), write(f"{MODEL}.index.json", "{"),
                               write(PICKLE, "no weights")],
    "index before a pickle": [write(PICKLE, "no weights"), shard(MODEL)],
    "old: no prefix, masks, few keys": [
        plus(transformer__h__1__attn__bias=torch.ones(48),
             transformer__h__0__attn__masked_bias=torch.tensor(-1e4)),
        weights(lambda w: {name.removeprefix("transformer."): t for name, t in w.items()}),
        write("config.json", json.dumps({
            "model_type": "gpt2", "vocab_size": 300, "n_positions": 48, "n_ctx": 48, "n_embd": 32,
            "n_layer": 2, "n_head": 4}))],
    "head alone": [weights(lambda w: {name.replace("transformer.wte", "lm_head"): t
                                      for name, t in w.items()})],
    "equal head": [head(1)],
    "other head than the config says": [head(0.5)],
    "untied": [head(-1), config(tie_word_embeddings=False)],
    "float16": [cast(torch.float16, "")],
    "bfloat16 embeddings": [cast(torch.bfloat16, "wte")],
    "defaults said": [config(n_inner=128, reorder_and_upcast_attn=True)],
    **{name: [config(activation_function=name)] for name in (
        "gelu", "gelu_python", "gelu_fast", "gelu_pytorch_tanh")}}

REFUSED = {
    "no weights": ([lambda folder: (folder / MODEL).rename(folder / "model.fp16.safetensors")],
                   f"has none of {MODEL}, {MODEL}.index.json, {PICKLE}, "),
    "a missing shard": ([shard(MODEL), lambda folder: (folder / "shard-2.safetensors").unlink()],
                        "shard-2.safetensors is damaged (No such file"),
    "a damaged index": ([shard(MODEL), write(f"{MODEL}.index.json", "[1]")], "json is damaged"),
    "a damaged config": ([write("config.json", "{")], "config.json is damaged"),
    "a pointer": ([write(MODEL, "version https://git-lfs.github.com/spec/v1\nsize 12\n")],
                  f"{MODEL} is damaged"),
    "code": ([pickle(lambda w: w | {"args": argparse.Namespace()})],
             f"{PICKLE} holds a argparse.Namespace; nanolab loads only"),
    "nested": ([pickle(lambda w: {"state_dict": w})], f"{PICKLE} does not contain weights"),
    "an adapter": ([write("adapter_config.json", "{}")], "has an adapter"),
    "a head's bias": ([plus(lm_head__bias=torch.ones(300))], 'Unexpected key(s) in state_dict: "h'),
    "no head": ([config(tie_word_embeddings=False)], 'Missing key(s) in state_dict: "head.weight"'),
    "padded vocabulary": ([config(vocab_size=304)], "size mismatch for wte.weight"),
    "integers": ([cast(torch.int8, "ln_f")], "has weights that are not finite (ln_f."),
    "not finite": ([plus(transformer__ln_f__bias=torch.full((32,), torch.nan))],
                   "has weights that are not finite (ln_f.bias)"),
    "no type": ([write("config.json", "{}")], "neither a run with best.pt or last.pt nor a model"),
    "own options": ([config(model_type="nanolab", nanolab_options=["mine"], mine=1)],
                    "has the option mine, which this nanolab does not have"),
    "no options": ([config(model_type="nanolab")], "config.json is damaged"),
    "no width": ([config(n_embd=None)], "config.json is damaged"),
    "heads": ([config(n_head=3, num_attention_heads=3)], "n_embd=32, n_head=3"),
    "a word": ([config(n_layer="2")], "n_layer='2'"),
    **{f"{key}={value}": ([config(**{key: value})], f"has {key}={value!r}; nanolab's model has")
       for key, value in {
           "model_type": "gptj", "n_inner": 64, "activation_function": "relu",
           "layer_norm_epsilon": 1e-6, "scale_attn_weights": False, "add_cross_attention": True,
           "scale_attn_by_inverse_layer_idx": True, "num_attention_heads": 2,
           "quantization_config": {"bits": 8}, "transformers_weights": "a.bin",
           "auto_map": {"AutoModelForCausalLM": "a.B"}}.items()}}


@pytest.mark.parametrize("kind", READ)
def test_what_transformers_reads(tmp_path, kind):
    """Every tensor that transformers needs is there, and we have its logits, in float32."""
    from transformers import AutoModelForCausalLM
    make_hf_model(tmp_path)
    for change in READ[kind]:
        change(tmp_path)
    theirs, found = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32,
                                                         output_loading_info=True)
    assert not found["missing_keys"]
    checkpoint = read_any(tmp_path)
    assert checkpoint["tokenizer"] == "unknown"
    assert_same_logits(load_model(checkpoint), theirs)


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_refused(tmp_path, kind):
    """Because transformers does not read it, or our model does not compute it; in one line."""
    changes, line = REFUSED[kind]
    make_hf_model(tmp_path)
    for change in changes:
        change(tmp_path)
    with pytest.raises(UserError, match=re.escape(line)) as error:
        load_model(read_any(tmp_path))
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("files, vocab_size, expected", [
    ({}, 300, "unknown"),
    ({}, 50257, "gpt2"),  # a guess
    ({"vocab.json": None}, 50260, "gpt2"),  # added tokens
    ({"vocab.json": '{"a": 0}'}, 50257, "unknown"),
    ({"tokenizer.json": '{"model": {"vocab": {"a": 0}}}'}, 50257, "unknown"),
    ({"tokenizer.json": '{"model": {"vocab": [["a", -1.5]]}}'}, 50257, "unknown")])
def test_vocabulary(tmp_path, files, vocab_size, expected):
    """Only GPT-2's own is taken for GPT-2's, so no other model's tokens are shown as its words."""
    make_hf_model(tmp_path, vocab_size=vocab_size, n_embd=8, n_layer=1)
    for name, text in files.items():
        (tmp_path / name).write_text(text or gpt2_vocabulary_files()[1].read_text())
    assert read_any(tmp_path)["tokenizer"] == expected


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


# --- what takes them

def test_eval_and_sample(tmp_path, gpt2_data, output_of):
    """transformers' loss on the test split, and its greedy text. Nothing is written beside it."""
    folder, result = tmp_path / "theirs", tmp_path / "result.json"
    hf_model = make_hf_model(folder, vocab_size=50257, n_embd=16, n_positions=32)
    shard(MODEL)(folder)  # still a model, not a folder of runs
    output_of("eval", "--ckpt", folder, *gpt2_data, "--device=cpu", "--json", result)
    dataset = TokenDataset(gpt2_data[1].removeprefix("--data_dir="), "words", "test", 32)
    inputs, targets = dataset.batch(range(len(dataset)))
    with torch.no_grad():
        expected = nn.functional.cross_entropy(hf_model(inputs).logits.transpose(1, 2), targets)
    [run] = read_json(result)["runs"]
    assert run["test_loss"] == pytest.approx(expected.item(), abs=1e-4)
    assert run["bits_per_byte"] < run["test_loss"]  # a token has 2 bytes or more
    assert {file.name for file in tmp_path.iterdir()} == {"theirs", "result.json"}

    text = output_of("sample", "--ckpt", folder, "--prompt=Every effort", "--temperature=0",
                     "--max_new_tokens=9", "--device=cpu")
    tokenizer = get_tokenizer("gpt2")
    expected = hf_model.generate(torch.tensor([tokenizer.encode("Every effort")]), do_sample=False,
                                 max_new_tokens=9, eos_token_id=50256)
    assert text == tokenizer.decode(expected[0].tolist()) + "\n"


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
                     "--block_size=24", f"--init_from={init_from}", *flags], on_step)
        return tmp_path / name

    whole = run("whole")
    expected = GPTConfig(block_size=24, vocab_size=257, n_layer=2, n_head=4, n_embd=32,
                         qkv_bias=True, tie_weights=True)
    options = read_checkpoint(whole / "last.pt")["config"]
    assert all(options[key] == getattr(expected, key) for key in ARCHITECTURE_OPTIONS)
    data = TokenDataset(data_dir, "stdlib", "train", 24)
    batch = data.batch(window_ids("shuffled", 42, len(data), 0, 32))
    with torch.no_grad():
        first_loss = load_model(read_any(source))(*batch).item()
    assert losses(whole)[0] == pytest.approx(first_loss, abs=1e-5)
    assert losses(whole)[-1] < 0.95 * losses(whole)[0]

    parts = run("parts", on_step=stop_at(4))
    source.rename(tmp_path / "gone")
    run("parts", "--resume")
    assert equal_weights(whole / "last.pt", parts / "last.pt")
    with pytest.raises(UserError, match="another run: init_from was '.*source', is 'gpt2'"):
        run("parts", "--resume", init_from="gpt2")

    with pytest.raises(UserError, match="head_lr=2.0 has no effect: the head of init_from="):
        run("tied", "--head_lr=2", init_from=whole / "last.pt")
    with pytest.raises(UserError, match="block_size=48 was asked for, but .* has block_size=24"):
        run("longer", "--block_size=48", init_from=whole / "last.pt")
    again = run("again", "--max_steps=1", "--learning_rate=1e-30", init_from=whole / "last.pt")
    before, after = (read_checkpoint(folder / "last.pt")["model"] for folder in (whole, again))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_run_without_best(tmp_path, gpt2_data, small_run, monkeypatch, capsys):
    """A run that stopped before its first validation has last.pt only: that is taken, and said, by
    its folder's name, best.pt's, or that of a folder of runs."""
    run = small_run("run", *gpt2_data, on_step=stop_at(3))
    assert (run / "last.pt").exists() and not (run / "best.pt").exists()
    for script, *argv in (("sample", "--device=cpu", "--max_new_tokens=3", "--ckpt", run),
                          ("eval", "--device=cpu", "--ckpt", tmp_path),
                          ("nanolab.huggingface", "export", run / "best.pt", tmp_path / "hf")):
        capsys.readouterr()
        run_main(monkeypatch, script, *argv)
        printed = capsys.readouterr()
        assert printed.err.count(f"there is no {run}/best.pt, so this is {run}/last.pt\n") == 1
    assert "last.pt, step 4" in printed.out
    assert (run / "last.test.json").exists() and not (run / "best.test.json").exists()


# --- nanoGPT

def make_nanogpt(folder, has_bias=False, prefix="", extra=(), untied=False, vocab_size=65, **args):
    """Writes a ckpt.pt as nanoGPT's, with matrices as (out, in). -> transformers' GPT-2 with the
    same weights"""
    theirs = make_hf_model(folder / "theirs", vocab_size=vocab_size, n_positions=24,
                           activation_function="gelu", tie_word_embeddings=not untied)
    given = {}
    for name, tensor in theirs.state_dict().items():
        if name.endswith(".bias") and not has_bias:
            tensor.zero_()
        else:
            is_conv1d = ".h." in name and tensor.dim() == 2
            given[prefix + name] = (tensor.T if is_conv1d else tensor).clone()
    args = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 24, "vocab_size": vocab_size,
            "dropout": 0.0, "bias": has_bias, **args}
    torch.save({"model": given | dict(extra), "optimizer": {}, "model_args": args, "iter_num": 7,
                "best_val_loss": torch.tensor(1.5), "config": {"dataset": "shakespeare"}},
               folder / "ckpt.pt")
    return theirs


@pytest.mark.parametrize("changes", [
    {"prefix": "_orig_mod."},
    {"has_bias": True, "prefix": "module._orig_mod.",
     "extra": {"module._orig_mod.transformer.h.0.attn.bias": torch.ones(1, 1, 24, 24)}},
    {"untied": True, "dropout": 0.2}])
def test_nanogpt(tmp_path, changes):
    theirs = make_nanogpt(tmp_path, **changes)
    checkpoint = read_any(tmp_path)
    assert_same_logits(load_model(checkpoint), theirs)
    assert (checkpoint["step"], checkpoint["tokenizer"]) == (7, "unknown")
    assert checkpoint["config"]["tie_weights"] is not changes.get("untied", False)


def test_nanogpt_of_gpt2_tokens(tmp_path, gpt2_data, output_of):
    """eval.py and sample.py take it; its export is a plain GPT-2 of transformers."""
    from transformers import AutoModelForCausalLM
    source, theirs = tmp_path / "ckpt.pt", make_nanogpt(tmp_path, vocab_size=50304)
    assert "ckpt.pt, step 7, on the test split of words" in output_of(
        "eval", "--ckpt", source, *gpt2_data, "--device=cpu")
    assert output_of("sample", "--ckpt", source, "--device=cpu", "--prompt=Document",
                     "--max_new_tokens=3").startswith("Document")
    output_of("nanolab.huggingface", "export", source, tmp_path / "hf")
    for model in (theirs, AutoModelForCausalLM.from_pretrained(tmp_path / "hf")):
        assert_same_logits(load_model(read_any(source)), model)


@pytest.mark.parametrize("changes, line", [
    ({"use_rmsnorm": True}, "has use_rmsnorm=True, which is not in nanoGPT's model"),
    ({"n_embd": "32"}, "n_embd='32' (from "),
    ({"extra": {"transformer.ln_f.weight": 1}}, "is no checkpoint of nanolab or nanoGPT")])
def test_nanogpt_refused(tmp_path, changes, line):
    make_nanogpt(tmp_path, **changes)
    with pytest.raises(UserError, match=re.escape(line)):
        read_any(tmp_path / "ckpt.pt")


def test_older_names_of_parameters(small_run, tmp_path):
    run = small_run("run", "--max_steps=1", "--value_residual", "--value_embeddings")
    weights = read_checkpoint(run)["model"]
    older = {name.replace("v0_lambda", "value_share").replace("ve_lambda", "embedding_share"): p
             for name, p in weights.items()}
    torch.save({**torch.load(run / "best.pt", weights_only=True), "model": older}, run / "last.pt")
    assert read_checkpoint(run / "last.pt")["model"].keys() == weights.keys() != older.keys()
