# The head learns 0.89 times as fast as the matrices: AdamW at 0.004 next to Muon at 0.025, which is
# 0.0045 by our measure of Muon's update (config/interventions/embedding_lr.py; modded-nanogpt's
# records/track_3_optimization/train_gpt_simple.py, #36).

name = "head_lr"
head_lr = 0.89
