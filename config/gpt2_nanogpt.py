# nanoGPT's train_gpt2, with its values; docs/from_nanogpt.md says what still differs. Published:
# validation loss about 2.85 on OpenWebText after 4 days on eight A100s. Not run here.
#
#     python data/openwebtext/prepare.py                                        # in nanoGPT's clone
#     torchrun --standalone --nproc_per_node=8 train.py config/gpt2_nanogpt.py \
#         --data_dir=PATH_OF_NANOGPT/data

name = "gpt2_nanogpt"
out_dir = "out/gpt2_nanogpt"
dataset = "openwebtext"
order = "shuffled"

vocab_size = 50304             # GPT-2's 50,257, padded to a multiple of 64
dropout = 0.0
tie_weights = True
init = "gpt2"
activation = "gelu_erf"

batch_size = 12
global_batch_size = 480        # 12 x gradient_accumulation_steps = 40
max_steps = 600_001            # max_iters = 600000 makes one step more

learning_rate = 6e-4
schedule = "cosine"
warmup_fraction = 0.003334     # 2,000 steps
min_lr_ratio = 0.1
decay = "matrices"
beta2 = 0.95
grad_clip = 1.0

eval_every = 1000
eval_tokens = 2_457_600        # eval_iters = 200 of 12 x 1,024
save_every = 1000
log_every = 10
