"""Weights in, of any kind: ours, a GPT-2 in Hugging Face's layout, OpenAI's by name, nanoGPT's
ckpt.pt. And the command that writes ours in Hugging Face's layout:

    python -m nanolab.huggingface export out/best.pt FOLDER
"""

import json
import os
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from config import GPTConfig
from nanolab.checkpoint import (CHECKPOINT_FORMAT, are_weights, checked, checked_options,
                                checkpoint_file, load_model)
from nanolab.common import (UserError, argument_parser, describe, load_tensors, reachable,
                            run_script)
from nanolab.data import read_meta
from nanolab.export import (GPT2_ACTIVATIONS, GPT2_FIXED, GPT2_NAMES, GPT2_SHAPE, TRANSPOSED,
                            export)
from nanolab.tokenizer import (GPT2_VOCABULARY_SHA256, UNKNOWN, guess_tokenizer, vocabulary_sha256)

# OpenAI's weights are openai-community/NAME on the hub. Each revision has model.safetensors.
OPENAI_REVISIONS = {"gpt2": "607a30d783dfa663caf39e06633721c8d4cfcd7e",
                    "gpt2-medium": "6dcaa7a952f72f9298047fd5137cd6e4f05f41da",
                    "gpt2-large": "32b71b12589c2f8d625668d2335a01cac3249519",
                    "gpt2-xl": "15ea56dee5df4983c59b2538573817e1667135e2"}

# The first of these that a folder has is read, as by transformers.
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin",
                "pytorch_model.bin.index.json")

PREFIXES = re.compile(r"^((module|_orig_mod)\.)+")  # of DistributedDataParallel and torch.compile


def read_any(source):
    """What checkpoint.read_checkpoint returns, of any weights: a file that train.py or nanoGPT
    saved, or the folder it is in; a folder in Hugging Face's layout; or one of OpenAI's names, such
    as gpt2, which is downloaded once. Raises UserError."""
    path = checkpoint_file(source)
    if (path / "ckpt.pt").is_file():
        path = path / "ckpt.pt"
    if path.is_dir():
        return read_hugging_face(path, source)
    if path.is_file():
        tensors = load_tensors(path)
        if isinstance(tensors, dict) and {"model", "model_args"} <= tensors.keys():
            return read_nanogpt(tensors, path)
        return checked(tensors, path)
    if str(source) in OPENAI_REVISIONS:
        return read_hugging_face(download_openai(str(source)), source)
    raise UserError(f"there is no checkpoint {source}; OpenAI's weights are "
                    f"{', '.join(OPENAI_REVISIONS)}")


def download_openai(name):
    """Downloads OpenAI's weights into the hub's cache, unless they are there. -> the folder"""
    import huggingface_hub  # here, because most runs do not need it
    repository = f"openai-community/{name}"
    # without a network the hub's library would try for 24 seconds
    is_offline = not (os.environ.get("HF_ENDPOINT") or reachable("huggingface.co"))
    try:
        for file in ("config.json", "model.safetensors"):
            path = huggingface_hub.hf_hub_download(
                repository, file, revision=OPENAI_REVISIONS[name], local_files_only=is_offline)
    except Exception as error:  # network errors have many classes
        raise UserError(
            f"{name} is not on this machine and cannot be downloaded from huggingface.co "
            f"({type(error).__name__}): connect once, or give a folder with {repository}'s "
            "config.json and model.safetensors") from None
    return Path(path).parent


def as_checkpoint(source, path, options, weights, tokenizer, step=0):
    """Foreign weights as a checkpoint. Of their training little is known: the data set is None.

    source: the name that the user gave; path: of the file that has the options.
    """
    options = checked_options(options, path)
    if options["n_embd"] % options["n_head"]:
        raise UserError(f"{path} has n_embd={options['n_embd']}, n_head={options['n_head']}")
    options["tie_weights"] = tie(weights, options["tie_weights"])
    run = {"name": Path(source).resolve().name, "dataset": None, "data_dir": "data", "seed": None}
    return {"path": str(source), "format": CHECKPOINT_FORMAT, "model": weights,
            "config": {**run, **options}, "tokenizer": tokenizer, "step": step, "tokens": 0,
            "seconds": 0.0}


