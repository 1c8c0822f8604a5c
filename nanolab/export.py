"""Weights out, to a folder that transformers reads: as its GPT-2 where that computes the same, else
with model.py's own code next to them."""

import json
import os
import re
import shutil
from dataclasses import fields
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from nanolab.common import ROOT, UserError, describe
from nanolab.tokenizer import END_OF_TEXT, byte_characters, get_tokenizer, gpt2_vocabulary_files

# GPT2Config's options of the shape, and ours. Their defaults are ours too.
GPT2_SHAPE = {"vocab_size": "vocab_size", "n_positions": "block_size", "n_embd": "n_embd",
              "n_layer": "n_layer", "n_head": "n_head"}

# GPT2Config's activation_function: our name. The first of ours is the one that is written.
GPT2_ACTIVATIONS = {"gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "gelu_fast": "gelu",
                    "gelu": "gelu_erf", "gelu_python": "gelu_erf"}

# Other options of GPT2Config that change what is computed: its default, which our GPT computes.
GPT2_FIXED = {"model_type": "gpt2", "layer_norm_epsilon": 1e-5, "scale_attn_weights": True,
              "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}

# GPT-2 can express these, of activation some values. init and zero_init concern the start only.
GPT2_OPTIONS = {*GPT2_SHAPE.values(), "activation", "dropout", "qkv_bias", "tie_weights", "init",
                "zero_init"}

# Parts of our parameters' names, and a GPT2LMHeadModel's.
GPT2_NAMES = {"blocks.": "h.", "qkv.": "c_attn.", "proj.": "c_proj.", "fc.": "c_fc.",
              "head.": "lm_head."}
TRANSPOSED = ("qkv.weight", "proj.weight", "fc.weight")  # GPT-2's Conv1D stores (in, out)


def export(checkpoint, model, folder):
    """Writes weights, config, tokenizer and a short model card, all of them or nothing, as
    AutoModelForCausalLM reads them; where GPT-2 cannot express the model, its code too.

    checkpoint: from huggingface.read_any; model: its GPT; folder: new or empty. Raises UserError.
    """
    tokenizer, config = checkpoint["tokenizer"], model.config
    card = CARD.format(title=Path(folder).name, name=checkpoint["config"]["name"],
                       n_parameters=model.num_params(), step=checkpoint["step"],
                       dataset=checkpoint["config"]["dataset"] or "unknown")
    weights = model.state_dict()
    if config.tie_weights:
        del weights["head.weight"]
    if is_gpt2(config):
        weights, hf_config, code = gpt2_weights(weights, config), gpt2_config(config), {}
    else:
        weights = {f"gpt.{name}": tensor for name, tensor in weights.items()}
        hf_config = {"architectures": ["NanolabForCausalLM"], "model_type": "nanolab",
                     "auto_map": {"AutoConfig": "modeling_nanolab.NanolabConfig",
                                  "AutoModelForCausalLM": "modeling_nanolab.NanolabForCausalLM"},
                     **vars(config), "nanolab_options": list(vars(config))}
        code = {"modeling_nanolab.py": own_code().encode()}
        card += CODE_NOTE
    # a text begins and ends with the token that stands between documents, if it is known
    token = get_tokenizer(tokenizer).eot_token if tokenizer in ("gpt2", "bytes") else None
    ids = {"bos_token_id": token, "eos_token_id": token}
    hf_config |= {"tie_word_embeddings": config.tie_weights, **ids, "dtype": "float32",
                  "nanolab_tokenizer": tokenizer}
    files = {"config.json": as_json(hf_config), "generation_config.json": as_json(ids), **code,
             "README.md": card.encode(), **tokenizer_files(tokenizer, config.block_size)}
    write_folder(Path(folder), files, weights)


CARD = """---
library_name: transformers
tags: [nanolab]
---

# {title}

A GPT of {n_parameters:,} parameters, written by nanolab: `{name}` after {step:,} steps, data set:
{dataset}. It continues text; it follows no instructions. `nanolab_tokenizer` in config.json says
what its tokens are.
"""

CODE_NOTE = """
**Loading it runs code**: `modeling_nanolab.py` in this folder is the model, so read it first.

    AutoModelForCausalLM.from_pretrained("THIS FOLDER", trust_remote_code=True)
"""


# --- as GPT-2

def is_gpt2(config):
    """Whether transformers' GPT-2 computes the same as a GPTConfig."""
    return config.activation in GPT2_ACTIVATIONS.values() and all(
        getattr(config, f.name) == f.default for f in fields(config) if f.name not in GPT2_OPTIONS)


def gpt2_config(config):
    activations = {ours: theirs for theirs, ours in reversed(GPT2_ACTIVATIONS.items())}
    return {"architectures": ["GPT2LMHeadModel"], **GPT2_FIXED, "n_inner": None,
            "activation_function": activations[config.activation],
            **{theirs: getattr(config, ours) for theirs, ours in GPT2_SHAPE.items()},
            **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), config.dropout)}


