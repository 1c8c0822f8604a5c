# nanoGPT's train_shakespeare_char, with its values; docs/from_nanogpt.md says what still differs.
# Published: validation loss 1.4697, 3 minutes on an A100. Not run here; the CPU version was.
#
#     python data/shakespeare_char/prepare.py                                   # in nanoGPT's clone
#     python train.py config/shakespeare_char.py --data_dir=PATH_OF_NANOGPT/data

name = "shakespeare_char"
out_dir = "out/shakespeare_char"
dataset = "shakespeare_char"
order = "shuffled"

n_layer = 6
n_head = 6
n_embd = 384
block_size = 256
dropout = 0.2
tie_weights = True
init = "gpt2"
activation = "gelu_erf"

batch_size = 64
global_batch_size = 64
max_steps = 5001               # max_iters = 5000 makes one step more

learning_rate = 1e-3
schedule = "cosine"
warmup_fraction = 0.02         # 100 steps
min_lr_ratio = 0.1
decay = "matrices"
beta2 = 0.99
grad_clip = 1.0

eval_every = 250               # of the whole validation split, 111,540 characters
save_every = 0                 # always_save_checkpoint = False: best.pt alone, and the end
log_every = 10
sample_prompt = "\n"
