#!/usr/bin/env bash
# One command on a box of 8 GPUs that was rented a minute ago: from nothing to a model that is
# trained, tested, sampled and exported.
#
#     git clone URL nanolab && cd nanolab
#     DOLLARS_PER_HOUR=12 bash runs/cloud.sh --dry_run    # measures a step, says the price, stops
#     DOLLARS_PER_HOUR=12 bash runs/cloud.sh              # the same, asks, and does the rest
#
# --yes does not ask. All other words go to train.py: files and flags on top of CONFIG's.
#
# After the question, all of it runs in a session of its own, so a lost connection and Ctrl-C stop
# only what you see. The same command, given again, shows it again; or goes on, if it has ended
# early. A process that dies is started again with --resume, ten times at most. To stop:
#     kill -- -$(cat out/cloud_hour/cloud.pid)
#
# NOT RUN ON RENTED GPUS YET. Predicted for 8 x A100 of 40 GB, at 12 dollars an hour: 55 to 59
# minutes, 11 to 12 dollars (the published baseline: 3.41 hours, 35 to 42 dollars), 35 GB of disk.
# In minutes: environment 3 (6 GB), dry run 2, data 1 copied at 1 Gbit/s (7 GB) or 5 prepared here
# (24 GB), training 46 (43 by config/cloud_hour.py, and compiling and saves; 4 GB), test, sample and
# export 3 (1 GB).
#
# What is copied: `python prepare.py fineweb` on a cheaper machine; then here
#     DATA_FROM=me@HOST:nanolab/data/fineweb
# or a folder of a disk that is attached. scp copies it.
#
# A box may vanish without warning. ON_SAVE is a command that is run after every save, and at the
# end; give it a timeout of its own:
#     ON_SAVE='rsync -a --timeout=60 out/cloud_hour/ me@HOST:cloud_hour'
# On the next box, copy the folder back to out/cloud_hour and give the same command.
set -euo pipefail
cd "$(dirname "$0")/.."

export CONFIG=${CONFIG:-config/cloud_hour.py} OUT_DIR=${OUT_DIR:-out/cloud_hour}
export DATASET=${DATASET:-fineweb} DATA_DIR=${DATA_DIR:-data} DATA_FROM=${DATA_FROM:-}
export ON_SAVE=${ON_SAVE:-} DOLLARS_PER_HOUR=${DOLLARS_PER_HOUR:-0}
log=$OUT_DIR/cloud.log

ask=yes price_only=no detached=no flags=()
for word in "$@"; do
    case $word in
        --yes) ask=no ;;
        --dry_run) price_only=yes ;;
        --detached) detached=yes ;;  # how this script starts itself
        *) flags+=("$word") ;;
    esac
done

main() {
    environment
    # the lock of a run that is under way is held by it until it ends
    mkdir -p "$OUT_DIR"
    exec 9>>"$OUT_DIR/cloud.lock"
    if ! flock -n 9; then
        echo "cloud.sh: is under way; this is $log. Ctrl-C ends only what you see"
        follow -n 20
    fi
    price
    [ $price_only = no ] || exit 0
    if [ $ask = yes ]; then
        read -rp "The box costs money until you give it back. Go on? [y/N] " answer || true
        [[ ${answer:-} == [yY]* ]] || { echo "cloud.sh: nothing was started"; exit 1; }
    fi
    rm -f "$OUT_DIR/cloud.status"
    touch "$log"
    local size=$(stat -c %s "$log")
    setsid bash runs/cloud.sh --detached "${flags[@]}" </dev/null >>"$log" 2>&1 &
    echo $! >"$OUT_DIR/cloud.pid"
    follow -c +$((size + 1))
}

follow() {  # shows the log until the run has ended, and exits as it did
    exec 9>&-
    flock "$OUT_DIR/cloud.lock" true &
    tail "$@" -f --pid=$! "$log"
    exit "$(cat "$OUT_DIR/cloud.status" 2>/dev/null || echo 1)"
}

environment() {  # an active virtual environment is taken as it is
    if [ -z "${VIRTUAL_ENV:-}" ]; then
        [ -d .venv ] || python3 -m venv .venv
        source .venv/bin/activate
        pip install --quiet -r requirements.txt
    fi
    export PROCESSES=${PROCESSES:-$(python -c "import torch; print(torch.cuda.device_count())")}
    if [ "$PROCESSES" = 0 ]; then
        echo "cloud.sh: torch finds no GPU; does nvidia-smi? PROCESSES=2 tries this on a CPU" >&2
        exit 1
    fi
}

train() {  # RESTARTS FLAGS...
    torchrun --standalone --nproc_per_node="$PROCESSES" --max-restarts="$1" train.py $CONFIG \
        --out_dir="$OUT_DIR" --dataset="$DATASET" --data_dir="$DATA_DIR" \
        --dollars_per_hour="$DOLLARS_PER_HOUR" --on_save="$ON_SAVE" --resume "${flags[@]}" "${@:2}"
}

price() {
    if [ -f "$DATA_DIR/$DATASET/meta.json" ]; then
        train 0 --dry_run
    else  # before any data is here, the same step on Python's own library
        train 0 --dry_run --dataset=stdlib --vocab_size=50257 --out_dir="$OUT_DIR/dry_run"
    fi
}

get_data() {
    local to=$DATA_DIR/$DATASET
    [ ! -f "$to/meta.json" ] || return 0
    if [ -n "$DATA_FROM" ]; then
        rm -rf "$to.copy"
        mkdir -p "$DATA_DIR"
        scp -rq "$DATA_FROM" "$to.copy"
        mkdir -p "$to"
        mv -f "$to.copy"/* "$to/"
    else
        python prepare.py "$DATASET" --data_dir="$DATA_DIR"
    fi
}

all_of_it() {
    trap 'echo $? >"$OUT_DIR/cloud.status"' EXIT
    get_data
    train 10
    [ -f "$OUT_DIR/summary.json" ] || { echo "cloud.sh: the training was stopped"; exit 1; }
    torchrun --standalone --nproc_per_node="$PROCESSES" eval.py --ckpt "$OUT_DIR/best.pt" \
        --data_dir="$DATA_DIR"
    python sample.py --ckpt "$OUT_DIR/best.pt"
    rm -rf "$OUT_DIR/export"
    python -m nanolab.huggingface export "$OUT_DIR/best.pt" "$OUT_DIR/export"
    bash -c "$ON_SAVE" || echo "cloud.sh: the last ON_SAVE failed"
    echo "cloud.sh: all done, $((SECONDS / 60)) minutes after the question: $OUT_DIR/report.html" \
         "and $OUT_DIR/export, for transformers. The box costs money until you give it back"
}

if [ $detached = yes ]; then all_of_it; else main; fi
