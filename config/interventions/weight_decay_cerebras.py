# Weight decay 0.1 -> 0.33724, by the "Power Lines" rule of Cerebras at a learning rate of 4e-4.
# Harmful: the published 3.867 was a training loss, entered by mistake; the corrected test loss is
# about 3.814 (part 32f, as corrected by 32j).

name = "weight_decay_cerebras"
weight_decay = 0.33724
