# The small CPU study: every intervention on a 4 x 128 byte-level model of Python's own library, in
# about a minute on one core. It sets shape and budget only, so that config/interventions/ stack:
#
#     python train.py config/lab.py config/interventions/qkv_bias.py --out_dir=out/qkv_bias

name = "baseline"
out_dir = "out/lab_trial"
dataset = "stdlib"
order = "shuffled"

n_layer = 4
n_head = 4
n_embd = 128
block_size = 64
batch_size = 8
global_batch_size = 8
max_tokens = 614_400

eval_every = 300
eval_tokens = 32_768
save_every = 600
