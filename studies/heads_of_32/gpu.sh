#!/usr/bin/env bash
# Does rope's gain last? published, rope and modern at 2.3 to 19.6 million parameters, on one GPU:
# heads of 32, 20 tokens a parameter, the largest size first. NOT RUN YET. 243 PFLOP: 34 minutes
# where two runs together reach 120 TFLOP/s; `nvidia-cuda-mps-control -d` lets them share a GPU.
# Rates are those of the ladder's law, twice as high with four times its batch (assumed: they grow
# with the root of the batch). Commit a prediction first, as README.md has one for 2x96. Needs
# `python prepare.py pypi`, once. Flags are for all runs; `--max_steps=2` shows whether it starts.
set -euo pipefail

size() {  # LAYERS WIDTH TOKENS SEEDS BATCH, and the rates of published, rope and modern
  modern="config/modern.py --batch_size=$5 --weight_decay=0.0921 --beta2=0.99 --warmup_fraction=0"
  modern+=" --value_embeddings=False --tail_average=0"  # as in run.sh
  python study.py config/cloud.py config/ladder.py --weight_decay=0.0196 --beta2=0.9995 \
    --warmup_fraction=0 --n_layer=$1 --n_embd=$2 --n_head=$(($2 / 32)) --max_tokens=$3 \
    --seeds=$4 --batch_size=$5 --global_batch_size=$5 --learning_rate=$6 --amp=bfloat16 \
    --compile=graphs --jobs=2 --out="out/heads_of_32/gpu_$1x$2" \
    --json="out/heads_of_32_gpu_$1x$2.json" --baseline=published "${flags[@]}" --arms \
    rope="config/interventions/rope.py --weight_decay=0.127 --beta2=0.95 --learning_rate=$7" \
    modern="$modern --learning_rate=$8"
}

flags=("$@")
size 8 448 391838720 1 64 0.00106 0.00052 0.00212
size 8 320 201241600 2 64 0.00162 0.00088 0.00324
size 6 256  97976320 3 64 0.0026 0.00158 0.00514
size 5 192  46901760 3 16 0.00209 0.00143 0.0041
