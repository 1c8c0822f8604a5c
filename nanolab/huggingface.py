"""GPT-2 in Hugging Face's layout: weights in, from a folder or the hub, and a checkpoint out.

    python -m nanolab.huggingface export out/best.pt FOLDER
"""

import json
import os
import shutil
from dataclasses import fields
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from config import OPTIONS
from nanolab.checkpoint import CHECKPOINT_FORMAT, load_model, read_checkpoint
from nanolab.common import (UserError, argument_parser, describe, load_tensors, parse_json,
                            reachable, run_script)
from nanolab.options import check
from nanolab.tokenizer import (END_OF_TEXT, GPT2_VOCABULARY_SHA256, UNKNOWN, get_tokenizer,
                               gpt2_vocabulary_files, guess_tokenizer, kind_of, vocabulary_sha256)

# OpenAI's weights are openai-community/NAME on the hub. Each revision has model.safetensors.
OPENAI_REVISIONS = {"gpt2": "607a30d783dfa663caf39e06633721c8d4cfcd7e",
                    "gpt2-medium": "6dcaa7a952f72f9298047fd5137cd6e4f05f41da",
                    "gpt2-large": "32b71b12589c2f8d625668d2335a01cac3249519",
                    "gpt2-xl": "15ea56dee5df4983c59b2538573817e1667135e2"}

# What GPT2Config calls the options of the shape: our name and GPT2Config's default.
HF_SHAPE = {"vocab_size": ("vocab_size", 50257),
            "n_positions": ("block_size", 1024),
            "n_embd": ("n_embd", 768),
            "n_layer": ("n_layer", 12),
            "n_head": ("n_head", 12)}

# Options of GPT2Config that change what is computed: the values that our GPT computes. The first
# of them is GPT2Config's default.
HF_SUPPORTED = {"model_type": ("gpt2",),
                "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
                "layer_norm_epsilon": (1e-5,),
                "scale_attn_weights": (True,),
                "scale_attn_by_inverse_layer_idx": (False,),
                "add_cross_attention": (False,)}

# Parts of parameter names in a GPT2LMHeadModel, and ours.
HF_NAMES = {"h.": "blocks.", "c_attn.": "qkv.", "c_proj.": "proj.", "c_fc.": "fc.",
            "lm_head.": "head."}
TRANSPOSED = ("qkv.weight", "proj.weight", "fc.weight")  # GPT-2's Conv1D stores (in, out)


def read_any(source):
    """What read_checkpoint returns, of any weights: a file that train.py saved, or its run's
    folder; a folder in Hugging Face's layout; or one of OpenAI's names, such as gpt2, which is
    downloaded once. Raises UserError."""
    path = Path(source)
    if path.is_file() or Path(path, "best.pt").is_file():
        return read_checkpoint(path)
    if path.is_dir():
        return read_hugging_face(path, source)
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


def read_hugging_face(folder, source):
    """Reads config.json and the weights. -> what read_checkpoint returns.

    folder: a Path; source: the name that the user gave, for messages and tables. Nothing is known
    of the training: step, tokens and seconds are 0, dataset and seed are None.
    Raises UserError, which names what our GPT does not compute.
    """
    hf_config = read_hf_config(folder)
    options = from_hf_config(hf_config, folder)
    run = {"name": Path(source).resolve().name, "dataset": None, "data_dir": "data", "seed": None}
    return {"path": str(source), "format": CHECKPOINT_FORMAT,
            "model": from_hf_state_dict(read_weights(folder), options["tie_weights"]),
            "config": {**run, **options},
            "tokenizer": find_tokenizer(folder, hf_config),
            "step": 0, "tokens": 0, "seconds": 0.0}


def read_hf_config(folder):
    try:
        hf_config = parse_json((folder / "config.json").read_text())
        if hf_config.get("model_type") is not None:
            return hf_config
    except FileNotFoundError:
        pass
    except (ValueError, AttributeError):
        raise UserError(f"{folder}/config.json is damaged") from None
    raise UserError(f"{folder} is a folder, neither a run with best.pt nor a model in Hugging "
                    "Face's layout")


