"""What a model gets out of text further back: its validation loss at each position of the context,
and on a text that is repeated, which a model with induction heads copies (Olsson et al.,
"In-context learning and induction heads", 2022).

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
    losses, repeated = [], []  # (T,) of each window; (T - 1,) of its first half, twice
    for window in range(min(config["eval_tokens"] // config["block_size"], len(data))):
        x, y = data.batch([window], torch.device("cpu"))
        twice = x[:, :config["block_size"] // 2].repeat(1, 2)
        losses.append(F.cross_entropy(model(x)[0], y[0], reduction="none"))
        repeated.append(F.cross_entropy(model(twice)[0, :-1], twice[0, 1:], reduction="none"))
    losses, repeated = (torch.stack(each).double().mean(0).tolist() for each in (losses, repeated))
    return {"name": config["name"], "seed": config["seed"], "n_embd": config["n_embd"],
            "losses": losses, "repeated": repeated}


def main():
    if len(sys.argv) < 2:
        raise UserError("name a results file", exit_code=2)
    file, groups = Path(sys.argv[1]), {}
    rows = json.loads(file.read_text()) if file.exists() else []
    if len(sys.argv) > 2:
        rows += map(measure, sys.argv[2:])
        file.write_text(json.dumps(rows) + "\n")
    for row in rows:
        groups.setdefault((f"{row['n_embd']}", row["name"]), []).append(row)
    table = [["width", "recipe", "n", *(f"{a}-{b - 1}" for a, b in pairwise(EDGES)),
              "half, from 8 on", "again"]]
    for key, members in sorted(groups.items()):
        losses, repeated = (np.mean([row[name] for row in members], axis=0)
                            for name in ("losses", "repeated"))
        half = len(losses) // 2
        parts = [*(losses[a:b] for a, b in pairwise(EDGES)), repeated[8:half - 1],
                 repeated[half + 8:]]  # a copy has something to go by
        table.append([*key, str(len(members)), *(f"{part.mean():.3f}" for part in parts)])
    print(format_table(table, markdown=True))


if __name__ == "__main__":
    run_script(main)
