#!/usr/bin/env bash
# The quickstart in out/quickstart: two to seven minutes on 2 CPU cores.
set -euo pipefail

python train.py config/quickstart.py --resume --out_dir=out/quickstart
python eval.py --ckpt out/quickstart/best.pt
python study.py out/quickstart --json out/quickstart.json
