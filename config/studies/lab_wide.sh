#!/usr/bin/env bash
# Three recipes on the lab's data at 4 x 192, 307,200 tokens, each at its own best learning rate,
# five seeds: 15 runs. Writes out/lab_wide/NAME/SEED and out/lab_wide.json; prints the table.
#
#     bash config/studies/lab_wide.sh           the runs, at the rates that the trials found
#     bash config/studies/lab_wide.sh --tune    the trials only: seed 100, compared by validation loss
set -euo pipefail
export OMP_NUM_THREADS=1

rope_qk_norm="config/cloud.py config/interventions/rope.py config/interventions/qk_norm.py"

trials() {
  for rate in 1e-3 2e-3 4e-3; do trial published config/cloud.py; done
  for rate in 1e-3 2e-3 4e-3 8e-3; do trial rope_qk_norm "$rope_qk_norm"; done
  for rate in 4e-3 8e-3 1.6e-2; do trial modern config/modern.py; done
}

trial() {  # NAME FILES
  run "$@" "$rate" 100 "out/lab_wide_trials/$1/$rate"
}

study() {
  for seed in 1 2 3 4 5; do
    run published config/cloud.py 2e-3 $seed out/lab_wide/published/$seed
    run rope_qk_norm "$rope_qk_norm" 2e-3 $seed out/lab_wide/rope_qk_norm/$seed
    run modern config/modern.py 8e-3 $seed out/lab_wide/modern/$seed
  done
}

run() {  # NAME FILES RATE SEED OUT_DIR
  echo config/lab.py $2 --name=$1 --batch_size=8 --n_embd=192 --max_tokens=307_200 \
       --learning_rate=$3 --seed=$4 --out_dir=$5
}

train() {
  xargs -P "${JOBS:-2}" -L 1 python train.py --resume
}

if [ "${1:-}" = --tune ]; then
  trials | train
  python eval.py --ckpt 'out/lab_wide_trials/*/*/best.pt' --validation \
    --json out/lab_wide_trials.json
  exit
fi
study | train
python eval.py --ckpt 'out/lab_wide/*/*/best.pt' --baseline published --json out/lab_wide.json
