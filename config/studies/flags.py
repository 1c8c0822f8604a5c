"""Each newer flag alone on the ladder's modern recipe, and then together what helped.

    python -m config.studies.flags alone     every flag, five seeds, at the sizes 2x32 and 2x48
    python -m config.studies.flags stack     the stack at 2x64, five seeds

Each prints arguments for train.py, a line a run; flags.sh runs them. Every run has 20 tokens a
parameter and the values that the ladder found for the modern recipe at its size
(config/studies/ladder.py), whose own runs are the baseline. Flags are chosen by validation loss.
"""

import sys

from config.studies.ladder import arguments, run_command, tuned

SIZES, THIRD_SIZE, SEEDS = ("2x32", "2x48"), "2x64", range(1, 6)

# The files in config/interventions/ have the values of models of another size. A rate that is a
# multiple of the matrices' is tried at a third and at three times.
FLAGS = {
    "cosine_to_zero": "--min_lr_ratio=0",
    "decay_to_zero": "--schedule=wsd --cooldown_fraction=0.7 --min_lr_ratio=0",
    "embedding_lr_0.3": "--embedding_lr=0.3",
    "embedding_lr_3": "--embedding_lr=3",
    "head_lr_0.3": "--head_lr=0.3",
    "head_lr_3": "--head_lr=3",
    "scalar_lr_0.3": "--scalar_lr=0.3",
    "scalar_lr_3": "--scalar_lr=3",
    "beta2_0.95": "--beta2=0.95",
    "adamw_weight_decay_0.001": "--adamw_weight_decay=0.001",
    "one_head": "--n_head=1",
    **{name: f"config/interventions/{name}.py" for name in (
        "cautious_decay", "embed_norm", "logit_softcap", "normuon", "qkv_bias", "relu2", "rmsnorm",
        "swiglu", "tail_average", "value_embeddings", "value_residual", "x0_lambdas",
        "zero_init")},
    "gpt2_init": "--init=gpt2",
}
STACK = ()  # what helped


def alone():
    for size in SIZES:
        for seed in SEEDS:
            for name, flags in FLAGS.items():
                yield run(name, flags, size, seed)


def stack():
    if not STACK:
        sys.exit("STACK in config/studies/flags.py is empty: put in what helped")
    for seed in SEEDS:
        yield run("stack", " ".join(FLAGS[name] for name in STACK), THIRD_SIZE, seed)


def run(name, flags, size, seed):
    folder = f"out/flags/{size}/{name}/{seed}"
    line = arguments("modern", size, tuned("modern", size), folder, seed)
    return f"{line} {flags} --name={name}"


if __name__ == "__main__":
    run_command(__doc__, alone, stack)
