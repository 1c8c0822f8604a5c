# The mean of the weights of the last 5 % of the steps: modded-nanogpt saved 30 of 2,750 steps, n =
# 10, by moving the last weights 0.6 of the way to an average over 150 steps
# (records/track_3_optimization, #45). The uniform mean is that of Izmailov et al. (2018).

name = "tail_average"
tail_average = 0.05
