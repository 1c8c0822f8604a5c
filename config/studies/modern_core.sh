#!/usr/bin/env bash
# The modern flags together: `core` is config/modern.py with the schedule wsd, and each other
# experiment changes one thing of it. 7 experiments, five seeds, 35 runs, 17 minutes of training on
# 2 cores of an AMD EPYC. Writes out/lab_core/NAME/SEED and out/modern_core.json; prints the table.
set -euo pipefail
export OMP_NUM_THREADS=1

study() {
  for seed in 1 2 3 4 5; do
    experiment core
    experiment core_cosine --schedule=cosine
    experiment core_without_qk_norm --qk_norm=False
    experiment core_relu2 --activation=relu2
    experiment core_swiglu --activation=swiglu
    experiment core_zero_init --zero_init=True
    experiment core_value_residual --value_residual=True
  done
}

experiment() {  # NAME FLAGS...
  echo config/lab.py config/modern.py --batch_size=8 --max_tokens=307_200 --learning_rate=8e-3 \
       --schedule=wsd --name="$1" "${@:2}" --seed=$seed --out_dir="out/lab_core/$1/$seed"
}

study | xargs -P "${JOBS:-2}" -L 1 python train.py --resume
python eval.py --ckpt 'out/lab_core/*/*/best.pt' --baseline core --json out/modern_core.json
