# Full float32: no autocast and no TF32. Published test loss 3.679, 0.013 better than the baseline,
# at 2.4 times the time and 3 times the price (part 32h, on 8x A100 80 GB).

name = "no_amp"
amp = "off"
tf32 = False
