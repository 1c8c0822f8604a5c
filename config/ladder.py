# The base of the ladder: five sizes of one byte-level model, each trained on 20 tokens a parameter.
# It stacks on a recipe, config/cloud.py or config/modern.py (studies/ladder/run.sh).
# `python prepare.py pypi` makes the data set.

out_dir = "out/ladder_trial"
dataset = "pypi"
order = "shuffled"

block_size = 128
batch_size = 16
global_batch_size = 16
amp = "off"      # a GPU then computes what a CPU does, but for Muon's products, in 16 bits
tf32 = False

eval_every = 0
eval_tokens = 524_288
save_every = 500
log_every = 10
