#!/usr/bin/env bash
# Global batches of 2 to 64 sequences at equal tokens and the baseline's learning rate: two seeds
# each, and five of size 8, the baseline. 15 runs, about 15 minutes of training on 2 cores of an AMD
# EPYC. Writes out/batch_size/ and out/batch_size.json; prints the table and the fit.
set -euo pipefail

python study.py config/lab.py --jobs="${JOBS:-2}" --out=out/batch_size
arms=()
for size in 2 4 16 32 64; do
  arms+=("batch_of_$size=--global_batch_size=$size --batch_size=$size")
done
python study.py config/lab.py --seeds=2 --jobs="${JOBS:-2}" --out=out/batch_size \
  --json=out/batch_size.json --arms "${arms[@]}"
python -m studies.batch_size.fit out/batch_size.json
