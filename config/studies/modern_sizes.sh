#!/usr/bin/env bash
# config/modern.py against the published stack at two widths and two budgets, five seeds: 40 runs
# beside lab.sh's `cloud`, 24 minutes of training on 2 cores of an AMD EPYC.
# Writes out/lab_scale/SIZE/STACK/SEED and out/modern_SIZE.json; prints a table for each size.
set -euo pipefail
export OMP_NUM_THREADS=1

study() {
  for seed in 1 2 3 4 5; do
    both_stacks small_1x --max_tokens=307_200
    both_stacks small_2x --max_tokens=614_400
    both_stacks wide_half --n_embd=192 --max_tokens=153_600
    both_stacks wide_1x --n_embd=192 --max_tokens=307_200
    echo config/lab.py config/cloud.py --batch_size=8 --seed=$seed --out_dir=out/lab/cloud/$seed
  done
}

both_stacks() {  # SIZE FLAGS...
  local out=out/lab_scale/$1 flags="--batch_size=8 --seed=$seed ${*:2}"
  echo config/lab.py config/cloud.py --name=published_stack --learning_rate=4e-3 $flags \
       --out_dir=$out/published/$seed
  echo config/lab.py config/modern.py --learning_rate=8e-3 $flags --out_dir=$out/modern/$seed
}

table() {  # SIZE MORE_RUNS...
  echo "$1:"
  python eval.py --ckpt "out/lab_scale/$1/*/*/best.pt" "${@:2}" --baseline published_stack \
    --json "out/modern_$1.json"
}

study | xargs -P "${JOBS:-2}" -L 1 python train.py --resume
table small_1x
table small_2x 'out/lab_scale/small_1x/modern/*/best.pt' 'out/lab/cloud/*/best.pt'
table wide_half
table wide_1x 'out/lab_scale/wide_half/modern/*/best.pt'
