# AdamW's second moment averages over 20 steps instead of 1,000: 0.95, as GPT-3 (Brown et al., 2020)
# and modded-nanogpt's records/track_3_optimization/train_gpt_simple.py have it. With Muon it
# concerns the embeddings, the head, biases and gains only, for Muon has no second moment.

name = "beta2"
beta2 = 0.95
