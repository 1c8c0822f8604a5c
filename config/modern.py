# The best published stack (config/cloud.py: clip 3.5, no dropout, weight decay 0.01, warm-up and
# cosine) with what small models gained on top: in the lab Muon, rotary positions, normalised
# queries and keys (studies/modern); on these, at up to 0.28 million parameters, value embeddings
# and averaged weights (studies/flags), which earlier studies do not have. Muon's gain lasts to 0.48
# million (by two seeds to 1.01), that of rotary positions does not (studies/heads_of_32). It stacks
# on a shape and a budget; 8e-3 is the lab's learning rate for Muon:
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
