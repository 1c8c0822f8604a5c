# In every second block, the attention values are mixed with an embedding of the token, by a
# fraction learned from 1/2 on: 38.6 million parameters a block at GPT-2 small's shape, and no
# products. modded-nanogpt's records/track_1_short/2024-12-04_ValueEmbed, n = 40, has them in all
# blocks; nanochat's gpt.py in every second one, with a gate for each head, which we leave out.

name = "value_embeddings"
value_embeddings = True
