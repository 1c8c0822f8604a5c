#!/usr/bin/env bash
# Three recipes at five sizes, 20 tokens a parameter (config/studies/ladder.py says what they are).
# Needs `python prepare.py pypi`, once. Writes out/ladder/, out/ladder_*.json, out/ladder.json and
# out/ladder.png. Run it again after an interruption: finished runs are not repeated.
#
#     bash config/studies/ladder.sh           the runs, with the values that the trials found: those
#                                             in out/ladder/tuning.json, or else ours
#     bash config/studies/ladder.sh --tune    the trials first, then the runs with what they find
#     bash config/studies/ladder.sh --quick   five smaller sizes on Python's library, untuned: 7
#                                             minutes on 2 cores of an Intel Xeon; shows the
#                                             machinery only
set -euo pipefail
export OMP_NUM_THREADS=1

train() {
  python -m config.studies.ladder "$1" | xargs -r -P "${JOBS:-2}" -L 1 python train.py --resume
}

tune() {  # until the trials lack nothing
  while [ -n "$(python -m config.studies.ladder "$1")" ]; do
    train "$1"
    python -m config.studies.ladder collect
  done
}

scaling() {
  python eval.py --baseline published --scaling "$@"
}

if [ "${1:-}" = --quick ]; then
  train quick
  scaling --ckpt 'out/ladder_quick/*/*/*/best.pt' --json out/ladder_quick.json \
    --plot out/ladder_quick.png
  exit
fi
if [ "${1:-}" = --tune ]; then
  train tuning
  python -m config.studies.ladder collect
  tune beta2
  tune rates
  train check
  python -m config.studies.ladder collect
fi
train runs
# the prediction for the largest size, 527,072 parameters, before any of its runs
scaling 527072 --json out/ladder_prediction.json --ckpt \
  'out/ladder/runs/2x*/published_1_1/*/best.pt' 'out/ladder/runs/3x80/published_1_1/*/best.pt' \
  'out/ladder/runs/2x*/modern_1_1/*/best.pt' 'out/ladder/runs/3x80/modern_1_1/*/best.pt'
train largest
scaling --ckpt 'out/ladder/runs/*/*/*/best.pt' --json out/ladder.json --plot out/ladder.png
# the recipes at one size
python eval.py --ckpt 'out/ladder/runs/2x64/*_1_1/*/best.pt' --baseline rope_qk_norm \
  --json out/ladder_2x64.json
