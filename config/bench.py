# A short timed run, for tokens per second and memory; its loss means nothing. The GPT-2-small shape by default, any
# other by flags:
#
#     python train.py config/bench.py --n_layer=4 --n_head=4 --n_embd=128 --block_size=64

name = "bench"
out_dir = "out/bench"
dataset = "stdlib"
vocab_size = 50257

max_steps = 20
batch_size = 2
global_batch_size = 2
dropout = 0.0

eval_every = 0
eval_tokens = 1
