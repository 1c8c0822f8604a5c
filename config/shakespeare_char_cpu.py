# The run that nanoGPT's README gives to "a macbook or other cheap computer": a smaller model of the
# same text, validation loss 1.88 there. Over the whole validation split nanoGPT and this had 1.90
# (docs/from_nanogpt.md).

from config.shakespeare_char import *

name = "shakespeare_char_cpu"
out_dir = "out/shakespeare_char_cpu"

n_layer = 4
n_head = 4
n_embd = 128
block_size = 64
dropout = 0.0

batch_size = 12
global_batch_size = 12
max_steps = 2001
warmup_fraction = 0.05         # 100 steps
