# The base of the ladder: five sizes of one byte-level model, each trained on 20 tokens a parameter.
# It stacks on a recipe (config/cloud.py or config/modern.py), and studies/ladder/ladder.py
# prints the commands:
#
#     python train.py config/cloud.py config/ladder.py --n_layer=2 --n_head=2 --n_embd=64 ...
#
# The data set is made by `python prepare.py pypi`.

out_dir = "out/ladder_trial"
dataset = "pypi"
order = "shuffled"

block_size = 128
batch_size = 16
global_batch_size = 16
amp = "off"      # a GPU then computes what a CPU does
tf32 = False

eval_every = 0
eval_tokens = 524_288
save_every = 500
log_every = 10
