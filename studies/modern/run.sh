#!/usr/bin/env bash
# Each modern flag alone, on the published stack at AdamW's best learning rate (Muon at its own):
# 12 experiments, five seeds, 60 runs, 26 minutes of training on 2 cores of an AMD EPYC.
# Writes out/lab_modern/NAME/SEED, out/modern.json and out/modern.png; prints the table.
set -euo pipefail
export OMP_NUM_THREADS=1

study() {
  for seed in 1 2 3 4 5; do
    stack="config/lab.py config/cloud.py --batch_size=8 --max_tokens=307_200 --seed=$seed"
    echo $stack --name=tuned_stack --learning_rate=4e-3 --out_dir=out/lab_modern/tuned_stack/$seed
    for name in rmsnorm rope qk_norm relu2 swiglu logit_softcap zero_init value_residual wsd; do
      echo $stack config/interventions/$name.py --learning_rate=4e-3 \
           --out_dir=out/lab_modern/$name/$seed
    done
    echo $stack --name=gpt2_init --init=gpt2 --learning_rate=4e-3 \
         --out_dir=out/lab_modern/gpt2_init/$seed
    echo $stack config/interventions/muon.py --learning_rate=8e-3 \
         --out_dir=out/lab_modern/muon/$seed
  done
}

study | xargs -P "${JOBS:-2}" -L 1 python train.py --resume
python eval.py --ckpt 'out/lab_modern/*/*/best.pt' --baseline tuned_stack \
  --json out/modern.json --plot out/modern.png
