# The same run as config/cloud.py on one RTX 3090: micro-batches of 6, and 16 micro-steps make the
# same global batch of 96 sequences in the same order. Published test losses 3.538161 and 3.548880
# on two 3090s, 40 h 38 min (Giles Thomas, "Writing an LLM from scratch", part 32k, 2026).

from config.cloud import *

name = "local_3090"
batch_size = 6