def from_hf_config(hf_config, folder):
    """-> the options of our GPT, by name. Raises UserError if the model computes something else."""
    shape = {key: hf_config.get(key, default) for key, (_, default) in HF_SHAPE.items()}
    for key, value in shape.items():
        if type(value) is not int or value < 1:
            raise UserError(f"{folder}/config.json is damaged: {key}={value!r}")
    for key, supported in {**HF_SUPPORTED, "n_inner": (4 * shape["n_embd"], None)}.items():
        if hf_config.get(key, supported[0]) not in supported:
            raise UserError(f"{folder}/config.json has {key}={hf_config[key]!r}; "
                            f"nanolab's model has {supported[0]!r}")
    if shape["n_embd"] % shape["n_head"]:
        raise UserError(f"{folder}/config.json is damaged: "
                        f"n_embd={shape['n_embd']}, n_head={shape['n_head']}")
    options = {**{our_key: shape[key] for key, (our_key, _) in HF_SHAPE.items()},
               "dropout": hf_config.get("resid_pdrop", 0.1),
               "qkv_bias": True,
               "tie_weights": hf_config.get("tie_word_embeddings", True)}
    return {key: check(OPTIONS[key], value, f"{folder}/config.json")
            for key, value in options.items()}


def read_weights(folder):
    """-> {Hugging Face's name: tensor} from model.safetensors, its shards, or pytorch_model.bin."""
    files = (list(folder.glob("model.safetensors"))
             or sorted(folder.glob("model-*-of-*.safetensors")))
    try:
        weights = {name: tensor for file in files for name, tensor in load_file(file).items()}
    except (SafetensorError, OSError) as error:
        raise UserError(f"the weights in {folder} are damaged ({error})") from None
    if not files:
        if not (folder / "pytorch_model.bin").exists():
            raise UserError(f"{folder} has neither model.safetensors nor pytorch_model.bin")
        weights = load_tensors(folder / "pytorch_model.bin")
    if not (isinstance(weights, dict)
            and all(isinstance(tensor, torch.Tensor) for tensor in weights.values())):
        raise UserError(f"the file in {folder} does not contain weights")
    return weights


def from_hf_state_dict(hf_weights, tied):
    """Hugging Face's weights by our names, matrices as (out, in). A tied head is added."""
    weights = {}
    for name, tensor in hf_weights.items():
        name = name.removeprefix("transformer.")
        if name.endswith((".attn.bias", ".attn.masked_bias")):
            continue  # the causal mask, which old files hold too
        for hf_part, our_part in HF_NAMES.items():
            name = name.replace(hf_part, our_part)
        weights[name] = tensor.T if name.endswith(TRANSPOSED) else tensor
    if tied and "wte.weight" in weights:
        weights["head.weight"] = weights["wte.weight"]
    return weights


def find_tokenizer(folder, hf_config):
    """'gpt2' if the folder's vocabulary is GPT-2's, UNKNOWN if it is another.

    Without a vocabulary: what our export wrote to config.json, else a guess from vocab_size.
    """
    def read(name):
        return parse_json((folder / name).read_text(encoding="utf-8"))

    try:
        if (folder / "vocab.json").exists():
            vocabulary = read("vocab.json")
        elif (folder / "tokenizer.json").exists():
            vocabulary = read("tokenizer.json")["model"]["vocab"]
        else:
            noted = hf_config.get("nanolab_tokenizer")
            return str(noted or guess_tokenizer(hf_config.get("vocab_size")))
        is_gpt2 = vocabulary_sha256(vocabulary) == GPT2_VOCABULARY_SHA256
    except (ValueError, KeyError, AttributeError, TypeError):
        raise UserError(f"the tokenizer in {folder} is damaged") from None
    return "gpt2" if is_gpt2 else UNKNOWN


def to_hf_config(config, tokenizer):
    """-> GPT2Config's options. config: a GPTConfig that GPT-2 can express; tokenizer: its name."""
    return {"architectures": ["GPT2LMHeadModel"],
            **{key: supported[0] for key, supported in HF_SUPPORTED.items()},
            **{key: getattr(config, our_key) for key, (our_key, _) in HF_SHAPE.items()},
            "n_inner": None,
            **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), config.dropout),
            "tie_word_embeddings": config.tie_weights,
            **end_of_text_ids(tokenizer),
            "dtype": "float32",
            "nanolab_tokenizer": tokenizer}


