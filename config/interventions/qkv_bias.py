# Adds a bias to Q, K and V: 27,648 parameters. Published test loss 3.669385, 0.022 better than the
# baseline, probably noise: there, the bias also changed every other initial weight; here, it does
# not (part 32d).

name = "qkv_bias"
qkv_bias = True
