# Beside Muon, hardly any weight decay for what AdamW has: 0.001, where the matrices have 0.05
# (modded-nanogpt's records/track_3_optimization/train_gpt_simple.py, #36).

name = "adamw_weight_decay"
adamw_weight_decay = 0.001