def end_of_text_ids(tokenizer):
    """A text begins and ends with the token that stands between documents, if it is known."""
    token = get_tokenizer(tokenizer).eot_token if tokenizer in ("gpt2", "bytes") else None
    return {"bos_token_id": token, "eos_token_id": token}


def to_hf_state_dict(model):
    """-> {Hugging Face's name: tensor}, matrices as (in, out).

    A tied head is left out. QKV biases, which GPT-2 always has, are zeros if the model has none.
    """
    hf_weights = {}
    for name, tensor in model.state_dict().items():
        if name == "head.weight" and model.config.tie_weights:
            continue
        tensor = tensor.T if name.endswith(TRANSPOSED) else tensor
        for hf_part, our_part in HF_NAMES.items():
            name = name.replace(our_part, hf_part)
        name = name if name.startswith("lm_head.") else f"transformer.{name}"
        hf_weights[name] = tensor.contiguous()
        if name.endswith("c_attn.weight") and not model.config.qkv_bias:
            hf_weights[name.replace("weight", "bias")] = torch.zeros(3 * model.config.n_embd)
    return hf_weights


# --- out

# GPT-2 can express any value of these. init and zero_init are about the random start only.
GPT2_OPTIONS = {*(our_key for our_key, _ in HF_SHAPE.values()),
                "dropout", "qkv_bias", "tie_weights", "init", "zero_init"}


def export(checkpoint, model, folder):
    """Writes weights, config, tokenizer and a short model card, all of them or nothing, as
    transformers reads a GPT2LMHeadModel.

    checkpoint: from read_checkpoint; model: its GPT; folder: new or empty. Raises UserError.
    """
    tokenizer, folder = checkpoint["tokenizer"], Path(folder)
    check_expressible(model.config, checkpoint["path"])
    card = CARD.format(title=folder.name, name=checkpoint["config"]["name"],
                       n_parameters=model.num_params(), dataset=checkpoint["config"]["dataset"],
                       tokens=checkpoint["tokens"], tokenizer=kind_of(tokenizer))
    files = {"config.json": as_json(to_hf_config(model.config, tokenizer)),
             "generation_config.json": as_json(end_of_text_ids(tokenizer)),
             "README.md": card.encode(),
             **tokenizer_files(tokenizer, model.config.block_size)}
    write_folder(folder, files, to_hf_state_dict(model))


CARD = """---
library_name: transformers
tags: [gpt2, nanolab]
---

# {title}

A GPT-2 of {n_parameters:,} parameters, trained with nanolab as the run `{name}` on {tokens:,}
{tokenizer} tokens of `{dataset}`. It continues text; it follows no instructions.
"""


def check_expressible(config, source):
    """Raises UserError if an option, such as your own intervention, is not GPT-2's."""
    for option in fields(config):
        value = getattr(config, option.name)
        if option.name not in GPT2_OPTIONS and value != option.default:
            raise UserError(f"{source} has {option.name}={value!r}, "
                            f"which transformers' GPT-2 cannot express")


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


def tokenizer_files(tokenizer, block_size):
    """-> {name: bytes} for transformers' AutoTokenizer, which reads GPT-2's tokenizer only."""
    if tokenizer != "gpt2":
        return {}
    get_tokenizer("gpt2")  # downloads the vocabulary if it is not here
    merges, vocabulary = (path.read_bytes() for path in gpt2_vocabulary_files())
    config = {"tokenizer_class": "GPT2Tokenizer", "model_max_length": block_size,
              **dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)}
    return {"merges.txt": merges, "vocab.json": vocabulary,
            "tokenizer_config.json": as_json(config)}


def main():
    parser = argument_parser(__doc__)
    parser.add_argument("command", choices=["export"])
    parser.add_argument("checkpoint", help="such as out/best.pt")
    parser.add_argument("folder", help="where to; it must be new or empty")
    args = parser.parse_args()
    source, folder = Path(args.checkpoint), Path(args.folder)
    is_run = Path(source, "best.pt").is_file()
    if source.is_dir() and not is_run or str(source) in OPENAI_REVISIONS:
        raise UserError(f"{source} is no file that train.py saved, such as out/best.pt")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is there and not empty; choose another folder, or remove it")
    checkpoint = read_checkpoint(source)
    export(checkpoint, load_model(checkpoint), folder)
    print(f"wrote {folder}; to publish it: hf upload USER/NAME {folder}")


if __name__ == "__main__":
    run_script(main)
