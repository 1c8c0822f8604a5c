# Weight decay 0.1 -> 0.01, the value attributed to GPT-2. Published test loss 3.642940, 0.049
# better than the baseline (part 32f).

name = "weight_decay_gpt2"
weight_decay = 0.01
