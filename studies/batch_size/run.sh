#!/usr/bin/env bash
# Global batches of 2 to 64 sequences at equal tokens and the baseline's learning rate: two seeds
# each, and for size 8 the lab's five baselines. 10 more runs, 10 minutes of training on 2 cores of
# an AMD EPYC. Writes out/lab_batch and out/batch_size.json; prints the table and the fit.
set -euo pipefail
export OMP_NUM_THREADS=1

python study.py config/lab.py --jobs="${JOBS:-2}" --out=out/lab
for size in 2 4 16 32 64; do
  for seed in 1 2; do
    echo config/lab.py --global_batch_size=$size --batch_size=$size --seed=$seed \
         --out_dir=out/lab_batch/$size/$seed
  done
done | xargs -P "${JOBS:-2}" -L 1 python train.py --resume
python eval.py --ckpt out/lab_batch/*/*/best.pt
python study.py out/lab/baseline out/lab_batch --baseline "baseline, global_batch_size=8" \
  --json out/batch_size.json
python -m studies.batch_size.fit out/batch_size.json baseline
