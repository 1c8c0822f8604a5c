"""Weights in: a folder in Hugging Face's layout gives transformers' logits or one true line, and so
does nanoGPT's ckpt.pt. The weights are random, so no network is needed."""

import argparse
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from conftest import assert_same_logits, run_main, run_quickly, stop_at
from nanolab.checkpoint import load_model
from nanolab.common import UserError
from nanolab.huggingface import read_any
from nanolab.tokenizer import gpt2_vocabulary_files

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
        new = {name: tensor.clone(memory_format=torch.contiguous_format)
               for name, tensor in change(load_file(folder / MODEL)).items()}
        save_file(new, folder / MODEL, metadata={"format": "pt"})
    return apply


def plus(**tensors):
    return weights(lambda w: w | {name.replace("__", "."): t for name, t in tensors.items()})


def prefixed(prefix, without=""):
    return weights(lambda w: {prefix + name.removeprefix(without): t for name, t in w.items()})


def cast(dtype, part=""):
    return weights(lambda w: {name: t.to(dtype) if part in name else t for name, t in w.items()})


def config(**values):
    def apply(folder):
        hf_config = json.loads((folder / "config.json").read_text()) | values
        (folder / "config.json").write_text(json.dumps(hf_config))
    return apply


def rename(name):
    return lambda folder: (folder / MODEL).rename(folder / name)


def shard(kind, keep=False):
    """Two shards with an index, in which the last of three is a leftover; without model.safetensors
    unless it is kept."""
    def apply(folder):
        items = list(load_file(folder / MODEL).items())
        parts = [dict(items[:9]), dict(items[9:]), {"transformer.wte.weight": torch.zeros(300, 32)}]
        stem = kind.removesuffix(Path(kind).suffix)
        names = [f"{stem}-0000{i}-of-00002{Path(kind).suffix}" for i in (1, 2, 3)]
        for name, part in zip(names, parts):
            (torch.save if kind == PICKLE else save_file)(part, folder / name)
        index = {name: names[i >= 9] for i, (name, _) in enumerate(items)}
        index = {"metadata": {}, "weight_map": index}
        (folder / f"{kind}.index.json").write_text(json.dumps(index))
        if not keep:
            (folder / MODEL).unlink()
    return apply


def pickle(change):
    def apply(folder):
        torch.save(change(load_file(folder / MODEL)), folder / PICKLE)
        (folder / MODEL).unlink()
    return apply


def both(*changes):
    def apply(folder):
        for change in changes:
            change(folder)
    return apply


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


def remove(name):
    return lambda folder: (folder / name).unlink()


def scaled(name, factor):
    return lambda w: w | {name: factor * w["transformer.wte.weight"]}


MASKS = {"transformer__h__1__attn__bias": torch.ones(1, 1, 48, 48).tril(),
         "transformer__h__0__attn__masked_bias": torch.tensor(-1e4)}

READ = {
    "safetensors": config(),
    "safetensors by index": shard(MODEL),
    "pickle": pickle(dict),
    "pickles by index": shard(PICKLE),
    "safetensors before a pickle": write(PICKLE, "no weights"),
    "one file before shards": both(shard(MODEL, keep=True), write(f"{MODEL}.index.json", "{")),
    "index before a pickle": both(write(PICKLE, "no weights"), shard(MODEL)),
    "no prefix": prefixed("", "transformer."),
    "old: masks and few keys": both(
        prefixed("", "transformer."), plus(h__1__attn__bias=torch.ones(48)),
        write("config.json", json.dumps({
            "model_type": "gpt2", "vocab_size": 300, "n_positions": 48, "n_ctx": 48, "n_embd": 32,
            "n_layer": 2, "n_head": 4}))),
    "head alone": weights(lambda w: {name.replace("transformer.wte", "lm_head"): t
                                     for name, t in w.items()}),
    "equal head": weights(scaled("lm_head.weight", 1)),
    "other head than the config says": weights(scaled("lm_head.weight", 0.5)),
    "untied": both(weights(scaled("lm_head.weight", -1)), config(tie_word_embeddings=False)),
    "masks": plus(**MASKS),
    "float16": cast(torch.float16),
    "bfloat16": cast(torch.bfloat16),
    "float16 embeddings only": cast(torch.float16, "wte"),
    "n_inner said": config(n_inner=128),
    "upcast attention": config(reorder_and_upcast_attn=True),
    **{name: config(activation_function=name) for name in (
        "gelu", "gelu_python", "gelu_fast", "gelu_pytorch_tanh")}}

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 12\n"

