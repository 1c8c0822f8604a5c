# One RTX 3090, one night: 1.7 billion tokens of FineWeb, planned to end below OpenAI's GPT-2 small
# (3.4997 on the same test windows). NOT RUN YET, but for its first 30 steps on another card and
# other text (docs/gpu.md): what follows is other people's result and arithmetic.
#
#     python prepare.py fineweb
#     python train.py config/overnight_3090.py      # --dry_run: memory and hours; --resume goes on
#     python eval.py --ckpt out/overnight_3090/best.pt --json result.json      # to report, with
#                                                     out/overnight_3090/summary.json and the card
#
# The values are those of modded-nanogpt's records/track_3_optimization, #36, a model of this shape:
# 3,250 steps of 524,288 tokens end at 3.2787 on llm.c's validation tokens (n = 10). Below, "T3" is
# its train_gpt_simple.py. An update of T3's Muon has the size of ours at a rate 0.2 sqrt(768) =
# 5.54 times as low (for the MLP's second matrix half that, as in Liu et al., "Muon is scalable for
# LLM training", 2025). On our test windows GPT-2 small has 0.075 more than on llm.c's tokens, so
# 3.28 there is about 3.355 here. That leaves 0.14 for where we differ: five Newton-Schulz steps,
# not twelve; rope over the whole head with base 10,000, not over half of it with 1,024; no bias in
# the head, which starts at random, not at zero.
#
# Predicted (docs/gpu.md): 9.4 hours at 51,000 tokens/s; 18 of 24 GB, 10 with --batch_size=16. At
# the published run's 22,421 it takes 21 hours. Where a night is too short, give fewer steps: T3's
# README has 0.0091 for 200 fewer, so --max_steps=2450 would cost 0.04 or somewhat more.

name = "overnight_3090"
out_dir = "out/overnight_3090"

batch_size = 32
global_batch_size = 512        # T3: 524,288 tokens; 16 micro-steps
max_tokens = 1_703_936_000     # T3: 3,250 steps

dropout = 0.0
n_head = 6                     # T3, and nanochat's dev/LOG.md, 2026-01-17: 128 numbers a head
qkv_bias = True                # T3
norm = "rmsnorm"               # T3
position = "rope"              # T3
qk_norm = True                 # T3
qk_bound = 15.36               # T3: 0.12 x 128
activation = "relu2"           # T3
logit_softcap = 15.0           # T3, of another form
zero_init = True               # T3
embed_norm = True              # T3, there with gains

optimizer = "muon"             # T3
learning_rate = 4.5e-3         # T3: 0.025 / 5.54
embedding_lr = 155.0           # T3: 0.7 / 4.5e-3
head_lr = 0.89                 # T3: 0.004 / 4.5e-3
scalar_lr = 3.3                # T3: 0.015 / 4.5e-3
weight_decay = 0.28            # T3: 0.025 x 0.05 / 4.5e-3, the same fraction a step
adamw_weight_decay = 0.001     # T3
beta1 = 0.8                    # T3
beta2 = 0.95                   # T3
eps = 1e-10                    # T3

schedule = "wsd"               # T3: no warm-up, constant, then 70 % of the steps down to zero
cooldown_fraction = 0.7        # T3; the best fraction in marin's sweep at 130M was 0.8 (0.6 +0.004)
min_lr_ratio = 0.0             # T3

eval_every = 125               # T3
save_every = 50                # 9 minutes
