# RMSNorm for LayerNorm: a gain, but no mean taken off and no bias (Zhang and Sennrich, "Root mean
# square layer normalization", 2019). Not in the published study.

name = "rmsnorm"
norm = "rmsnorm"
