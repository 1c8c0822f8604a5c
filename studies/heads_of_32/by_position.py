"""The validation loss at each position of the context: what a model gets out of text further back.

    python -m studies.heads_of_32.by_position FILE.json [CHECKPOINT ...]

Adds the checkpoints to the file, then prints the means over seeds of all that are in it.
"""

import json
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from nanolab.checkpoint import load_model, read_checkpoint
from nanolab.common import UserError, run_script
from nanolab.data import TokenDataset
from nanolab.study.tables import format_table

EDGES = (0, 16, 32, 64, 96, 128)


@torch.no_grad()
def measure(path):
    """The losses of a checkpoint, over the text that its run validated on."""
    checkpoint = read_checkpoint(path)
    config, model = checkpoint["config"], load_model(checkpoint).eval()
    data = TokenDataset(config["data_dir"], config["dataset"], "val", config["block_size"],
                        config["vocab_size"])
    losses = []  # (T,) of each window
    for window in range(min(config["eval_tokens"] // config["block_size"], len(data))):
        x, y = data.batch([window], torch.device("cpu"))
        losses.append(F.cross_entropy(model(x)[0], y[0], reduction="none"))
    return {"name": config["name"], "seed": config["seed"], "n_embd": config["n_embd"],
            "losses": torch.stack(losses).double().mean(0).tolist()}


def main():
    if len(sys.argv) < 2:
        raise UserError("name a results file", exit_code=2)
    file, groups = Path(sys.argv[1]), {}
    rows = json.loads(file.read_text()) if file.exists() else []
    if len(sys.argv) > 2:
        rows += map(measure, sys.argv[2:])
        file.write_text(json.dumps(rows) + "\n")
    for row in rows:
        groups.setdefault((f"{row['n_embd']}", row["name"]), []).append(row["losses"])
    table = [["width", "recipe", "n", *(f"{a}-{b - 1}" for a, b in pairwise(EDGES))]]
    for key, losses in sorted(groups.items()):
        mean = np.mean(losses, axis=0)
        table.append([*key, str(len(losses)), *(f"{mean[a:b].mean():.3f}"
                                                for a, b in pairwise(EDGES))])
    print(format_table(table, markdown=True))


if __name__ == "__main__":
    run_script(main)
