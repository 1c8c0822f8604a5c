"""What a model gets out of text further back: its losses by the position in the context, and on a
text that it reads twice, which induction heads copy (Olsson et al., "In-context learning and
induction heads", 2022). Adds checkpoints to a file, and prints the means over seeds of its rows.

    python -m studies.heads_of_32.by_position FILE.json [CHECKPOINT ...]
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from nanolab.checkpoint import load_model, read_checkpoint
from nanolab.common import UserError, run_script
from nanolab.data import TokenDataset
from nanolab.study.tables import format_table

POSITIONS = {f"{a}-{b - 1}": slice(a, b) for a, b in (
    (0, 16), (16, 32), (32, 64), (64, 96), (96, 128))}


@torch.no_grad()
def measure(path):
    """The mean losses of a checkpoint, over the text that its run validated on."""
    checkpoint, losses, repeated = read_checkpoint(path), [], []
    config, model = checkpoint["config"], load_model(checkpoint).eval()
    data = TokenDataset(config["data_dir"], config["dataset"], "val", config["block_size"])
    half, ids = config["block_size"] // 2, range(config["eval_tokens"] // config["block_size"])
    for start in range(0, min(len(ids), len(data)), 64):
        x, y = data.batch(ids[start:min(start + 64, len(data))])
        twice = x[:, :half].repeat(1, 2)
        losses.append(F.cross_entropy(model(x).mT, y, reduction="none"))
        repeated.append(F.cross_entropy(model(twice)[:, :-1].mT, twice[:, 1:], reduction="none"))
    parts = {name: torch.cat(losses)[:, part] for name, part in POSITIONS.items()}
    # the first tokens of a copy cannot be told from another text
    parts["half, read once"] = torch.cat(repeated)[:, 8:half - 1]
    parts["again"] = torch.cat(repeated)[:, half + 8:]
    return {"width": config["n_embd"], "recipe": config["name"], "steps": checkpoint["step"],
            "seed": config["seed"], **{name: part.mean().item() for name, part in parts.items()}}


def main():
    file, groups = Path(*sys.argv[1:2]), {}
    rows = json.loads(file.read_text()) if file.is_file() else []
    if len(sys.argv) > 2:
        rows += map(measure, sys.argv[2:])
        file.write_text(json.dumps(rows, indent=0) + "\n")
    if not rows:
        raise UserError("name a results file that is there, or checkpoints to measure", exit_code=2)
    for row in rows:
        groups.setdefault(tuple(map(row.pop, ("width", "recipe", "steps"))), []).append(row)
    names = [name for name in rows[0] if name != "seed"]
    table = [["width", "recipe", "steps", "n", *names]]
    for (width, recipe, steps), members in sorted(groups.items()):
        table.append([f"{width}", recipe, f"{steps:,}", f"{len(members)}", *(
            f"{np.mean([row[name] for row in members]):.3f}" for name in names)])
    print(format_table(table, markdown=True))


if __name__ == "__main__":
    run_script(main)
