#!/usr/bin/env bash
# Each newer flag alone on the ladder's modern recipe at its two smallest sizes, chosen by
# validation loss; then what helped, together, at the third size, with the recipe's values and with
# its own (config/studies/flags.py).
# The baseline is the ladder's own runs, which are made if they are missing. Writes out/ladder/,
# out/flags/ and out/flags_*.json.
set -euo pipefail
export OMP_NUM_THREADS=1

train() {
  python -m config.studies.flags "$1" | xargs -r -P "${JOBS:-2}" -L 1 python train.py --resume
}

compare() {  # RESULTS BASELINE CHECKPOINTS... FLAGS...
  python eval.py --json "out/flags_$1.json" --baseline "$2" --ckpt "${@:3}"
}

train baseline
train alone
for size in 2x32 2x48; do
  compare $size modern "out/flags/$size/*/*/best.pt" "out/ladder/runs/$size/modern_1_1/*/best.pt" \
    --validation
done
python -m config.studies.flags choose
train rates
compare stack_rates stack_rate_1 'out/flags/2x64/stack_rate_*/*/best.pt' --validation
train tuning
compare stack_tuning stack_trial_0 'out/flags/2x64/stack_trial_*/*/best.pt' --validation
train refine
compare stack_tuning stack_trial_0 'out/flags/2x64/stack_trial_*/*/best.pt' \
  'out/flags/2x64/stack_refined_*/*/best.pt' --validation
train stack
train best
compare stack modern 'out/flags/2x64/stack/*/best.pt' 'out/flags/2x64/stack_tuned/*/best.pt' \
  'out/ladder/runs/2x64/*_1_1/*/best.pt'
