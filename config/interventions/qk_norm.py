# Queries and keys are normalised to root mean square 1 in each head, without parameters (after
# Henry et al., "Query-key normalization for transformers", 2020, and Dehghani et al., "Scaling
# vision transformers to 22 billion parameters", 2023). Not in the published study.

name = "qk_norm"
qk_norm = True
