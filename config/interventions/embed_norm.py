# The embeddings are divided by their root mean square before the first block, as in nanochat's
# gpt.py and in modded-nanogpt since records/track_1_short/2024-11-03_UntieEmbed. Their size
# then plays no part, so they bear a high learning rate (config/interventions/embedding_lr.py).

name = "embed_norm"
embed_norm = True
