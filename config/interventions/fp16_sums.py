# Products in float16 whose sums are in float16 too, which GeForce cards compute at twice the speed;
# attention and one product of the head keep 32-bit sums. Not in the published study. Nobody has
# reported training a language model with it, and no card has run this yet; what 16-bit sums do to
# the loss is emulated in studies/fp16_sums.

name = "fp16_sums"
amp = "float16"
fp16_sums = True
