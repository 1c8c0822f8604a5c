# Peak learning rate 4e-4 -> 1.4e-3, 5 % linear warm-up, then one half cosine to a tenth. Published
# test loss 3.601917, 0.090 better than the baseline: the best single change (part 32e).

name = "schedule_learning_rate"
learning_rate = 1.4e-3
schedule = "cosine"
warmup_fraction = 0.05
min_lr_ratio = 0.1
