# Six heads of 128 numbers for twelve of 64, at GPT-2 small's width. "Definitely" better (nanochat's
# dev/LOG.md, 2026-01-17); modded-nanogpt has them since record 5, 2024-10-14_ModernArch.

name = "head_dim_128"
n_head = 6
