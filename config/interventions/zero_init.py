# The projections into the residual stream start at 0, so that each block starts as the identity (as
# in Zhang et al., "Fixup initialization", 2019, for the last layer of a branch). Not in the
# published study.

name = "zero_init"
zero_init = True
