# Muon, each neuron's update divided by the root of its running mean square (Li et al., "NorMuon",
# 2025, arXiv 2510.05491). modded-nanogpt: 3,325 -> 3,250 steps, n = 20 each
# (records/track_3_optimization, #12 and #10); Muon itself, tuned, reaches that too (#36).

name = "normuon"
optimizer = "normuon"
