# Clips the global gradient norm at 3.5. Published test loss 3.678317, 0.013 better than the
# baseline: within its noise (part 32b).

name = "gradient_clipping"
grad_clip = 3.5
