#!/usr/bin/env bash
# What came after GPT-2, on the lab's small model and the published stack, five seeds each.
#
#     bash studies/modern/run.sh            all of these, one after the other
#     bash studies/modern/run.sh alone      each flag alone: 60 runs, 26 minutes
#     bash studies/modern/run.sh core       together, and one thing changed: 35 runs, 17 minutes
#     bash studies/modern/run.sh sizes      two widths, two budgets: 45 runs, 24 minutes for 40
#     bash studies/modern/run.sh wide       width 192, each recipe at its own rate: 15 runs
#     bash studies/modern/run.sh trials     how these rates were found: seed 100, validation loss
#
# Times: 2 cores of an AMD EPYC. Writes out/lab_*/ and out/modern_*.json; prints the tables.
set -euo pipefail
rope_qk_norm="config/interventions/rope.py config/interventions/qk_norm.py"

study() {  # NAME OUT WORDS...
  python study.py config/lab.py "${@:3}" --seeds=5 --jobs="${JOBS:-2}" --out="out/$2" \
    --json="out/modern_$1.json" --plot="out/modern_$1.png"
}

compare() {  # NAME RUNS...
  python study.py "${@:2}" --baseline=published_stack --json="out/modern_$1.json" \
    --plot="out/modern_$1.png"
}

alone() {
  study alone lab_modern config/cloud.py --batch_size=8 --max_tokens=307_200 \
    --learning_rate=4e-3 --baseline=tuned_stack --arms rmsnorm rope qk_norm relu2 swiglu \
    logit_softcap zero_init value_residual wsd="config/interventions/wsd.py --learning_rate=4e-3" \
    gpt2_init muon="config/interventions/muon.py --learning_rate=8e-3"
}

core() {
  study core lab_core config/modern.py --batch_size=8 --max_tokens=307_200 --learning_rate=8e-3 \
    --schedule=wsd --baseline=core --arms core_cosine=--schedule=cosine \
    core_without_qk_norm=--qk_norm=False core_relu2=--activation=relu2 \
    core_swiglu=--activation=swiglu core_zero_init=--zero_init=True \
    core_value_residual=--value_residual=True
}

sizes() {
  size small_1x --max_tokens=307_200
  size small_2x --max_tokens=614_400
  size wide_half --n_embd=192 --max_tokens=153_600
  size wide_1x --n_embd=192 --max_tokens=307_200
  python study.py config/lab.py config/cloud.py --batch_size=8 --baseline=cloud --seeds=5 \
    --jobs="${JOBS:-2}" --out=out/lab
  compare small_2x out/lab_scale/small_2x out/lab_scale/small_1x/modern out/lab/cloud
  compare wide_1x out/lab_scale/wide_1x out/lab_scale/wide_half/modern
}

size() {  # NAME FLAGS...
  study "$1" "lab_scale/$1" config/cloud.py --batch_size=8 --learning_rate=4e-3 "${@:2}" \
    --baseline=published_stack --arms modern="config/modern.py --batch_size=8 --learning_rate=8e-3"
}

wide() {
  study wide_tuned lab_wide config/cloud.py --batch_size=8 --n_embd=192 --max_tokens=307_200 \
    --learning_rate=2e-3 --baseline=published --arms rope_qk_norm="$rope_qk_norm" \
    modern="config/modern.py --batch_size=8 --learning_rate=8e-3"
}

trials() {
  {
    for rate in 1e-3 2e-3 4e-3; do trial published; done
    for rate in 1e-3 2e-3 4e-3 8e-3; do trial rope_qk_norm $rope_qk_norm; done
    for rate in 4e-3 8e-3 1.6e-2; do trial modern config/modern.py; done
  } | OMP_NUM_THREADS=1 xargs -P "${JOBS:-2}" -L 1 python train.py --resume
  python study.py out/lab_wide_trials --validation --json out/modern_wide_trials.json
}

trial() {  # NAME FILES...
  echo config/lab.py config/cloud.py "${@:2}" --name=$1 --batch_size=8 --n_embd=192 \
    --max_tokens=307_200 --learning_rate=$rate --seed=100 --out_dir=out/lab_wide_trials/$1/$rate
}

for part in ${@:-alone core sizes wide trials}; do $part; done