def gpt2_weights(weights, config):
    """-> {name in GPT2LMHeadModel: tensor}. QKV biases, which GPT-2 always has, are zeros if the
    model has none."""
    if not config.qkv_bias:
        weights |= {f"blocks.{i}.attn.qkv.bias": torch.zeros(3 * config.n_embd)
                    for i in range(config.n_layer)}
    renamed = {}
    for name, tensor in weights.items():
        tensor = tensor.T.contiguous() if name.endswith(TRANSPOSED) else tensor
        prefix = "" if name == "head.weight" else "transformer."
        for ours, theirs in GPT2_NAMES.items():
            name = name.replace(ours, theirs)
        renamed[prefix + name] = tensor
    return renamed


# --- with its own code

def own_code():
    """for_transformers.py and what it needs of ours, as one file, without imports of each other. Of
    config/ a model needs no more than the options' values."""
    header = '"""A model of nanolab, for transformers: files of nanolab, one after another."""\n\n'
    texts = [(ROOT / name).read_text()
             for name in ("nanolab/head.py", "model.py", "nanolab/for_transformers.py")]
    return header + re.sub(r"^from (config|model|nanolab)\b.*\n", "", "".join(texts), flags=re.M)


# --- the tokenizer

def tokenizer_files(tokenizer, block_size):
    """-> {name: bytes} for AutoTokenizer; none for a tokenizer other than GPT-2's and bytes."""
    config = {"model_max_length": block_size,
              **dict.fromkeys(("bos_token", "eos_token"), END_OF_TEXT)}
    if tokenizer == "bytes":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        return {"tokenizer.json": as_json(BYTE_TOKENIZER), "tokenizer_config.json": as_json(config)}
    if tokenizer != "gpt2":
        return {}
    merges, vocabulary = (path.read_bytes() for path in gpt2_vocabulary_files())
    config |= {"tokenizer_class": "GPT2Tokenizer", "unk_token": END_OF_TEXT}
    return {"merges.txt": merges, "vocab.json": vocabulary,
            "tokenizer_config.json": as_json(config)}


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False,
              "use_regex": False}
# tokenizers' format: a BPE without merges, of the 256 bytes, and <|endoftext|>
BYTE_TOKENIZER = {
    "version": "1.0", "truncation": None, "padding": None,
    "added_tokens": [{"id": 256, "content": END_OF_TEXT, "single_word": False, "lstrip": False,
                      "rstrip": False, "normalized": False, "special": True}],
    "normalizer": None, "pre_tokenizer": BYTE_LEVEL, "post_processor": None, "decoder": BYTE_LEVEL,
    "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
              "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
              "vocab": {character: byte for byte, character in byte_characters().items()},
              "merges": []}}


def write_folder(folder, files, weights):
    """files: {name: bytes}. The folder gets its name when everything is in it."""
    unfinished = Path(f"{folder}.nanolab_unfinished")  # a name that is ours alone
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
        for name, content in files.items():
            (unfinished / name).write_bytes(content)
        save_file(weights, unfinished / "model.safetensors", metadata={"format": "pt"})
        # save_file lets only the owner read its file
        shutil.copymode(unfinished / "config.json", unfinished / "model.safetensors")
        os.replace(unfinished, folder)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder} could not be written ({describe(error)})") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def as_json(value):
    return (json.dumps(value, indent=2) + "\n").encode()
