#!/usr/bin/env bash
# Every published intervention and the published best stack on the lab's small model, five seeds
# each: 60 runs; 55 of them took 66 minutes on 2 cores of an AMD EPYC. Writes out/lab/NAME/SEED,
# out/lab.json and out/lab.png. Run it again after an interruption: finished runs are not repeated.
set -euo pipefail
export OMP_NUM_THREADS=1

study() {
  for seed in 1 2 3 4 5; do
    for name in baseline gradient_clipping no_amp qkv_bias remove_dropout schedule_learning_rate \
                weight_decay_gpt2 weight_decay_cerebras weight_tying weight_tying_gpt2_init \
                gpt2_init; do
      echo config/lab.py config/interventions/$name.py --seed=$seed --out_dir=out/lab/$name/$seed
    done
    echo config/lab.py config/cloud.py --batch_size=8 --seed=$seed --out_dir=out/lab/cloud/$seed
  done
}

study | xargs -P "${JOBS:-2}" -L 1 python train.py --resume
python eval.py --ckpt out/lab/*/*/best.pt
python study.py out/lab --beside studies/published/results.json --json out/lab.json \
  --plot out/lab.png