REFUSED = {
    "shards without index": (both(shard(MODEL), remove(f"{MODEL}.index.json")),
                             f"has none of {MODEL}, {MODEL}.index.json, {PICKLE}, "),
    "a variant": (rename("model.fp16.safetensors"), f"has none of {MODEL}, "),
    "a missing shard": (both(shard(MODEL), remove("model-00002-of-00002.safetensors")),
                        "model-00002-of-00002.safetensors is damaged (No such file"),
    "a damaged index": (both(shard(MODEL), write(f"{MODEL}.index.json", "[1]")),
                        f"{MODEL}.index.json is damaged"),
    "a pointer": (write(MODEL, POINTER), "in a clone, `git lfs pull` gets the files"),
    "code in a pickle": (pickle(lambda w: w | {"args": argparse.Namespace()}),
                         f"{PICKLE} holds a argparse.Namespace; nanolab loads only"),
    "nested": (pickle(lambda w: {"state_dict": w}), f"{PICKLE} does not contain weights"),
    "compiled": (prefixed("_orig_mod."), "does not fit its own config (Missing key(s) in state_"),
    "a head's bias": (plus(lm_head__bias=torch.ones(300)), 'Unexpected key(s) in state_dict: "h'),
    "no head": (config(tie_word_embeddings=False), 'Missing key(s) in state_dict: "head.weight"'),
    "a missing tensor": (weights(lambda w: {n: t for n, t in w.items() if "1.ln_2.bias" not in n}),
                         'Missing key(s) in state_dict: "blocks.1.ln_2.bias"'),
    "a missing layer": (config(n_layer=3), 'in state_dict: "blocks.2.'),
    "one layer more": (config(n_layer=1), 'Unexpected key(s) in state_dict: "blocks.1.'),
    "padded vocabulary": (config(vocab_size=304), "size mismatch for wte.weight"),
    "matrices as (out, in)": (weights(lambda w: {n: t.T if "c_fc.w" in n else t
                                                 for n, t in w.items()}),
                              "size mismatch for blocks.0.mlp.fc.weight"),
    "integers": (cast(torch.int8, "ln_f"), "has weights that are not finite (ln_f."),
    "not finite": (weights(lambda w: w | {"transformer.ln_f.bias": torch.full((32,), torch.nan)}),
                   "has weights that are not finite (ln_f.bias)"),
    "quantised": (config(quantization_config={"bits": 8}), "has quantization_config={'bits': 8}"),
    "code of its own": (config(auto_map={"AutoModelForCausalLM": "a.B"}), "has auto_map="),
    "no type": (write("config.json", "{}"), "neither a run with best.pt or last.pt nor a model"),
    "own options": (config(model_type="nanolab", nanolab_options=["mine"], mine=1),
                    "has the option mine, which this nanolab does not have"),
    **{f"{key}={value}": (config(**{key: value}), f"has {key}={value!r}; nanolab's model has")
       for key, value in {"model_type": "gptj", "n_inner": 64, "activation_function": "relu",
                          "layer_norm_epsilon": 1e-6, "scale_attn_weights": False,
                          "scale_attn_by_inverse_layer_idx": True,
                          "add_cross_attention": True}.items()}}


@pytest.mark.parametrize("kind", READ)
def test_what_transformers_reads(tmp_path, kind):
    """Every tensor that transformers needs is there, and we have its logits, in float32."""
    from transformers import AutoModelForCausalLM
    make_hf_model(tmp_path)
    READ[kind](tmp_path)
    theirs, found = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32,
                                                         output_loading_info=True)
    assert not found["missing_keys"]
    checkpoint = read_any(tmp_path)
    assert checkpoint["tokenizer"] == "unknown"
    assert_same_logits(load_model(checkpoint), theirs)


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_refused(tmp_path, kind):
    """Because transformers does not read it, or our model does not compute it; in one line."""
    change, line = REFUSED[kind]
    make_hf_model(tmp_path)
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
        (tmp_path / name).write_text(text if text is not None
                                     else gpt2_vocabulary_files()[1].read_text())
    assert read_any(tmp_path)["tokenizer"] == expected


# --- nanoGPT

