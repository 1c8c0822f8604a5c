# Dropout 0.1 -> 0. Published test loss 3.641282, 0.050 better than the baseline (part 32c).

name = "remove_dropout"
dropout = 0.0
