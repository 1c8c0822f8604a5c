# Logits x are bent into 30 tanh(x / 30), the cap of Gemma 2 (Gemma Team, "Gemma 2", 2024). Not in
# the published study.

name = "logit_softcap"
logit_softcap = 30.0
