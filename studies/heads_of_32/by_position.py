"""The validation loss of checkpoints by position in the context, and what it falls from 16 - 31 to
the last quarter: what a model gets out of text that is far away.

    python -m studies.heads_of_32.by_position FILE.json CHECKPOINT ...
"""

import json
import sys

import torch
import torch.nn.functional as F

from nanolab.checkpoint import load_model, read_checkpoint
from nanolab.common import run_script
from nanolab.data import TokenDataset


@torch.no_grad()
def losses_by_position(checkpoint):
    """-> the mean loss at each position, over the text that its run validated on."""
    config = checkpoint["config"]
    model = load_model(checkpoint).eval()
    data = TokenDataset("data", config["dataset"], "val", config["block_size"],
                        config["vocab_size"])
    sums = torch.zeros(config["block_size"], dtype=torch.float64)
    n_windows = min(config["eval_tokens"] // config["block_size"], len(data))
    for start in range(0, n_windows, 64):
        x, y = data.batch(range(start, min(start + 64, n_windows)), torch.device("cpu"))
        logits = model.logits(model.hidden_states(x))
        sums += F.cross_entropy(logits.mT, y, reduction="none").sum(0)  # (64, T) -> (T,)
    return (sums / n_windows).tolist()


def main(path, *checkpoints):
    rows = []
    for checkpoint in map(read_checkpoint, checkpoints):
        config, losses = checkpoint["config"], losses_by_position(checkpoint)
        rows.append({"name": config["name"], "seed": config["seed"], "n_embd": config["n_embd"],
                     "n_head": config["n_head"], "step": checkpoint["step"], "losses": losses})
        means = [sum(losses[a:b]) / (b - a) for a, b in ((0, 16), (16, 32), (32, 64), (64, 96),
                                                         (96, 128))]
        print("|", config["n_embd"], "|", config["name"], "|", config["seed"], "|",
              " | ".join(f"{each:.3f}" for each in means), f"| {means[-1] - means[1]:+.3f} |")
    with open(path, "w") as file:
        json.dump(rows, file)


if __name__ == "__main__":
    run_script(lambda: main(*sys.argv[1:]))
