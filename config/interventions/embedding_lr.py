# The embeddings learn 155 times as fast as the matrices, and are normalised: AdamW at 0.7 next to
# Muon at 0.025, which is 0.0045 by our measure of Muon's update at a width of 768, 0.025 / (0.2
# sqrt(768)) (modded-nanogpt's records/track_3_optimization/train_gpt_simple.py, #36; nanochat's
# gpt.py has 0.2 next to 0.02).

name = "embedding_lr"
embedding_lr = 155.0
embed_norm = True
