#!/usr/bin/env bash
# Where the lab's noise comes from: the baseline with seeds 1 to 5 of the initial weights, of the
# loop (data order, dropout), and of both. 8 runs beside the lab's five baselines: 10 minutes of
# training on 2 cores of an AMD EPYC. Writes out/lab_noise and out/noise.json; prints the table.
set -euo pipefail
export OMP_NUM_THREADS=1

python study.py config/lab.py --jobs="${JOBS:-2}" --out=out/lab
for seed in 2 3 4 5; do
  echo config/lab.py --seed=1 --init_seed=$seed --out_dir=out/lab_noise/weights/$seed
  echo config/lab.py --seed=$seed --init_seed=1 --out_dir=out/lab_noise/loop/$seed
done | xargs -P "${JOBS:-2}" -L 1 python train.py --resume
python eval.py --ckpt out/lab_noise/*/*/best.pt
python study.py out/lab/baseline out/lab_noise --json out/noise.json
python -m studies.noise.mixed_model out/noise.json
