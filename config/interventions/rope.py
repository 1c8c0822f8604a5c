# Rotary positions for the learned embedding, which goes: 786,432 parameters fewer (Su et al.,
# "RoFormer", 2021). Not in the published study.

name = "rope"
position = "rope"
