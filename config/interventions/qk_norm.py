# Queries and keys are normalised to root mean square 1 in each head, without parameters (after
# Henry et al., "Query-key normalization for transformers", 2020, and Dehghani et al., "Scaling
# vision transformers to 22 billion parameters", 2023). Attention logits then lie within -12 and 12;
# the usual scale would bound them by the square root of the head size, which is too little for
# heads of 16 (studies/qk_bound/README.md). Not in the published study.

name = "qk_norm"
qk_norm = True
qk_bound = 12.0
