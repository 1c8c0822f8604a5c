#!/usr/bin/env bash
# How large may attention logits be with qk_norm? Fixed bounds, at the ladder's values, validation
# loss. Needs `python prepare.py pypi`. Give 3x80 as an argument for the larger size (3 core-hours).
set -euo pipefail

compare() {  # FOLDER FILES AND FLAGS...
  python study.py "${@:2}" config/ladder.py --qk_bound=0 --threads=1 --seeds="${SEEDS:-3}" \
    --jobs="${JOBS:-2}" --baseline=root --validation --out="out/qk_bound/$1" \
    --arms bound_8=--qk_bound=8 bound_12=--qk_bound=12 bound_16=--qk_bound=16
}

modern="config/modern.py --weight_decay=0.09209 --beta2=0.99 --warmup_fraction=0
  --value_embeddings=False --tail_average=0"
rope_qk_norm="config/cloud.py config/interventions/rope.py config/interventions/qk_norm.py
  --weight_decay=0.1268 --beta2=0.95 --warmup_fraction=0"
small="--n_layer=2 --n_embd=32 --max_tokens=916480"

if [ "${1:-}" = 3x80 ]; then
  compare 3x80_modern $modern --learning_rate=0.01576 --n_layer=3 --n_head=5 --n_embd=80 \
    --max_tokens=5686400
  exit
fi
for n_head in 2 1; do
  compare "heads_of_$((32 / n_head))_modern" $modern --learning_rate=0.0502 $small --n_head=$n_head
  compare "heads_of_$((32 / n_head))_rope_qk_norm" $rope_qk_norm --learning_rate=0.0341 $small \
    --n_head=$n_head
done
