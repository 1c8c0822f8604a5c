# The best published stack (config/cloud.py: clip 3.5, no dropout, weight decay 0.01, warm-up and
# cosine) with what helped in the lab on top (studies/modern/README.md): Muon, rotary positions,
# normalised queries and keys. With 20 tokens a parameter, Muon needs about half of AdamW's tokens
# at every size from 0.05 to 0.53 million parameters. What rotary positions and normalised queries
# and keys gain on learned positions shrinks with size; at 0.53 million they lose
# (studies/ladder/README.md). It stacks on a shape and a budget; 8e-3 is the lab's learning rate for
# Muon:
#
#     python train.py config/lab.py config/modern.py --batch_size=8 --learning_rate=8e-3

from config.cloud import *

name = "modern"
optimizer = "muon"
position = "rope"
qk_norm = True
qk_bound = 12.0  # studies/qk_bound
