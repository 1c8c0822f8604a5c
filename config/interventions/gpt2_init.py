# GPT-2's initial weights, N(0, 0.02) with smaller ones on the residual stream, and the head of its
# own that the baseline has. Not published: it tells the effect of tying in weight_tying_gpt2_init
# from that of the start.

name = "gpt2_init"
init = "gpt2"
