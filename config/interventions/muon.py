# Muon for the 2-D weights inside the blocks, AdamW for all others, both at one learning rate and
# weight decay, by the update size that Moonlight gives Muon (Jordan et al., 2024; Liu et al., "Muon
# is scalable for LLM training", 2025). Not in the published study; modded-nanogpt measured -0.065
# nats over 5,100 steps of a 124M model (2024-10-29_Optimizers).
#
# It needs a learning rate of its own, set after this file. In the lab Muon was best at 8e-3 and
# AdamW at 4e-3, both on config/cloud.py (studies/modern/README.md):
#
#     python train.py config/lab.py config/cloud.py config/interventions/muon.py \
#         --batch_size=8 --learning_rate=8e-3

name = "muon"
optimizer = "muon"
