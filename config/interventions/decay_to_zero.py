# Constant for 30 % of the steps, then a straight line to zero, without warm-up (modded-nanogpt's
# track_3_optimization/train_gpt_simple.py, #36; Bergsma et al., "Straight to zero", 2025).

name = "decay_to_zero"
schedule = "wsd"
warmup_fraction = 0.0
cooldown_fraction = 0.7
min_lr_ratio = 0.0
