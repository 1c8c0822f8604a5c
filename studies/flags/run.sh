#!/usr/bin/env bash
# Each newer flag alone on the ladder's modern recipe at its two smallest sizes, chosen by
# validation loss; then what helped, together, at the third size, with the recipe's values and with
# its own (studies/flags/flags.py). The baseline is the ladder's own runs, which are made if they
# are missing. Writes out/ladder/, out/flags/ and out/flags_*.json.
set -euo pipefail
export OMP_NUM_THREADS=1

train() {
  python -m studies.flags.flags "$1" | xargs -r -P "${JOBS:-2}" -L 1 python train.py --resume
}

choose() {  # RESULTS BASELINE RUNS...: by validation loss
  python study.py "${@:3}" --validation --baseline "$2" --json "out/flags_$1.json"
}

train baseline
train alone
for size in 2x32 2x48; do
  choose $size modern "out/flags/$size" "out/ladder/runs/$size/modern_1_1/*"
done
python -m studies.flags.flags choose
train stack
choose stack_rates stack_rate_1 'out/flags/2x64/stack_rate_*/*'
choose stack_tuning stack_trial_0 'out/flags/2x64/stack_trial_*/*' \
  'out/flags/2x64/stack_refined_*/*'
stack="out/flags/2x64/stack/*/best.pt out/flags/2x64/stack_tuned/*/best.pt"
ladder="out/ladder/runs/2x64/*_1_1/*/best.pt"
python eval.py --ckpt $stack $ladder
python study.py $stack $ladder --baseline modern --json out/flags_stack.json
