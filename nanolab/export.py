"""A checkpoint as a folder that Hugging Face's transformers reads as a GPT2LMHeadModel."""

import json
import math
import os
import re
import shutil
from dataclasses import fields
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file

from config import SEEDS
from nanolab.common import UserError, describe, parse_json
from nanolab.huggingface import (HF_SHAPE, OPENAI_REVISIONS, end_of_text_ids, to_hf_config,
                                 to_hf_state_dict)
from nanolab.results import load_result
from nanolab.tokenizer import END_OF_TEXT, UNKNOWN, get_tokenizer, gpt2_vocabulary_files

# GPT-2 can express any value of these. `init` is about the random start only.
GPT2_OPTIONS = {*(our_key for our_key, _ in HF_SHAPE.values()),
                "dropout", "qkv_bias", "tie_weights", "init"}


def export(checkpoint, model, folder, repository=None):
    """Writes weights, config, tokenizer and model card, all of them or nothing. Raises UserError.

    checkpoint: from read_checkpoint; model: its GPT; folder: new or empty;
    repository: on the hub, for the card's example.
    """
    source, tokenizer, folder = checkpoint["path"], checkpoint["tokenizer"], Path(folder)
    check_export(source, folder)
    check_expressible(model.config, source)
    card = model_card(checkpoint, model, folder.name)
    card = card.replace("THIS FOLDER", repository or "THIS FOLDER")
    files = {"config.json": as_json(to_hf_config(model.config, tokenizer)),
             "generation_config.json": as_json(end_of_text_ids(tokenizer)),
             "README.md": card.encode(),
             **tokenizer_files(tokenizer, model.config.block_size)}
    write_folder(folder, files, to_hf_state_dict(model))


def check_export(source, folder, repository=None):
    """Raises UserError if `source` is no file of ours, or `folder` is in use. Reads no weights."""
    is_run = Path(source, "best.pt").is_file()
    if Path(source).is_dir() and not is_run or str(source) in OPENAI_REVISIONS:
        raise UserError(f"{source} is no file that train.py saved, such as out/best.pt")
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is there and not empty; choose another folder, or remove it")
    if repository is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise UserError(f"--push={repository} must be USER/NAME")


def push(folder, repository):
    """Uploads an exported folder to a repository on the hub, made private if it is new, with the
    user's own token. -> its address. Raises UserError; the folder stays."""
    import huggingface_hub  # here, because most exports do not need it
    try:
        hub = huggingface_hub.HfApi()
        url = hub.create_repo(repository, private=True, exist_ok=True)
        hub.upload_folder(repo_id=repository, folder_path=folder,
                          commit_message="Exported by nanolab")
    except Exception as error:  # of many classes, from huggingface_hub and the packages it calls
        reason = (str(error).strip().splitlines() or [""])[0]
        raise UserError(f"{folder} is written, but could not be pushed to {repository} "
                        f"({type(error).__name__}: {reason}); `hf auth login` stores a token, "
                        f"`hf upload {repository} {folder}` tries again") from None
    return url


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


def model_card(checkpoint, model, title):
    """README.md: how the weights were made, from the checkpoint and the files beside it."""
    config, path = checkpoint["config"], Path(checkpoint["path"])
    usage = USAGE[checkpoint["tokenizer"]].format(length=min(config["block_size"], 50))
    training = (f"{checkpoint['step']:,} steps of {config['global_batch_size']} x "
                f"{config['block_size']:,} tokens, {checkpoint['tokens']:,} tokens")
    if n := checkpoint.get("averaged_steps"):
        training += f", the mean of the last {n:,} steps' weights,"
    val_loss = checkpoint["best_val_loss"]
    val_loss = f"{val_loss:.6f} nats per token" if math.isfinite(val_loss) else "not measured"
    seeds = ", ".join(f"{key} {config[key]}" for key in SEEDS)
    versions = ", ".join(map(" ".join, checkpoint["versions"].items()))
    options = "\n".join(f"{key} = {value!r}" for key, value in config.items()
                        if key not in ("out_dir", "data_dir"))
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [gpt2, nanolab]
---

# {title}

A GPT-2 of {model.num_params():,} parameters, trained with nanolab as the run `{config["name"]}`.
It continues text; it follows no instructions.

{usage}

| | |
| --- | --- |
| data | `{config["dataset"]}`, tokenizer {checkpoint["tokenizer"]} |
| sha256 of train.bin | {checkpoint["data_sha256"]} |
| training | {training} in {checkpoint["seconds"] / 3600:.2f} hours |
| best validation loss | {val_loss} |
| test loss | {saved_test_losses(path)} |
| whole run | {machine_and_cost(path)} |
| seeds | {seeds} |
| versions | {versions} |

```python
{options}
```
"""


def saved_test_losses(path):
    """What eval.py measured of the checkpoint as it is now."""
    form = "{test_loss:.6f} nats per token, on {tokens:,} tokens of `{dataset}`, amp {amp}"
    losses = [form.format(**result) for result in load_result(path)["results"]]
    return "; ".join(losses) or "not measured (run eval.py before the export)"


def machine_and_cost(path):
    """From summary.json, which a run writes at its end."""
    form = "{machine}, {tokens_per_second:,} tokens/s, {peak_memory_mb:,} MB, ${cost:.2f}"
    try:
        return form.format(**parse_json(path.with_name("summary.json").read_text()))
    except (OSError, ValueError, KeyError, TypeError):  # missing, or damaged
        return "not recorded"


USAGE = {"gpt2": """```python
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("THIS FOLDER")
tokenizer = AutoTokenizer.from_pretrained("THIS FOLDER")
tokens = tokenizer("Every effort moves you", return_tensors="pt")
print(tokenizer.decode(model.generate(**tokens, max_length={length})[0]))
```""", "bytes": """There are no tokenizer files: tokens are bytes of UTF-8, and 256 ends a text.

```python
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("THIS FOLDER")
tokens = model.generate(torch.tensor([list(b"Every effort moves you")]), max_length={length})
text = bytes(token for token in tokens[0].tolist() if token < 256)
print(text.decode(errors="replace"))
```""", UNKNOWN: "There are no tokenizer files: the run's data set names no tokenizer."}