def tie(weights, asked):
    """Ties the head to wte.weight as transformers does: if config.json asks for it, and the file
    has one of the two, or both equal. -> whether it is tied"""
    present = [weights[name] for name in ("wte.weight", "head.weight") if name in weights]
    if not asked or not present or not torch.equal(present[0].float(), present[-1].float()):
        return False
    weights["wte.weight"] = weights["head.weight"] = present[0]
    return True


# --- Hugging Face's layout

def read_hugging_face(folder, source):
    """Reads config.json and the weights, as transformers would. Runs no code of the folder (a
    Path). Raises UserError, which names what our GPT does not compute."""
    path, hf_config = folder / "config.json", {}
    try:
        if path.is_file():
            hf_config = dict(json.loads(path.read_text(encoding="utf-8")))
        if "model_type" not in hf_config:
            raise UserError(f"{folder} is a folder, neither a run with best.pt or last.pt nor a "
                            "model in Hugging Face's layout, whose config.json has a model_type")
        if hf_config["model_type"] == "nanolab":  # which our export wrote
            options = {name: hf_config.get(name) for name in hf_config["nanolab_options"]}
            weights = {name.removeprefix("gpt."): p for name, p in read_weights(folder).items()}
        else:
            options = gpt2_options(hf_config, path)
            weights = from_gpt2(read_weights(folder), transposed=True)
        return as_checkpoint(source, path, options, weights, find_tokenizer(folder, hf_config))
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path} is damaged") from None


def gpt2_options(hf_config, path):
    """-> the options of our GPT, by name. Raises UserError if the model computes something else."""
    options = {ours: hf_config.get(theirs, getattr(GPTConfig, ours))
               for theirs, ours in GPT2_SHAPE.items()}
    allowed = {**{key: [value] for key, value in GPT2_FIXED.items()},
               "activation_function": list(GPT2_ACTIVATIONS),
               "n_inner": [4 * options["n_embd"], None], "num_attention_heads": [options["n_head"]],
               "quantization_config": [None], "transformers_weights": [None],
               "auto_map": [None]}  # code of its own
    for key, values in allowed.items():
        if hf_config.get(key, values[0]) not in values:
            raise UserError(f"{path} has {key}={hf_config[key]!r}; "
                            f"nanolab's model has {values[0]!r}")
    return options | {
        "qkv_bias": True, "tie_weights": hf_config.get("tie_word_embeddings", True),
        "activation": GPT2_ACTIVATIONS[hf_config.get("activation_function", "gelu_new")]}


def from_gpt2(given, transposed):
    """A GPT-2's weights by our names, matrices as (out, in). transposed: they are (in, out)."""
    weights = {}
    for name, tensor in given.items():
        name = name.removeprefix("transformer.")
        for ours, theirs in GPT2_NAMES.items():
            name = name.replace(theirs, ours)
        if not name.endswith((".attn.bias", ".attn.masked_bias")):  # causal masks
            is_transposed = transposed and name.endswith(TRANSPOSED)
            weights[name] = tensor.T if is_transposed else tensor
    return weights


def read_weights(folder):
    """-> {name: tensor}, of the files that transformers would read. Raises UserError."""
    path = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if path is None:
        raise UserError(f"{folder} has none of {', '.join(WEIGHT_FILES)}")
    if (folder / "adapter_config.json").exists():
        raise UserError(f"{folder} has an adapter, which nanolab does not read: merge it first")
    paths, weights = [path], {}
    try:
        if path.suffix == ".json":  # says which file has which tensor
            shards = json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()
            paths = [folder / name for name in sorted(set(shards))]
        for path in paths:
            weights |= load_file(path) if path.suffix == ".safetensors" else load_tensors(path)
    except (SafetensorError, OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{path} is damaged ({describe(error)}); in a clone, `git lfs pull` gets "
                        "the files") from None
    if not are_weights(weights):
        raise UserError(f"{path} does not contain weights")
    return weights


