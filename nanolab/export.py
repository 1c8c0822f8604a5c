"""Weights out, to a folder that transformers reads: as its GPT-2 where that computes the same, else
with model.py's own code beside them.
"""

import ast
import json
import os
import shutil
from dataclasses import fields
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file

from nanolab.common import ROOT, UserError, describe
from nanolab.gpt2 import gpt2_config, gpt2_weights, is_gpt2, untied
from nanolab.tokenizer import END_OF_TEXT, byte_characters, get_tokenizer, gpt2_vocabulary_files


def export(checkpoint, model, folder):
    """Writes weights, config, tokenizer and a short model card, all of them or nothing, as
    AutoModelForCausalLM reads them; where GPT-2 cannot express the model, its code too.

    checkpoint: from huggingface.read_any; model: its GPT; folder: new or empty. Raises UserError.
    """
    tokenizer, config = checkpoint["tokenizer"], model.config
    if is_gpt2(config):
        weights, hf_config, code = gpt2_weights(model), gpt2_config(config), {}
    else:
        weights, hf_config, code = own_weights(model), own_config(config), own_code()
    ids = end_of_text_ids(tokenizer)
    hf_config |= {"tie_word_embeddings": config.tie_weights, **ids, "dtype": "float32",
                  "nanolab_tokenizer": tokenizer}
    files = {"config.json": as_json(hf_config), "generation_config.json": as_json(ids), **code,
             **tokenizer_files(tokenizer, config.block_size)}
    card = model_card(checkpoint, model, Path(folder).name, files)
    write_folder(Path(folder), {**files, "README.md": card.encode()}, weights)


def own_config(config):
    names = [f.name for f in fields(config)]
    return {"architectures": ["NanolabForCausalLM"], "model_type": "nanolab",
            "auto_map": {"AutoConfig": "modeling_nanolab.NanolabConfig",
                         "AutoModelForCausalLM": "modeling_nanolab.NanolabForCausalLM"},
            **{name: getattr(config, name) for name in names}, "nanolab_options": names}


def own_weights(model):
    return {f"gpt.{name}": tensor for name, tensor in untied(model).items()}


def own_code():
    """-> {name: bytes}: for_transformers.py and what it imports of ours, as one file."""
    text = with_own_imports(ROOT / "nanolab" / "for_transformers.py", set())
    header = '"""A model of nanolab, for transformers: files of nanolab, one after another."""'
    return {"modeling_nanolab.py": f"{header}\n\n{text}".encode()}


def with_own_imports(path, done):
    """The text of one of our files, after that of those it imports, without these imports. config/
    is left out: of the options a model needs no more than their values."""
    done.add(path)
    text, before = path.read_text(), ""
    lines = text.splitlines(keepends=True)
    for node in reversed(ast.parse(text).body):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in (
                "config", "model", "nanolab"):
            del lines[node.lineno - 1:node.end_lineno]
            imported = ROOT / f"{node.module.replace('.', '/')}.py"
            if imported.exists() and imported not in done:
                before += with_own_imports(imported, done)
    return before + "".join(lines)


def end_of_text_ids(tokenizer):
    """A text begins and ends with the token that stands between documents, if it is known."""
    token = get_tokenizer(tokenizer).eot_token if tokenizer in ("gpt2", "bytes") else None
    return {"bos_token_id": token, "eos_token_id": token}


def tokenizer_files(tokenizer, block_size):
    """-> {name: bytes} for AutoTokenizer; none for a tokenizer other than GPT-2's and bytes."""
    config = {"model_max_length": block_size,
              **dict.fromkeys(("bos_token", "eos_token"), END_OF_TEXT)}
    if tokenizer == "bytes":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        return {"tokenizer.json": as_json(BYTE_TOKENIZER), "tokenizer_config.json": as_json(config)}
    if tokenizer != "gpt2":
        return {}
    get_tokenizer("gpt2")  # downloads the vocabulary if it is not here
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


def model_card(checkpoint, model, title, files):
    """README.md. files: the names of the others."""
    config = checkpoint["config"]
    origin = f"imported by nanolab from `{Path(checkpoint['path']).name}`"
    if config["dataset"]:
        origin = (f"trained with nanolab as the run `{config['name']}` on "
                  f"{checkpoint['tokens']:,} tokens of `{config['dataset']}`")
    card = CARD.format(kind="gpt2" if is_gpt2(model.config) else "custom_code", title=title,
                       n_parameters=model.num_params(), origin=origin)
    if "modeling_nanolab.py" in files:
        card += CODE_NOTE
    if "tokenizer_config.json" not in files:
        card += NO_TOKENIZER_NOTE
    return card


CARD = """---
library_name: transformers
tags: [{kind}, nanolab]
---

# {title}

A GPT of {n_parameters:,} parameters, {origin}.
It continues text; it follows no instructions.
"""

CODE_NOTE = """
**Loading it runs code**: `modeling_nanolab.py` in this folder is the model, so read it first.

    AutoModelForCausalLM.from_pretrained("THIS FOLDER", trust_remote_code=True)
"""

NO_TOKENIZER_NOTE = """
There are no tokenizer files; `nanolab_tokenizer` in config.json says what the tokens are.
"""


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
