#!/usr/bin/env bash
# Three recipes at five sizes, 20 tokens a parameter (studies/ladder/ladder.py says what they are).
# Needs `python prepare.py pypi`, once. Writes out/ladder/, and out/ladder_*.json.
# Run it again after an interruption: finished runs are not repeated.
#
#     bash studies/ladder/run.sh           the runs, with the values that the trials found: those
#                                          in out/ladder/tuning.json, or else ours
#     bash studies/ladder/run.sh --tune    the trials first, then the runs with what they find
set -euo pipefail
export OMP_NUM_THREADS=1

train() {
  python -m studies.ladder.ladder "$1" | xargs -r -P "${JOBS:-2}" -L 1 python train.py --resume
}

collect() {
  python study.py $(ls -d out/ladder/tuning out/ladder/rates 2> /dev/null) --validation \
    --json out/ladder/tuning.json > /dev/null
}

measure() {  # NAME CHECKPOINTS...
  python eval.py --ckpt ${*:2}
  python study.py ${*:2} --json "out/$1.json"
}

if [ "${1:-}" = --tune ]; then
  train tuning
  collect
  while [ -n "$(python -m studies.ladder.ladder rates)" ]; do  # until they lack nothing
    train rates
    collect
  done
fi
train runs
# the prediction for the largest size, 527,072 parameters, before any of its runs
measure ladder_prediction out/ladder/runs/{2x*,3x80}/{published,modern}_1_1/*/best.pt
python -m studies.ladder.scaling out/ladder_prediction.json --target 527072
train largest
measure ladder out/ladder/runs/*/*/*/best.pt
python -m studies.ladder.scaling out/ladder.json
# the recipes at one size
python study.py 'out/ladder/runs/2x64/*_1_1/*' --baseline rope_qk_norm --json out/ladder_2x64.json
