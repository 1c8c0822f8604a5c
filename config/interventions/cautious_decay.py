# A weight decays only where the update does not enlarge it (Chen et al., "Cautious weight decay",
# 2025, arXiv 2510.12402). modded-nanogpt: 40 steps saved, n = 10 (records/track_1_short/
# 2025-11-10_CautiousWD, with Muon).

name = "cautious_decay"
cautious_decay = True
