"""Prints the commands that tune each recipe at the ladder's smallest size, 24 random trials each.

    python config/studies/ladder_tuning.py | OMP_NUM_THREADS=1 xargs -P 2 -L 1 python train.py --resume

A trial draws learning rate, weight decay, beta2 and warm-up. All trials have seed 100, which no other
run of the ladder has, and are compared by validation loss (summary.json's final_val_loss). Recipes: a,
the published stack with AdamW; b, the same with rope and qk_norm; c, with Muon too.
"""

import numpy as np

RECIPES = {"a": "config/cloud.py",
           "b": "config/cloud.py config/interventions/rope.py config/interventions/qk_norm.py",
           "c": "config/modern.py"}
RATES = {"a": (2e-3, 6.4e-2), "b": (2e-3, 6.4e-2), "c": (4e-3, 1.28e-1)}
SIZE = "--n_layer=2 --n_head=2 --n_embd=64"
PARAMETERS = 140_800  # of recipe a; b and c have no position embeddings
N_TRIALS = 24


def log_uniform(rng, low, high):
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def main():
    for trial in range(N_TRIALS):
        for i, (recipe, files) in enumerate(RECIPES.items()):
            rng = np.random.default_rng([trial, i])
            print(f"{files} config/ladder.py {SIZE} --name={recipe} --seed=100 "
                  f"--max_tokens={20 * PARAMETERS} "
                  f"--learning_rate={log_uniform(rng, *RATES[recipe]):.4g} "
                  f"--weight_decay={log_uniform(rng, 1e-3, 1.0):.4g} "
                  f"--beta2={rng.choice([0.95, 0.98, 0.99, 0.999])} "
                  f"--warmup_fraction={rng.choice([0.0, 0.02, 0.05, 0.1])} "
                  f"--out_dir=out/ladder/tuning/{recipe}/{trial}")


if __name__ == "__main__":
    main()