def make_nanogpt(folder, has_bias=False, prefix="", extra=(), untied=False, vocab_size=65,
                 **args):
    """Writes a ckpt.pt as nanoGPT's, with matrices as (out, in), and transformers' GPT-2 with the
    same weights into folder/theirs. -> the latter"""
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
                "best_val_loss": torch.tensor(1.5),
                "config": {"dataset": "shakespeare", "batch_size": 2, "block_size": 24,
                           "gradient_accumulation_steps": 5}}, folder / "ckpt.pt")
    return theirs


@pytest.mark.parametrize("changes", [
    {"has_bias": True},
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


def test_nanogpt_of_gpt2_tokens(tmp_path, gpt2_data, monkeypatch, capsys):
    """eval, sample and training start from it; its export is a plain GPT-2 of transformers."""
    from transformers import AutoModelForCausalLM
    source, theirs = tmp_path / "ckpt.pt", make_nanogpt(tmp_path, vocab_size=50304)
    data = ["--dataset=words", f"--data_dir={gpt2_data}", "--device=cpu"]
    run_main(monkeypatch, "eval", "--ckpt", source, *data)
    assert "ckpt.pt, step 7, on the test split of words" in capsys.readouterr().out
    run_main(monkeypatch, "sample", "--ckpt", source, "--device=cpu", "--prompt=Document",
             "--max_new_tokens=3")
    assert capsys.readouterr().out.startswith("Document")
    run_main(monkeypatch, "nanolab.huggingface", "export", source, tmp_path / "hf")
    assert_same_logits(load_model(read_any(source)),
                       AutoModelForCausalLM.from_pretrained(tmp_path / "hf"))
    run_quickly([f"--init_from={source}", *data, "--max_steps=1", "--batch_size=1",
                 "--global_batch_size=1", "--learning_rate=1e-30", "--eval_tokens=24",
                 f"--out_dir={tmp_path / 'run'}", "--dropout=0"])
    assert_same_logits(load_model(tmp_path / "run"), theirs)


@pytest.mark.parametrize("changes, line", [
    ({"use_rmsnorm": True}, "has use_rmsnorm=True, which is not in nanoGPT's model"),
    ({"extra": {"transformer.h.0.q_norm.weight": torch.ones(8)}},
     'Unexpected key(s) in state_dict: "blocks.0.q_norm.weight"'),
    ({"n_embd": "32"}, "n_embd='32' (from "),
    ({"extra": {"transformer.ln_f.weight": 1}}, "is no checkpoint of nanolab or nanoGPT")])
def test_nanogpt_refused(tmp_path, changes, line):
    make_nanogpt(tmp_path, **changes)
    with pytest.raises(UserError, match=re.escape(line)):
        load_model(read_any(tmp_path / "ckpt.pt"))


@pytest.mark.parametrize("name, content, line", [
    ("a.pt", {"trf_blocks.0.att.W_query.weight": torch.ones(2)},
     "a.pt is no checkpoint of nanolab or nanoGPT"),
    ("b.pt", {"model": {}, "best": argparse.Namespace()}, "b.pt holds a argparse.Namespace")])
def test_other_files(tmp_path, name, content, line):
    torch.save(content, tmp_path / name)
    with pytest.raises(UserError, match=line):
        read_any(tmp_path / name)


# --- a run that was stopped before its first validation

def test_run_without_best(tmp_path, gpt2_data, small_run, monkeypatch, capsys):
    """It has last.pt only: that is taken, and said, by its folder's name, best.pt's, or that of a
    folder of runs."""
    run = small_run("run", "--dataset=words", f"--data_dir={gpt2_data}", on_step=stop_at(3))
    assert (run / "last.pt").exists() and not (run / "best.pt").exists()
    capsys.readouterr()
    note = f"note: there is no {run}/best.pt, so this is {run}/last.pt\n"
    for command, paths in (
            (["sample", "--device=cpu", "--max_new_tokens=3", "--ckpt"], (run, run / "best.pt")),
            (["eval", "--device=cpu", "--ckpt"], (run, run / "best.pt", tmp_path)),
            (["nanolab.huggingface", "export"], (run, run / "best.pt"))):
        for i, path in enumerate(paths):
            folder = [tmp_path / f"exported{i}"] if command[1] == "export" else []
            run_main(monkeypatch, command[0], *command[1:], path, *folder)
            printed = capsys.readouterr()
            assert printed.err.count(note) == 1
    assert "last.pt, step 4" in printed.out
    assert (run / "last.test.json").exists() and not (run / "best.test.json").exists()
    assert load_model(run).config.n_embd == 32
