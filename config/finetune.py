# Fine-tuning: a text of your own on weights that can already write.
#
#     python prepare.py mine.txt --name=mine
#     python train.py config/finetune.py --init_from=gpt2 --dataset=mine
#     python sample.py --ckpt out/finetune
#
# An exported folder, or out/best.pt of a run, works in place of gpt2; for byte-level weights,
# prepare the text with --tokenizer=bytes. The shape is the weights' own. best.pt is from where the
# validation loss was lowest, so more steps cost time alone.

name = "finetune"
out_dir = "out/finetune"
order = "shuffled"

batch_size = 4
global_batch_size = 32
max_steps = 200                # 6.5 million tokens; the run says how many epochs that is

learning_rate = 5e-5           # a tenth of what GPT-2 was trained with; nanoGPT has 3e-5
schedule = "cosine"
warmup_fraction = 0.1          # good weights have more to lose by the first updates
dropout = 0.1                  # the text is small and is read several times
weight_decay = 0.01            # it pulls towards 0, not towards the weights that were given
beta2 = 0.95
grad_clip = 1.0

eval_every = 20
eval_tokens = 65_536
save_every = 100
