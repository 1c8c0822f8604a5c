#!/usr/bin/env bash
# What 16-bit sums do, emulated on a CPU. Needs `python prepare.py pypi`. First the relative errors
# of products and gradients: five minutes, 7 GB. Then the ladder's `modern` at 2x64, 5 seeds, with
# sums in 32 bits and in 16: 45 core-minutes on an AMD EPYC. Writes out/fp16_sums*; prints the
# tables. `run.sh 3x80`: the next size, about 3 core-hours, by validation loss.
set -euo pipefail
export OMP_NUM_THREADS=1
size=${1:-2x64}

study() {  # rate, tokens and the bound of attention logits: those of studies/ladder
  case $size in
    2x64) shape="--n_layer=2 --n_head=2 --n_embd=64 --learning_rate=0.02462 --max_tokens=2816000" ;;
    3x80) shape="--n_layer=3 --n_head=5 --n_embd=80 --learning_rate=0.01576 --max_tokens=5686400" ;;
  esac
  for seed in 1 2 3 4 5; do
    for precision in float16 fp16_sums; do
      echo $precision config/modern.py config/ladder.py --qk_bound=0 --value_embeddings=False \
        --tail_average=0 $shape --weight_decay=0.09209 --beta2=0.99 --warmup_fraction=0 \
        --name=$precision --seed=$seed --threads=1 \
        --out_dir=out/fp16_sums/$size/$precision/$seed --resume
    done
  done
}

mkdir -p out
for what in products gradients; do
  file=out/fp16_sums_$what.json
  [ -f $file ] || { python -m studies.fp16_sums.emulate $what > $file.part; mv $file.part $file; }
  python -m studies.fp16_sums.emulate show $file
done
study | xargs -P "${JOBS:-2}" -L 1 python -m studies.fp16_sums.emulate
[ $size = 3x80 ] || python eval.py --ckpt out/fp16_sums/$size/*/*/best.pt
[ $size = 2x64 ] || by=--validation
python study.py out/fp16_sums/$size ${by:-} --baseline float16 --json out/fp16_sums_$size.json
