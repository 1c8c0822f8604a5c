# config/modern.py at GPT-2 small's shape on one RTX 3090: micro-batches of 6, 16 of them to the
# published global batch of 96. Nobody has run it at this size: the stack was chosen and tuned on a
# 4 x 128 byte-level model on a CPU (docs/results.md). Published to compare with: test loss 3.538161
# and 3.548880 of the stack without it (config/local_3090.py), with the same tokens.
#
# What the values at this size rest on:
# - learning_rate 1.4e-3 is the published stack's, found at this very size and batch with AdamW
#   (Giles Thomas, part 32e).
# - Muon takes the same rate and the same weight decay, for its updates have AdamW's size, a root
#   mean square of 0.2, at any width (Liu et al., "Muon is scalable for LLM training", 2025). In the
#   lab its best rate was twice AdamW's: 2.8e-3 is the next to try.
# - warm-up and cosine are shares of the run, so they scale with it.
# - rope's base of 10,000 is RoFormer's (Su et al., 2021), for contexts of this length.
#
# To report a result: summary.json and `python eval.py --ckpt out/best.pt --json result.json`, with
# the seed and the card.

from config.modern import *

name = "modern_3090"
batch_size = 6
