# Fine-tuning: a text of your own on weights that can already write.
#
#     python prepare.py mine.txt --name=mine
#     python train.py config/finetune.py --init_from=gpt2 --dataset=mine
#     python sample.py --ckpt out/finetune
#
# An exported folder, or out/best.pt of a run, works in place of gpt2; for byte-level weights,
# prepare the text with --tokenizer=bytes. The shape is the weights' own. What the values rest on:
# - learning_rate: a tenth of what such a model was trained with, so that it adapts to the text
#   before it forgets the rest. nanoGPT fine-tunes GPT-2 at 3e-5.
# - warm-up: AdamW's first updates rest on few gradients, and good weights have more to lose.
# - dropout 0.1, as GPT-2 was trained with: the text is small and is read several times. The weight
#   decay is small, for it pulls towards 0 and not towards the weights that were given.
# - max_steps: 6.5 million tokens; the run says how many epochs that is. best.pt is from where the
#   validation loss was lowest, so more steps cost time alone.

name = "finetune"
out_dir = "out/finetune"
order = "shuffled"

batch_size = 4
global_batch_size = 32
max_steps = 200

learning_rate = 5e-5
schedule = "cosine"
warmup_fraction = 0.1
dropout = 0.1
weight_decay = 0.01
beta2 = 0.95
grad_clip = 1.0

eval_every = 20
eval_tokens = 65_536
save_every = 100
