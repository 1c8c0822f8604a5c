# The square of ReLU for GELU (So et al., "Primer", 2021). Not in the published study.

name = "relu2"
activation = "relu2"
