"""Weights in, of any kind: ours, a GPT-2 in Hugging Face's layout, OpenAI's by name, nanoGPT's
ckpt.pt. And the command that writes ours in Hugging Face's layout:

    python -m nanolab.huggingface export out/best.pt FOLDER
"""

import math
import os
import re
import sys
from dataclasses import fields
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from config import OPTIONS, GPTConfig
from nanolab.checkpoint import CHECKPOINT_FORMAT, checked, checkpoint_file, load_model
from nanolab.common import (UserError, argument_parser, load_tensors, parse_json, reachable,
                            run_script)
from nanolab.data import read_meta
from nanolab.distributed import print0
from nanolab.export import BYTE_TOKENIZER, export
from nanolab.gpt2 import from_gpt2, gpt2_options, gpt2_shapes, tie
from nanolab.options import check
from nanolab.tokenizer import (GPT2_VOCABULARY_SHA256, UNKNOWN, guess_tokenizer, vocabulary_sha256)

# OpenAI's weights are openai-community/NAME on the hub. Each revision has model.safetensors.
OPENAI_REVISIONS = {"gpt2": "607a30d783dfa663caf39e06633721c8d4cfcd7e",
                    "gpt2-medium": "6dcaa7a952f72f9298047fd5137cd6e4f05f41da",
                    "gpt2-large": "32b71b12589c2f8d625668d2335a01cac3249519",
                    "gpt2-xl": "15ea56dee5df4983c59b2538573817e1667135e2"}

# The first of these that a folder has is read, as by transformers.
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin",
                "pytorch_model.bin.index.json")

NANOGPT_ARGS = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "dropout", "bias")
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
    if path.suffix in (".safetensors", ".bin"):
        raise UserError(f"{path} is one file of a model: give the folder that it is in")
    if path.is_file():
        tensors = load_tensors(path)
        if isinstance(tensors, dict) and {"model", "model_args"} <= tensors.keys():
            return read_nanogpt(tensors, path)
        return checked(tensors, path)
    if str(source) in OPENAI_REVISIONS:
        return read_hugging_face(download_openai(str(source)), source)
    names = ", ".join(OPENAI_REVISIONS)
    hint = f"; OpenAI's weights are {names}" if str(source).startswith("gpt") else ""
    raise UserError(f"there is no checkpoint {source}{hint}")


def download_openai(name):
    """Downloads OpenAI's weights into the hub's cache, unless they are there. -> the folder.

    Raises UserError, within 2 seconds if there is no network.
    """
    import huggingface_hub  # here, because most runs do not need it
    repository, revision = f"openai-community/{name}", OPENAI_REVISIONS[name]
    for file in ("config.json", "model.safetensors"):
        cached = huggingface_hub.try_to_load_from_cache(repository, file, revision=revision)
        needs_hub = not isinstance(cached, str) and not os.environ.get("HF_ENDPOINT")
        if needs_hub and not reachable("huggingface.co"):
            raise UserError(
                f"{name} is not on this machine and huggingface.co does not answer: connect once, "
                f"or give a folder with {repository}'s config.json and model.safetensors")
        try:
            path = huggingface_hub.hf_hub_download(repository, file, revision=revision)
        except Exception as error:  # network errors have many classes
            reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
            raise UserError(f"cannot download {file} of {repository} ({reason})") from None
    return Path(path).parent


def as_checkpoint(source, options, weights, tokenizer, step=0, tokens=0):
    """Foreign weights as a checkpoint. Of their training little is known: the data set is None."""
    run = {"name": Path(source).resolve().name, "dataset": None, "data_dir": "data", "seed": None}
    return {"path": str(source), "format": CHECKPOINT_FORMAT, "model": weights,
            "config": {**run, **options}, "tokenizer": tokenizer, "step": step, "tokens": tokens,
            "seconds": 0.0}


# --- Hugging Face's layout

def read_hugging_face(folder, source):
    """Reads config.json and the weights, as transformers would. Runs no code of the folder.

    folder: a Path; source: the name that the user gave, for messages and tables. Raises UserError,
    which names what our GPT does not compute.
    """
    hf_config = read_hf_config(folder)
    is_ours = hf_config["model_type"] == "nanolab"
    options = own_options(hf_config, folder) if is_ours else gpt2_options(hf_config, folder)
    given = read_weights(folder, hf_config.get("transformers_weights"))
    if is_ours:  # load_model checks names and shapes
        weights = {name.removeprefix("gpt."): tensor for name, tensor in given.items()}
        options["tie_weights"] = tie(weights, "head.weight", options["tie_weights"])
    else:
        weights = from_gpt2(given, options, folder, transposed=True)
    return as_checkpoint(source, options, weights, find_tokenizer(folder, hf_config))


def read_hf_config(folder):
    try:
        hf_config = parse_json((folder / "config.json").read_text(encoding="utf-8"))
        if hf_config.get("model_type") is not None:
            return hf_config
    except FileNotFoundError:
        pass
    except (ValueError, AttributeError):
        raise UserError(f"{folder}/config.json is damaged") from None
    raise UserError(f"{folder} is a folder, neither a run with best.pt or last.pt nor a model in "
                    "Hugging Face's layout, whose config.json has a model_type")


