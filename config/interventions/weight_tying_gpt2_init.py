# Tying with a sound start: N(0, 0.02), as in GPT-2; the first loss is near 11. Not published: it
# separates the effect of tying from that of the start which confounds part 32g.

name = "weight_tying_gpt2_init"
tie_weights = True
init = "gpt2"
