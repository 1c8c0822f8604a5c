# config/modern_3090.py on eight rented A100s: the same run, 2 micro-steps a process for 16. Not run
# at this size either; the published stack (config/cloud.py) reached test loss 3.577761.
#
#     torchrun --standalone --nproc_per_node=8 train.py config/modern_cloud.py

from config.modern_3090 import *

name = "modern_cloud"