def own_options(hf_config, folder):
    """The options of a model that our export wrote with its code."""
    path, names = folder / "config.json", hf_config.get("nanolab_options")
    if not isinstance(names, list) or not {*map(str, names)} <= hf_config.keys():
        raise UserError(f"{path} is damaged")
    if unknown := sorted({*map(str, names)} - {f.name for f in fields(GPTConfig)}):
        raise UserError(f"{path} has the option {unknown[0]}, which this nanolab does not have; "
                        "use the nanolab that made it")
    return {name: check(OPTIONS[name], hf_config[name], path) for name in names}


def read_weights(folder, explicit=None):
    """-> {name: tensor}, of the files that transformers would read.

    explicit: the file that config.json names, if it names one.
    """
    for name in ("adapter_config.json", "shard-*-model-*-of-*.safetensors"):
        if found := sorted(folder.glob(name)):
            raise UserError(f"{found[0]} changes the weights, and nanolab does not read it")
    names = [explicit] if explicit else WEIGHT_FILES
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    if path is None:
        raise UserError(f"{folder} has none of {', '.join(names)}")
    paths = [path]
    if path.suffix == ".json":
        try:
            shards = set(parse_json(path.read_text(encoding="utf-8"))["weight_map"].values())
            paths = [folder / name for name in sorted(shards)]
        except (ValueError, KeyError, AttributeError, TypeError):
            raise UserError(f"{path} is damaged") from None
    weights = {}
    for path in paths:
        weights |= load_weight_file(path)
    return weights


def load_weight_file(path):
    if not path.is_file():
        raise UserError(f"{path} is missing")
    with open(path, "rb") as file:
        if file.read(20) == b"version https://git-":
            raise UserError(f"{path} is only a pointer to the file: run `git lfs pull` beside it")
    try:
        weights = load_file(path) if path.suffix == ".safetensors" else load_tensors(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged ({error})") from None
    if not (isinstance(weights, dict)
            and all(isinstance(tensor, torch.Tensor) for tensor in weights.values())):
        raise UserError(f"{path} does not contain weights")
    return weights


def find_tokenizer(folder, hf_config):
    """'gpt2' or 'bytes' if the folder's vocabulary is that, UNKNOWN if it is another.

    Without a vocabulary: what our export wrote to config.json, else a guess from vocab_size.
    """
    vocabularies = []
    try:
        for name in ("vocab.json", "tokenizer.json"):
            if (folder / name).exists():
                content = parse_json((folder / name).read_text(encoding="utf-8"))
                vocabularies.append(content if name == "vocab.json" else content["model"]["vocab"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"the tokenizer in {folder} is damaged") from None
    if vocabularies:
        names = {vocabulary_name(vocabulary) for vocabulary in vocabularies}
        return names.pop() if len(names) == 1 else UNKNOWN
    if any(next(folder.glob(name), None) for name in ("*.model", "vocab.txt")):
        return UNKNOWN
    noted = hf_config.get("nanolab_tokenizer")
    return str(noted or guess_tokenizer(hf_config.get("vocab_size")))


def vocabulary_name(vocabulary):
    """vocabulary: {token: id}; other kinds of tokenizers have lists."""
    if vocabulary == BYTE_TOKENIZER["model"]["vocab"]:
        return "bytes"
    is_gpt2 = isinstance(vocabulary, dict) and all(
        isinstance(i, int) for i in vocabulary.values()) and (
        vocabulary_sha256(vocabulary) == GPT2_VOCABULARY_SHA256)
    return "gpt2" if is_gpt2 else UNKNOWN


# --- nanoGPT

def read_nanogpt(checkpoint, path):
    """What nanoGPT's train.py saved: ckpt.pt. Missing biases are zeros. Raises UserError.

    Its MLP has the exact GELU, as nanoGPT's since May 2023 (commit 594068e).
    """
    args, given = checkpoint["model_args"], checkpoint["model"]
    config = checkpoint.get("config", {})  # the first versions saved none
    if not (isinstance(args, dict) and set(NANOGPT_ARGS[:5]) <= args.keys()
            and isinstance(given, dict)
            and all(isinstance(tensor, torch.Tensor) for tensor in given.values())):
        raise UserError(f"{path} is no checkpoint of nanolab or nanoGPT")
    if unknown := sorted(map(str, args.keys() - set(NANOGPT_ARGS))):
        raise UserError(f"{path} has {unknown[0]}={args[unknown[0]]!r}, which is not in nanoGPT's "
                        "model, nor in nanolab's")
    given = {PREFIXES.sub("", name): tensor for name, tensor in given.items()}
    has_bias = args.get("bias", "transformer.h.0.attn.c_attn.bias" in given)
    options = {"dropout": 0.0, **args, "qkv_bias": has_bias, "tie_weights": True,
               "activation": "gelu_erf"}
    options = {key: check(OPTIONS[key], value, path) for key, value in options.items()
               if key != "bias"}
    if not has_bias:
        zeros = {f"transformer.{name}": torch.zeros(shape) for name, shape
                 in gpt2_shapes(options, False).items() if name.endswith(".bias")}
        given = zeros | given
    weights = from_gpt2(given, options, path, transposed=False)
    if not has_bias:
        print0(f"note: {path} has no biases; here they are zeros, which computes the same",
               file=sys.stderr)
    step = checkpoint.get("iter_num", 0)
    tokens = step * math.prod(config.get(key, 0) for key in (
        "gradient_accumulation_steps", "batch_size", "block_size"))
    tokenizer = nanogpt_tokenizer(config.get("dataset"), options["vocab_size"])
    return as_checkpoint(path, options, weights, tokenizer, step, tokens)


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
