# Muon for the 2-D weights inside the blocks, AdamW for all others, both at one learning rate and
# weight decay, by the update size that Moonlight gives Muon (Jordan et al., 2024; Liu et al., "Muon
# is scalable for LLM training", 2025). Not in the published study; modded-nanogpt measured -0.065
# nats over 5,100 steps of a 124M model (2024-10-29_Optimizers).

name = "muon"
optimizer = "muon"
