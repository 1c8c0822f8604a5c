# A short timed run, of GPT-2 small's shape or, by flags, any other. Its loss means nothing, so it
# keeps no weights.

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
