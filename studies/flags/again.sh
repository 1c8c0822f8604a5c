#!/usr/bin/env bash
# The flags that were chosen, one_head and swiglu, each alone on the mended recipe: heads of 32 and
# attention logits up to 12, with the values of studies/heads_of_32. By validation loss.
set -euo pipefail

flags=(
  one_head=--n_head=1 value_embeddings value_residual qkv_bias tail_average swiglu
  decay_to_zero="--schedule=wsd --cooldown_fraction=0.7 --min_lr_ratio=0"
  embedding_lr_3=--embedding_lr=3)

again() {  # WIDTH TOKENS RATE SEEDS FLAGS
  python study.py config/modern.py config/ladder.py --batch_size=16 --weight_decay=0.0921 \
    --beta2=0.99 --warmup_fraction=0 --n_layer=2 --n_head=$(($1 / 32)) --n_embd=$1 \
    --max_tokens=$2 --learning_rate=$3 --seeds=$4 --jobs="${JOBS:-2}" \
    --out="out/flags/again_2x$1" --json="out/flags_again_2x$1.json" --baseline=modern "${@:5}"
}

again 32 916_480 0.0834 5 --validation --arms "${flags[@]:1}"  # which has one head
again 64 2_816_000 0.0284 3 --validation --arms "${flags[@]}"
again 96 5_698_560 0.0157 3 --arms stack="--value_embeddings --tail_average=0.05"  # the two chosen
