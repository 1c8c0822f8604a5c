#!/usr/bin/env bash
# What came after GPT-2, on the lab's small model and the published stack, five seeds each.
#
#     bash studies/modern/run.sh            all of these, one after the other
#     bash studies/modern/run.sh alone      each flag alone: 60 runs, 26 minutes
#     bash studies/modern/run.sh core       together, and one thing changed: 35 runs, 17 minutes
#     bash studies/modern/run.sh sizes      two widths, two budgets: 45 runs, 24 minutes for 40
#     bash studies/modern/run.sh wide       width 192, each recipe at its own rate: 15 runs
#     bash studies/modern/run.sh trials     how these rates were found: seed 100, validation loss
#
# Times: 2 cores of an AMD EPYC. Writes out/lab_*/ and out/modern_*.json; prints the tables.
set -euo pipefail
export OMP_NUM_THREADS=1
rope_qk_norm="config/cloud.py config/interventions/rope.py config/interventions/qk_norm.py"

alone() {  # SEED
  local stack="config/lab.py config/cloud.py --batch_size=8 --max_tokens=307_200 --seed=$1"
  local out=out/lab_modern
  echo $stack --name=tuned_stack --learning_rate=4e-3 --out_dir=$out/tuned_stack/$1
  for name in rmsnorm rope qk_norm relu2 swiglu logit_softcap zero_init value_residual wsd; do
    echo $stack config/interventions/$name.py --learning_rate=4e-3 --out_dir=$out/$name/$1
  done
  echo $stack --name=gpt2_init --init=gpt2 --learning_rate=4e-3 --out_dir=$out/gpt2_init/$1
  echo $stack config/interventions/muon.py --learning_rate=8e-3 --out_dir=$out/muon/$1
}

core() {  # SEED
  core_with $1 core
  core_with $1 core_cosine --schedule=cosine
  core_with $1 core_without_qk_norm --qk_norm=False
  core_with $1 core_relu2 --activation=relu2
  core_with $1 core_swiglu --activation=swiglu
  core_with $1 core_zero_init --zero_init=True
  core_with $1 core_value_residual --value_residual=True
}

core_with() {  # SEED NAME FLAGS...
  echo config/lab.py config/modern.py --batch_size=8 --max_tokens=307_200 --learning_rate=8e-3 \
       --schedule=wsd --name="$2" "${@:3}" --seed=$1 --out_dir="out/lab_core/$2/$1"
}

sizes() {  # SEED
  both_stacks $1 small_1x --max_tokens=307_200
  both_stacks $1 small_2x --max_tokens=614_400
  both_stacks $1 wide_half --n_embd=192 --max_tokens=153_600
  both_stacks $1 wide_1x --n_embd=192 --max_tokens=307_200
  echo config/lab.py config/cloud.py --batch_size=8 --seed=$1 --out_dir=out/lab/cloud/$1
}

both_stacks() {  # SEED SIZE FLAGS...
  local out=out/lab_scale/$2 flags="--batch_size=8 --seed=$1 ${*:3}"
  echo config/lab.py config/cloud.py --name=published_stack --learning_rate=4e-3 $flags \
       --out_dir=$out/published/$1
  echo config/lab.py config/modern.py --learning_rate=8e-3 $flags --out_dir=$out/modern/$1
}

wide() {  # SEED
  wide_run published config/cloud.py 2e-3 $1 out/lab_wide/published/$1
  wide_run rope_qk_norm "$rope_qk_norm" 2e-3 $1 out/lab_wide/rope_qk_norm/$1
  wide_run modern config/modern.py 8e-3 $1 out/lab_wide/modern/$1
}

trials() {
  for rate in 1e-3 2e-3 4e-3; do trial published config/cloud.py; done
  for rate in 1e-3 2e-3 4e-3 8e-3; do trial rope_qk_norm "$rope_qk_norm"; done
  for rate in 4e-3 8e-3 1.6e-2; do trial modern config/modern.py; done
}

trial() {  # NAME FILES
  wide_run "$@" "$rate" 100 "out/lab_wide_trials/$1/$rate"
}

wide_run() {  # NAME FILES RATE SEED OUT_DIR
  echo config/lab.py $2 --name=$1 --batch_size=8 --n_embd=192 --max_tokens=307_200 \
       --learning_rate=$3 --seed=$4 --out_dir=$5
}

train() {  # PART
  for seed in 1 2 3 4 5; do "$1" $seed; done | xargs -P "${JOBS:-2}" -L 1 python train.py --resume
}

table() {  # NAME BASELINE CHECKPOINTS...
  python eval.py --ckpt ${*:3}
  python study.py ${*:3} --baseline "$2" --json "out/modern_$1.json" --plot "out/modern_$1.png"
}

for part in ${@:-alone core sizes wide trials}; do
  case $part in
    alone)
      train alone
      table alone tuned_stack out/lab_modern/*/*/best.pt ;;
    core)
      train core
      table core core out/lab_core/*/*/best.pt ;;
    sizes)
      train sizes
      table small_1x published_stack out/lab_scale/small_1x/*/*/best.pt
      table small_2x published_stack out/lab_scale/small_2x/*/*/best.pt \
        out/lab_scale/small_1x/modern/*/best.pt out/lab/cloud/*/best.pt
      table wide_half published_stack out/lab_scale/wide_half/*/*/best.pt
      table wide_1x published_stack out/lab_scale/wide_1x/*/*/best.pt \
        out/lab_scale/wide_half/modern/*/best.pt ;;
    wide)
      train wide
      table wide_tuned published out/lab_wide/*/*/best.pt ;;
    trials)
      trials | xargs -P "${JOBS:-2}" -L 1 python train.py --resume
      python study.py out/lab_wide_trials --validation --json out/modern_wide_trials.json ;;
    *)
      echo "there is no part $part" >&2
      exit 2 ;;
  esac
done
