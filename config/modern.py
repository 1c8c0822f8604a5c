# The best published stack (config/cloud.py: clip 3.5, no dropout, weight decay 0.01, warm-up and
# cosine) with what small models gained on top. Chosen in the lab (studies/modern): Muon, rotary
# positions, normalised queries and keys. With 20 tokens a parameter, Muon needs about half of
# AdamW's tokens from 0.05 to 0.53 million parameters; what rotary positions gain on learned ones
# shrinks with size, and at 0.53 million they lose (studies/ladder). Chosen on that stack, and shown
# on it at 0.28 million (studies/flags): value embeddings and averaged weights, which are records at
# GPT-2 small's shape, too; the studies before have neither. It stacks on a shape and a budget; 8e-3
# is the lab's learning rate for Muon:
#
#     python train.py config/lab.py config/modern.py --batch_size=8 --learning_rate=8e-3

from config.cloud import *

name = "modern"
optimizer = "muon"
position = "rope"
qk_norm = True
qk_bound = 12.0  # studies/qk_bound
value_embeddings = True  # with GPT-2's vocabulary, 38.6 million parameters in every second block
tail_average = 0.05
