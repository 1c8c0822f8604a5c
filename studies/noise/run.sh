#!/usr/bin/env bash
# Where the lab's noise comes from: the baseline with seeds 1 to 5, then with seeds 2 to 5 of the
# initial weights alone, and of data order and dropout alone. 13 runs, about 15 minutes of
# training on 2 cores of an AMD EPYC. Writes out/noise/ and out/noise.json; prints the tables.
set -euo pipefail

python study.py config/lab.py --jobs="${JOBS:-2}" --out=out/noise
python study.py config/lab.py --seeds=2-5 --jobs="${JOBS:-2}" --out=out/noise \
  --json=out/noise.json --arms weights="--data_seed=1 --dropout_seed=1" loop=--init_seed=1
python -m studies.noise.mixed_model out/noise.json
