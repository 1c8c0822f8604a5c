# The schedule of schedule_learning_rate with another shape: the same peak and warm-up, then
# constant, then a straight line to a tenth over the last fifth of the steps (Hu et al., "MiniCPM",
# 2024; Haegele et al., 2024: equal to cosine). Not in the published study.

name = "wsd"
learning_rate = 1.4e-3
schedule = "wsd"
warmup_fraction = 0.05
cooldown_fraction = 0.2
min_lr_ratio = 0.1
