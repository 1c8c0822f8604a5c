#!/usr/bin/env bash
# Three recipes at five sizes, 20 tokens a parameter; `modern` on a half, a quarter and an eighth of
# them, too. Rates and the other values are those that the trials in tuning.json found (README.md).
# Needs `python prepare.py pypi`, once. Writes out/ladder/ and out/ladder*.json; prints the tables.
# Run it again after an interruption: it goes on.
set -euo pipefail

published="--weight_decay=0.0196 --beta2=0.9995 --warmup_fraction=0"
# these runs are older than the bound of attention logits, and than what studies/flags found
rope_qk_norm="config/interventions/rope.py config/interventions/qk_norm.py --qk_bound=0"
rope_qk_norm+=" --weight_decay=0.1268 --beta2=0.95 --warmup_fraction=0"
modern="--qk_bound=0 --value_embeddings=False --tail_average=0 --batch_size=16"
modern+=" --weight_decay=0.09209 --beta2=0.99 --warmup_fraction=0"

size() {  # LAYERS HEADS WIDTH TOKENS SEEDS, and the rates of published, rope_qk_norm and modern
  shape="--n_layer=$1 --n_head=$2 --n_embd=$3 --jobs=${JOBS:-2}"
  python study.py config/cloud.py config/ladder.py $published $shape --max_tokens=$4 --seeds=$5 \
    --learning_rate=$6 --out="out/ladder/$1x$3" --baseline=published --arms \
    rope_qk_norm="$rope_qk_norm --learning_rate=$7" \
    modern="config/modern.py $modern --learning_rate=$8"
  for part in 2 4 8; do
    python study.py config/modern.py config/ladder.py $modern $shape --max_tokens=$(($4 / part)) \
      --seeds=$(($5 > 2 ? 2 : 1)) --learning_rate=$8 --out="out/ladder/$1x$3_1_$part" \
      --baseline=modern
  done
}

size 2 2 32   916480 5 0.02691 0.0341 0.0502
size 2 3 48 1743360 5 0.01773 0.02029 0.03338
size 2 2 64 2816000 5 0.01299 0.01378 0.02462
size 3 5 80 5686400 2 0.00823 0.007811 0.01576
# the prediction for the largest size, 527,072 parameters, before any of its runs
python study.py out/ladder/{2x32,2x48,2x64,3x80}/{published,modern} \
  --json=out/ladder_prediction.json
python -m studies.ladder.scaling out/ladder_prediction.json --target 527072
size 3 7 112 10541440 3 0.005513 0.004746 0.01065
python study.py out/ladder --json=out/ladder.json
python -m studies.ladder.scaling out/ladder.json
