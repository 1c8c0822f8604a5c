#!/usr/bin/env bash
# The ladder's recipes with heads of 32 and attention logits up to 12, each step of the stack alone:
# two blocks, 20 tokens a parameter. First rates at 2x32, one seed each, by validation loss; then
# runs at the best of these. `rope`, which the ladder has not, is tried with the values of both its
# neighbours. Rates at 64 are the ladder's, above those of its law. Needs `python prepare.py pypi`.
# Writes out/heads_of_32*. `run.sh gpu` goes on, at 2.3 to 19.6 million parameters: NOT RUN YET.
set -euo pipefail

first="--weight_decay=0.0196 --beta2=0.9995 --warmup_fraction=0"  # published's
second="--weight_decay=0.127 --beta2=0.95 --warmup_fraction=0"  # rope_qk_norm's, and rope's
modern="config/modern.py --batch_size=16 --weight_decay=0.0921 --beta2=0.99 --warmup_fraction=0"
modern+=" --value_embeddings=False --tail_average=0"  # which studies/flags has changed since
rope=config/interventions/rope.py
rope_qk_norm="$rope config/interventions/qk_norm.py"

study() {  # NAME WIDTH TOKENS FLAGS...
  python study.py config/cloud.py config/ladder.py $first --n_layer=2 --n_embd=$2 \
    --n_head=$(($2 / 32)) --max_tokens=$3 --jobs="${JOBS:-2}" --out=out/heads_of_32/$1_$2 \
    --json=out/heads_of_32_$1_$2.json "${@:4}"
}

rates() {  # NAME WIDTH TOKENS, rates of published, rope_first, rope, rope_qk_norm, modern; seed 1
  arms=()
  for rate in $4; do arms+=("published_$rate=--learning_rate=$rate"); done
  for rate in $5; do arms+=("rope_first_$rate=$rope $first --learning_rate=$rate"); done
  for rate in $6; do arms+=("rope_$rate=$rope $second --learning_rate=$rate"); done
  for rate in $7; do arms+=("rope_qk_norm_$rate=$rope_qk_norm $second --learning_rate=$rate"); done
  for rate in $8; do arms+=("modern_$rate=$modern --learning_rate=$rate"); done
  study $1 $2 $3 --learning_rate=${4%% *} --validation --seeds=1 --baseline="${arms[0]%%=*}" \
    --arms "${arms[@]:1}"
}

# 243 PFLOP: 34 minutes where two runs together reach 120 TFLOP/s; `nvidia-cuda-mps-control -d` lets
# them share a GPU. Rates: twice the law's, with four times its batch (assumed: they grow with its
# root). Commit a prediction first. `gpu --max_steps=2` shows whether it starts.
gpu() {  # LAYERS WIDTH TOKENS SEEDS BATCH, and the rates of published, rope, modern
  study gpu $2 $3 --n_layer=$1 --seeds=$4 --batch_size=$5 --global_batch_size=$5 --amp=bfloat16 \
    --compile=graphs --learning_rate=$6 --baseline=published "${flags[@]}" --arms \
    rope="$rope $second --learning_rate=$7" modern="$modern --batch_size=$5 --learning_rate=$8"
}

if [ "${1:-}" = gpu ]; then
  flags=("${@:2}")
  gpu 8 448 391838720 1 64 0.00106 0.00052 0.00212
  gpu 8 320 201241600 2 64 0.00162 0.00088 0.00324
  gpu 6 256  97976320 3 64 0.0026 0.00158 0.00514
  gpu 5 192  46901760 3 16 0.00209 0.00143 0.0041
  exit
fi

three="0.0153 0.0306 0.0612"
rates rates 32 916_480 "0.0123 0.0246 0.0492" "$three" "$three" "$three" \
  "0.02085 0.0417 0.0834 0.1668"
runs() {  # WIDTH TOKENS SEEDS, the rates of published, rope, modern and rope_qk_norm, more flags
  study runs $1 $2 --seeds=$3 --learning_rate=$4 --baseline=published "${@:8}" --arms \
    rope="$rope $second --learning_rate=$5" modern="$modern --learning_rate=$6" \
    ${7:+"rope_qk_norm=$rope_qk_norm $second --learning_rate=$7"}
}

