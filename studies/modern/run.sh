#!/usr/bin/env bash
# What came after GPT-2, on the lab's small model and the published stack, five seeds each: each
# flag alone; together, with one thing changed; two widths and two budgets; and width 192 with each
# recipe at its own rate, after trials with seed 100 that found these rates. About 95 minutes on 2
# cores of an AMD EPYC, and the trials. Writes out/lab_*/ and out/modern_*.json; prints the tables.
set -euo pipefail
# these runs are older than the bound of attention logits, and than what studies/flags found
qk_norm="config/interventions/qk_norm.py --qk_bound=0"
rope_qk_norm="config/interventions/rope.py $qk_norm"
modern="config/modern.py --qk_bound=0 --value_embeddings=False --tail_average=0"

study() {  # NAME FOLDER WORDS...
  python study.py config/lab.py "${@:3}" --jobs="${JOBS:-2}" --out="out/$2" \
    --json="out/modern_$1.json"
}

size() {  # NAME FLAGS...
  study "$1" "lab_scale/$1" config/cloud.py --batch_size=8 --learning_rate=4e-3 "${@:2}" \
    --baseline=published_stack --arms modern="$modern --batch_size=8 --learning_rate=8e-3"
}

study alone lab_modern config/cloud.py --batch_size=8 --max_tokens=307_200 \
  --learning_rate=4e-3 --baseline=tuned_stack --arms rmsnorm rope relu2 swiglu logit_softcap \
  zero_init value_residual gpt2_init qk_norm="$qk_norm" \
  wsd="config/interventions/wsd.py --learning_rate=4e-3" \
  muon="config/interventions/muon.py --learning_rate=8e-3"

study later lab_later config/cloud.py --batch_size=8 --max_tokens=307_200 --learning_rate=4e-3 \
  --baseline=tuned_stack --arms z_loss qk_norm_12=config/interventions/qk_norm.py

study core lab_core $modern --batch_size=8 --max_tokens=307_200 --learning_rate=8e-3 \
  --schedule=wsd --baseline=core --arms core_cosine=--schedule=cosine \
  core_without_qk_norm=--qk_norm=False core_relu2=--activation=relu2 \
  core_swiglu=--activation=swiglu core_zero_init=--zero_init=True \
  core_value_residual=--value_residual=True

size small_1x --max_tokens=307_200
size small_2x --max_tokens=614_400
# the larger one next to the recipe with half the tokens, and to the lab's own run of the stack
python study.py config/lab.py config/cloud.py --batch_size=8 --baseline=cloud --jobs="${JOBS:-2}" \
  --out=out/lab
python study.py out/lab_scale/small_2x out/lab_scale/small_1x/modern out/lab/cloud \
  --baseline=published_stack --json=out/modern_small_2x.json

trials=()
for rate in 2e-3 4e-3; do trials+=(published_$rate=--learning_rate=$rate); done
for rate in 1e-3 2e-3 4e-3 8e-3; do
  trials+=("rope_qk_norm_$rate=$rope_qk_norm --learning_rate=$rate")
done
for rate in 4e-3 8e-3 1.6e-2; do
  trials+=("modern_$rate=$modern --batch_size=8 --learning_rate=$rate")
done
study wide_trials lab_wide_trials config/cloud.py --batch_size=8 --n_embd=192 \
  --max_tokens=307_200 --learning_rate=1e-3 --seeds=100-100 --validation \
  --baseline=published_1e-3 --arms "${trials[@]}"
study wide_tuned lab_wide config/cloud.py --batch_size=8 --n_embd=192 --max_tokens=307_200 \
  --learning_rate=2e-3 --baseline=published --arms rope_qk_norm="$rope_qk_norm" \
  modern="$modern --batch_size=8 --learning_rate=8e-3"
