# The training loss gets 1e-4 log(Z)^2 for each token, Z the sum of exp(logits), which holds log(Z)
# near 0 (Chowdhery et al., "PaLM", 2022). Not in the published study. The training loss is another
# objective then, so compare validation losses.

name = "z_loss"
z_loss = 1e-4
