#!/usr/bin/env bash
# Rope and modern on a half and a quarter of the tokens, at their full rates, by validation loss.
set -euo pipefail

fewer() {  # WIDTH TOKENS SEEDS, and the rates of rope and modern
  for part in 2 4; do
    python study.py config/cloud.py config/ladder.py --weight_decay=0.127 --beta2=0.95 \
      --warmup_fraction=0 --n_layer=2 --n_embd=$1 --n_head=$(($1 / 32)) \
      --max_tokens=$(($2 / part)) --jobs="${JOBS:-2}" --validation --seeds=$3 --position=rope \
      --learning_rate=$4 --out=out/heads_of_32/runs_$1_1_$part --baseline=rope \
      --arms modern="config/modern.py --batch_size=16 --weight_decay=0.0921 --beta2=0.99
        --warmup_fraction=0 --position=rope --learning_rate=$5"
  done
}

fewer 32 916480 5 0.0306 0.0834
fewer 64 2816000 3 0.0158 0.0284
