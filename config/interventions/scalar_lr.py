# Biases, gains and learned fractions learn 3.3 times as fast as the matrices: AdamW at 0.015 next
# to Muon at 0.025, which is 0.0045 by our measure of Muon's update (config/interventions/
# embedding_lr.py; modded-nanogpt's records/track_3_optimization/train_gpt_simple.py, #36).

name = "scalar_lr"
scalar_lr = 3.3
