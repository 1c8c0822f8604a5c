# The output head shares the token embedding: 124,412,160 parameters. Published test loss 3.874,
# 0.182 worse than the baseline; but the shared matrix starts as N(0, 1), so the first loss is about
# 460 (part 32g). See weight_tying_gpt2_init.

name = "weight_tying"
tie_weights = True
