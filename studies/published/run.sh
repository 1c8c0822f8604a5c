#!/usr/bin/env bash
# The published interventions on eight A100s with 40 GB: 3.2 hours and about US$40 each; no_amp on
# 80 GB: 8.1 hours and over US$135. Nobody has run them with nanolab. Needs `python prepare.py
# fineweb`. Writes out/published/NAME, out/published.json; shows the published differences beside.
#
#     bash studies/published/run.sh baseline remove_dropout      these two; without names, all
set -euo pipefail
all="baseline gradient_clipping no_amp qkv_bias remove_dropout schedule_learning_rate
     weight_decay_gpt2 weight_decay_cerebras weight_tying cloud"

for name in ${@:-$all}; do
  files="config/interventions/$name.py --amp=float16"
  [ $name = cloud ] && files="config/cloud.py --amp=float16"
  [ $name = no_amp ] && files=config/interventions/no_amp.py
  torchrun --standalone --nproc_per_node=8 train.py $files --batch_size=12 --resume \
    --out_dir=out/published/$name
done
python eval.py --amp float16 --ckpt out/published/*/best.pt
python study.py out/published --beside studies/published/results.json --json out/published.json
