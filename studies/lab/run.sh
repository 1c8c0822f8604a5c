#!/usr/bin/env bash
# Every published intervention and the published best stack on the lab's small model, five seeds
# each: 60 runs; 55 of them took 66 minutes on 2 cores of an AMD EPYC. Writes out/lab/NAME/SEED,
# out/lab/study.html, out/lab.json and out/lab.png. After an interruption, run it again.
set -euo pipefail

python study.py config/lab.py --seeds=5 --jobs="${JOBS:-2}" --out=out/lab \
  --beside=studies/published/results.json --json=out/lab.json --plot=out/lab.png \
  --arms gradient_clipping no_amp qkv_bias remove_dropout schedule_learning_rate \
  weight_decay_gpt2 weight_decay_cerebras weight_tying weight_tying_gpt2_init gpt2_init \
  cloud="config/cloud.py --batch_size=8"
