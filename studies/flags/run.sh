#!/usr/bin/env bash
# Each newer flag alone on the ladder's modern recipe at its two smallest sizes, by validation loss;
# then what helped, together, at the third, on the test split: `stack` with the recipe's values,
# `stack_tuned` with those of the trials on record (README.md). Then the chosen ones again, on the
# recipe of studies/heads_of_32. Needs `python prepare.py pypi`. Writes out/flags*; prints tables.
set -euo pipefail

# these runs are older than the bound of attention logits, and all are older than what they found
before="--value_embeddings=False --tail_average=0"
modern="--qk_bound=0 $before --batch_size=16 --weight_decay=0.09209 --beta2=0.99"
modern+=" --warmup_fraction=0"
decay_to_zero="--schedule=wsd --cooldown_fraction=0.7 --min_lr_ratio=0"

# The files in config/interventions/ have the values of models of another size. A rate that is a
# multiple of the matrices' is tried at a third and at three times.
flags=(
  cosine_to_zero=--min_lr_ratio=0
  decay_to_zero="$decay_to_zero"
  embedding_lr_0.3=--embedding_lr=0.3 embedding_lr_3=--embedding_lr=3
  head_lr_0.3=--head_lr=0.3 head_lr_3=--head_lr=3
  scalar_lr_0.3=--scalar_lr=0.3 scalar_lr_3=--scalar_lr=3
  beta2_0.95=--beta2=0.95 adamw_weight_decay_0.001=--adamw_weight_decay=0.001
  one_head=--n_head=1 gpt2_init=--init=gpt2
  tail_average=--tail_average=0.05 value_embeddings=--value_embeddings
  cautious_decay embed_norm logit_softcap normuon qkv_bias relu2 rmsnorm swiglu
  value_residual x0_lambdas zero_init)

alone() {  # HEADS WIDTH TOKENS RATE
  python study.py config/modern.py config/ladder.py $modern --n_layer=2 --n_head=$1 --n_embd=$2 \
    --max_tokens=$3 --learning_rate=$4 --jobs="${JOBS:-2}" --validation --out="out/flags/2x$2" \
    --json="out/flags_2x$2.json" --baseline=modern --arms "${flags[@]}"
}

alone 2 32 916_480 0.0502
alone 3 48 1_743_360 0.03338
python -m studies.flags.flags choose out/flags_2x32.json out/flags_2x48.json

stack="config/modern.py $modern --n_head=1 --embedding_lr=3 --activation=swiglu"
stack+=" --value_residual --value_embeddings --tail_average=0.05 $decay_to_zero"
rope_qk_norm="config/interventions/rope.py config/interventions/qk_norm.py --qk_bound=0"
rope_qk_norm+=" --weight_decay=0.1268 --beta2=0.95 --warmup_fraction=0"
python study.py config/cloud.py config/ladder.py --weight_decay=0.0196 --beta2=0.9995 \
  --warmup_fraction=0 --n_layer=2 --n_head=2 --n_embd=64 --max_tokens=2_816_000 \
  --learning_rate=0.01299 --jobs="${JOBS:-2}" --out=out/flags/2x64 --baseline=published --arms \
  rope_qk_norm="$rope_qk_norm --learning_rate=0.01378" \
  modern="config/modern.py $modern --learning_rate=0.02462" stack="$stack --learning_rate=0.02462" \
  stack_tuned="$stack --learning_rate=0.03994 --weight_decay=0.006047 --beta2=0.95"
python study.py out/flags/2x64 --baseline=modern --json=out/flags_stack.json

again() {  # WIDTH TOKENS RATE SEEDS, and words of study.py
  python study.py config/modern.py config/ladder.py $before --batch_size=16 --weight_decay=0.0921 \
    --beta2=0.99 --warmup_fraction=0 --n_layer=2 --n_head=$(($1 / 32)) --n_embd=$1 \
    --max_tokens=$2 --learning_rate=$3 --seeds=$4 --jobs="${JOBS:-2}" \
    --out="out/flags/again_2x$1" --json="out/flags_again_2x$1.json" --baseline=modern "${@:5}"
}

flags=(tail_average=--tail_average=0.05 value_embeddings=--value_embeddings
  decay_to_zero="$decay_to_zero" embedding_lr_3=--embedding_lr=3 qkv_bias swiglu value_residual)
again 32 916_480 0.0834 5 --validation --arms "${flags[@]}"
again 64 2_816_000 0.0284 3 --validation --arms "${flags[@]}" one_head=--n_head=1
python -m studies.flags.flags choose out/flags_again_2x32.json out/flags_again_2x64.json
again 96 5_698_560 0.0157 3 --arms stack="--value_embeddings --tail_average=0.05"  # the two chosen
