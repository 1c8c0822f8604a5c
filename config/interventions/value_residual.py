# Each block's attention values are mixed with those of the first block, by a fraction that each
# block learns, from 1/2 on (after Zhou et al., "Value residual learning", 2024). Not in the
# published study.

name = "value_residual"
value_residual = True
