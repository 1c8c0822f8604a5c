# The best published stack (config/cloud.py: clip 3.5, no dropout, weight decay 0.01, warm-up and cosine) with the modern
# interventions on top. It stacks on a shape and a budget:
#
#     python train.py config/lab.py config/modern.py --batch_size=8 --out_dir=out/lab/modern/42

from config.cloud import *

name = "modern"
optimizer = "muon"
