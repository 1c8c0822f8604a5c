# Before each block, x becomes a x + b x0, where x0 is the embedding and a, b are learned, from 1
# and 0 on: 24 numbers in 12 layers (modded-nanogpt's records/track_1_short/
# 2024-11-06_ShortcutsTweaks). nanochat measured -0.0077 bits per byte at 12 layers, -0.0039 at 20,
# with a hundredth of b's learning rate for a (dev/LOG.md, 2026-01-11).

name = "x0_lambdas"
x0_lambdas = True