runs 32 916_480 5 0.0246 0.0306 0.0834 0.0306
runs 64 2_816_000 5 0.0120 0.0158 0.0284 0.0158 --validation
runs 96 5_698_560 5 0.0082 0.0078 0.0157 0.0078 --validation
runs 128 9_564_160 3 0.0059 0.0051 0.0113 "" --validation
runs 192 20_244_480 2 0.0036 0.0028 0.0070 "" --validation
# why does rope lose at 2x128? seed 1
study why 128 9_564_160 --validation --seeds=1 $second --position=rope --learning_rate=0.0051 \
  --n_head=2 --baseline=rope_heads_of_64 --arms rope_heads_of_16=--n_head=8 \
  rope_bias="--n_head=4 --qkv_bias=True" \
  published_heads_of_64="--position=learned $first --learning_rate=0.0059" \
  published_heads_of_16="--position=learned $first --learning_rate=0.0059 --n_head=8"
arms=()
for n in 1 2 4 8; do
  arms+=("published_$n=--n_head=$n" "rope_$n=$rope $second --learning_rate=0.0158 --n_head=$n")
done
study heads 64 2_816_000 --validation --seeds=2 --learning_rate=0.0120 --n_head=1 \
  --baseline=published_1 --arms "${arms[@]:1}"
# half and twice these rates
rates checks 96 5_698_560 "0.0041 0.0164" "" "0.0039 0.0156" "0.0039 0.0156" "0.00785 0.0314"
rates checks 128 9_564_160 "0.00295 0.0118" "" "0.00255 0.0102" "" "0.00565 0.0226"
python -m studies.heads_of_32.by_position out/heads_of_32_positions.json \
  out/heads_of_32/{runs_{128,192}/*/*,{why_128,heads_64,checks_128}/*/1}/best.pt

arms=()  # other weight decays, beta2 and warm-ups than the trials' at 2x64
for recipe in "published=$first --learning_rate=0.0246" "rope=$rope $second --learning_rate=0.0306" \
  "rope_qk_norm=$rope_qk_norm $second --learning_rate=0.0306" "modern=$modern --learning_rate=0.0834"
do
  arms+=("$recipe")
  for flag in weight_decay={0.005,0.03,0.08,0.4} beta2={0.95,0.99,0.9995} warmup_fraction={0.02,0.1}
  do
    [[ $recipe = *"--$flag "* ]] || arms+=("${recipe%%=*}_${flag/=/_}=${recipe#*=} --$flag")
  done
done
study around 32 916_480 --validation --seeds=3 --learning_rate=0.0246 --baseline=published \
  --arms "${arms[@]:1}"

values() {  # WIDTH TOKENS, two rates of rope with published's values, published's rate
  study values $1 $2 --validation --seeds=3 --position=rope --learning_rate=$3 \
    --baseline=rope_first_$3 --arms rope_first_$4=--learning_rate=$4 \
    published_second="--position=learned $second --learning_rate=$5"
}

values 32 916_480 0.0038 0.0077 0.0246
values 64 2_816_000 0.006 0.012 0.012
values 96 5_698_560 0.0041 0.0082 0.0082

fewer() {  # WIDTH TOKENS SEEDS, and the rates of rope and modern, on a half and a quarter of TOKENS
  for part in 2 4; do
    study fewer/$part $1 $(($2 / part)) $second --validation --seeds=$3 --position=rope --json= \
      --learning_rate=$4 --baseline=rope --arms modern="$modern --position=rope --learning_rate=$5"
  done
}

fewer 32 916480 5 0.0306 0.0834
fewer 64 2816000 3 0.0158 0.0284
python study.py out/heads_of_32/fewer --validation --json=out/heads_of_32_fewer.json
python -m studies.ladder.scaling out/heads_of_32_{runs_{32,64,96,128,192},fewer}.json --validation \
  --against published rope_qk_norm rope