def find_tokenizer(folder, hf_config):
    """What our export noted; else 'gpt2' if the folder's vocabulary is GPT-2's, or if there is none
    but its size is; else UNKNOWN."""
    if "nanolab_tokenizer" in hf_config:
        return str(hf_config["nanolab_tokenizer"])
    paths = [folder / name for name in ("tokenizer.json", "vocab.json")]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        return guess_tokenizer(hf_config.get("vocab_size"))
    try:
        vocabulary = json.loads(path.read_text(encoding="utf-8"))
        if path.name == "tokenizer.json":
            vocabulary = vocabulary["model"]["vocab"]
        return "gpt2" if vocabulary_sha256(vocabulary) == GPT2_VOCABULARY_SHA256 else UNKNOWN
    except (ValueError, KeyError, AttributeError, TypeError):  # another kind of tokenizer
        return UNKNOWN


# --- nanoGPT

def read_nanogpt(checkpoint, path):
    """What nanoGPT's train.py saved: ckpt.pt. Its MLP has the exact GELU, as nanoGPT's since May
    2023 (commit 594068e). Missing biases are zeros, which computes the same. Raises UserError."""
    args, given = checkpoint["model_args"], checkpoint["model"]
    config = checkpoint.get("config", {})  # the first versions saved none
    if not (isinstance(args, dict) and are_weights(given)
            and {*GPT2_SHAPE.values()} <= args.keys()):
        raise UserError(f"{path} is no checkpoint of nanolab or nanoGPT")
    if unknown := sorted(args.keys() - {*GPT2_SHAPE.values(), "dropout", "bias"}):
        raise UserError(f"{path} has {unknown[0]}={args[unknown[0]]!r}, which is not in nanoGPT's "
                        "model, nor in nanolab's")
    weights = from_gpt2({PREFIXES.sub("", name): tensor for name, tensor in given.items()},
                        transposed=False)
    has_bias = "ln_f.bias" in weights
    if not has_bias:
        weights |= {name.replace(".weight", ".bias"): torch.zeros(len(tensor))
                    for name, tensor in weights.items()
                    if name.startswith(("blocks.", "ln_f.")) and ".qkv." not in name}
    options = {"dropout": 0.0, **args, "qkv_bias": has_bias, "tie_weights": True,
               "activation": "gelu_erf"}
    options.pop("bias", None)
    tokenizer = nanogpt_tokenizer(config.get("dataset"), options["vocab_size"])
    return as_checkpoint(path, path, options, weights, tokenizer, checkpoint.get("iter_num", 0))


def nanogpt_tokenizer(dataset, vocab_size):
    """That of data/DATASET, where nanoGPT looks too, if it is there; else a guess."""
    try:
        meta = read_meta("data", str(dataset), vocab_size)
        if meta["vocab_size"] == vocab_size:
            return meta["tokenizer"]
    except UserError:
        pass
    return guess_tokenizer(vocab_size)


def main():
    parser = argument_parser(__doc__)
    parser.add_argument("command", choices=["export"])
    parser.add_argument("checkpoint", help="such as out/best.pt")
    parser.add_argument("folder", help="where to; it must be new or empty")
    args = parser.parse_args()
    folder = Path(args.folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is there and not empty; choose another folder, or remove it")
    checkpoint = read_any(args.checkpoint)
    export(checkpoint, load_model(checkpoint), folder)
    print(f"wrote {folder}, from {checkpoint['path']}, step {checkpoint['step']:,}; "
          f"to publish it: hf upload USER/NAME {folder}")


if __name__ == "__main__":
    run_script(main)
