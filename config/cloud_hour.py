# config/overnight_3090.py on 8 A100s of 40 GB, filled up to one hour of rent: the published budget
# (config/modern_3090.py), so that its test loss has published ones to compare with, 3.577761 of
# config/cloud.py and 3.538161 of config/local_3090.py. NOT RUN YET; all figures are predictions.
#
#     bash runs/cloud.sh                                                  # all of it
#     torchrun --standalone --nproc_per_node=8 train.py config/cloud_hour.py      # training alone
#
# Time: 8 x 208,338 tokens/s x 0.75 (docs/gpu.md) make 43 minutes for 6,219 steps. Not counted:
# averaging gradients, 649 MB a step; Muon's products, 1.6 TFLOP a step, which the GPUs share, and
# exchange; 25 validations and saves; compiling. What else runs/cloud.sh does takes 10 minutes. For
# other cards, --dry_run says. To fill an hour: another --max_steps.
#
# Batch: 8 processes x 2 micro-steps x 32 sequences, 18 GB as in config/overnight_3090.py. 1, 2, 4
# or 16 GPUs make the same run.

from config.modern_3090 import *

name = "cloud_hour"
out_dir = "out/cloud_hour"
eval_every = 250               # 1.8 minutes
save_every = 250               # what a machine that vanishes can cost
