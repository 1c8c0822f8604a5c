# A short timed run: tokens per second, memory, and the time outside forward, backward and
# optimizer. Its loss means nothing, so it keeps no weights. The GPT-2-small shape by default, any
# other by flags:
#
#     python train.py config/bench.py --n_layer=4 --n_head=4 --n_embd=128 --block_size=64 \
#         --vocab_size=257

name = "bench"
out_dir = "out/bench"
dataset = "stdlib"  # it makes itself; its bytes are the first 257 ids of any vocabulary
vocab_size = 50257
save_weights = False

max_steps = 20
batch_size = 2
global_batch_size = 2
dropout = 0.0

eval_every = 0
eval_tokens = 1
