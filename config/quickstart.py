# The newcomer's run: a small byte-level model on Python's own library, made on the spot; no
# download, no GPU. It takes two to seven minutes on 2 quiet CPU cores. The values were chosen on
# validation losses of single runs (studies/quickstart/README.md).
#
#     python train.py config/quickstart.py

name = "quickstart"
dataset = "stdlib"
order = "shuffled"

n_layer = 4
n_head = 4
n_embd = 128
block_size = 128
batch_size = 16
global_batch_size = 16
max_steps = 1080

dropout = 0.0
position = "rope"
qk_norm = True
value_embeddings = True

optimizer = "normuon"
learning_rate = 1.2e-2
schedule = "wsd"
warmup_fraction = 0.02
cooldown_fraction = 0.9
min_lr_ratio = 0.0
weight_decay = 0.01
beta2 = 0.95
grad_clip = 1.0

sample_prompt = "class "
eval_every = 270
eval_tokens = 65_536
save_every = 270
