"""Mean losses; the test result of a checkpoint, which is saved in NAME.test.json next to it."""

import hashlib
import json
import math
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from nanolab import distributed
from nanolab.checkpoint import load_model
from nanolab.common import UserError, describe, write_atomically
from nanolab.data import TokenDataset, read_meta


def mean_loss(model, dataset, n_tokens, batch_size, world):
    """Mean cross-entropy in nats over the first n_tokens of a TokenDataset, in whole windows: at
    least one, at most all. The processes share the work, and the result does not depend on their
    number or on batch_size. Draws no random number."""
    n_windows = min(max(n_tokens // dataset.block_size, 1), len(dataset))
    [loss] = mean_losses(model, dataset, [range(n_windows)], batch_size, world)
    return loss


@torch.no_grad()
def mean_losses(model, dataset, groups, batch_size, world):
    """The mean loss of each group of windows. groups: ranges. -> [loss]"""
    was_training = model.training
    model.eval()
    batches = [(i, group[start:start + batch_size]) for i, group in enumerate(groups)
               for start in range(0, len(group), batch_size)][world.rank::world.size]
    # one tensor: small ones, kept from each batch, would split the memory that batches reuse
    losses = torch.zeros(len(batches), device=world.device)
    for k, (_, ids) in enumerate(batches):
        with world.autocast():
            losses[k] = model(*dataset.batch(ids, world.device))
    model.train(was_training)
    sums = torch.zeros(len(groups), dtype=torch.float64)
    for (i, ids), loss in zip(batches, losses.cpu().double()):
        sums[i] += loss * len(ids)
    if world.size > 1:
        sums = sums.to(world.device)
        dist.all_reduce(sums)
    return [total / len(group) for total, group in zip(sums.tolist(), groups)]


def measure_loss(checkpoint, data_dir, dataset, split, block_size, batch_size, world):
    """The loss of a checkpoint, from read_checkpoint, on a whole split, test or val, in windows of
    block_size tokens: a dict, as study.py reads it. Raises UserError."""
    path, config = checkpoint["path"], checkpoint["config"]
    meta = read_meta(data_dir, dataset, config["vocab_size"])
    if split not in meta["splits"]:
        raise UserError(f"the data set {dataset} has no {split} split; --split=val measures its "
                        "validation split")
    if meta["tokenizer"] != checkpoint["tokenizer"]:
        raise UserError(f"{path} was trained on {checkpoint['tokenizer']} tokens, "
                        f"the data set {dataset} has {meta['tokenizer']}")
    if block_size > config["block_size"]:
        raise UserError(f"{path} reads at most {config['block_size']} tokens, not {block_size}")
    data = TokenDataset(data_dir, dataset, split, block_size, config["vocab_size"])
    model = load_model(checkpoint).to(world.device)
    n_parameters = model.num_params()
    if world.device.type == "cpu" and distributed.DEFAULT_THREADS > 1:
        distributed.use_threads(distributed.DEFAULT_THREADS, shared=True)
        model = distributed.SharedModel(model)
    groups = data.groups_of_documents(meta["eot_id"])
    losses = mean_losses(model, data, groups, batch_size, world)
    sizes = [len(group) for group in groups]
    loss = math.fsum(map(math.prod, zip(losses, sizes))) / len(data)
    if not math.isfinite(loss):
        raise UserError(f"the {split} loss of {path} is not finite: its weights are too large")
    facts, val_loss = meta["splits"][split], checkpoint.get("val_loss")
    bits_per_byte = None  # nanoGPT's data sets do not say how many bytes their text has
    if "bytes" in facts:
        bits_per_byte = loss / math.log(2) * facts["tokens"] / facts["bytes"]
    return {"name": config["name"], "path": path, "split": split,
            "perplexity": math.exp(min(loss, 700)), "bits_per_byte": bits_per_byte,
            "windows": len(data), "tokens": len(data) * block_size,
            "group_windows": sizes, "group_losses": [round(each, 5) for each in losses],
            "block_size": block_size, "parameters": n_parameters,
            "dataset": dataset, f"{split}_sha256": facts["sha256"], "amp": amp_name(world),
            "step": checkpoint["step"], "trained_tokens": checkpoint["tokens"],
            "averaged_steps": checkpoint.get("averaged_steps", 0),
            "val_loss": val_loss if val_loss is not None and math.isfinite(val_loss) else None,
            "code": checkpoint.get("code"), "config": config,
            f"{split}_loss": loss}  # of val, in the place of the run's own


def amp_name(world):
    return str(world.dtype).removeprefix("torch.") if world.dtype else "off"


def loss_of(result):
    return result[f"{result['split']}_loss"]


def result_path(path, split):
    return Path(path).with_suffix(f".{split}.json")


def load_results(path, split):
    """What is saved for the checkpoint as it is: {"checkpoint_sha256": ..., "results": [...]}."""
    if not Path(path).is_file():
        return {"results": []}
    with open(path, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    try:
        saved = json.loads(result_path(path, split).read_text())
        if saved["checkpoint_sha256"] == sha256:
            return saved
    except (OSError, ValueError, KeyError, TypeError):
        pass  # missing or damaged: measure again
    return {"checkpoint_sha256": sha256, "results": []}


def save_results(path, split, saved):
    try:
        write_atomically(result_path(path, split), json.dumps(saved, indent=1) + "\n")
    except OSError as error:
        print(f"{path}: the result could not be saved ({describe(error)}); "
              "it will be measured again", file=sys.stderr)
