"""What the options of other trainers are here: nanoGPT's, nanochat's, Hugging Face's Trainer's.

docs/from_nanogpt.md has the same rows (tests/test_foreign_names.py), and what else differs.
"""

TABLE = """
config/train_shakespeare_char.py | config/shakespeare_char.py | or config/shakespeare_char_cpu.py
config/train_gpt2.py | config/gpt2_nanogpt.py | the same recipe
config/finetune_shakespeare.py | config/finetune.py | with --init_from and --dataset
config/eval_gpt2.py | | python eval.py --ckpt gpt2 --dataset=NAME; also gpt2-medium, ...
max_iters | --max_steps=5001 | steps; nanoGPT makes one more than it says
num_iterations, num_steps, steps, iters, train_steps | --max_steps=5000 | steps
num_epochs, num_train_epochs, n_epochs | --epochs=3 | passes over the training split
target_flops, target_param_data_ratio | --max_tokens=1e9 | training tokens
device_batch_size, per_device_train_batch_size, micro_batch_size | --batch_size=12 | sequences
gradient_accumulation_steps, grad_accum_steps | --global_batch_size=480 | sequences of a whole step
total_batch_size | --global_batch_size=480 | sequences of a whole step, not tokens
lr, peak_lr, matrix_lr | --learning_rate=1e-3 | the peak
unembedding_lr | --head_lr=0.5 | times learning_rate
lr_decay_iters | --schedule=cosine | it ends at the last step
decay_lr, lr_scheduler_type, lr_scheduler | --schedule=cosine | or constant, or wsd
warmup_iters, warmup_steps, warmup_ratio, warmup | --warmup_fraction=0.02 | fraction of the steps
warmdown_ratio, warmdown_iters | --schedule=wsd --cooldown_fraction=0.4 | fraction of the steps
min_lr, final_lr_frac | --min_lr_ratio=0.1 | fraction of the peak
wd | --weight_decay=0.1 | of all parameters, or with --decay=matrices of the matrices
adam_beta1, adam_beta2, betas | --beta1=0.9 --beta2=0.95 | AdamW's
adam_epsilon, adam_eps | --eps=1e-8 | AdamW's
max_grad_norm, clip_grad, gradient_clip | --grad_clip=1 | largest norm; 0: no clipping
optim | --optimizer=adamw | or muon, or normuon
depth, num_layers, num_hidden_layers, layers | --n_layer=12 | blocks
heads, num_heads, num_attention_heads | --n_head=12 | heads in a block
head_dim | --n_head=6 | n_embd / head_dim
aspect_ratio | --n_embd=768 | n_layer x aspect_ratio
dim, d_model, emb_dim, hidden_size, n_embed, width | --n_embd=768 | width of the residual stream
max_seq_len, seq_len, sequence_length, context_length, n_ctx | --block_size=1024 | tokens
bias | --qkv_bias | a switch for those of Q, K and V; all other layers always have biases
tie_word_embeddings, tied, tie | --tie_weights | a switch
drop_rate, resid_pdrop, attn_pdrop | --dropout=0.1 | a probability
dtype, fp16, bf16, precision, mixed_precision | --amp=bfloat16 | or float16, or off for float32
torch_compile | --compile=True | or False, or auto
device_type | --device=cpu | or cuda, mps, auto
backend, ddp_backend | | leave it out: it is nccl on CUDA, else gloo
gradient_checkpointing | --batch_size=auto | the most that fit; there is no checkpointing
eval_interval, eval_steps | --eval_every=250 | steps; 0: only at the end
eval_iters | --eval_tokens=65536 | tokens in one validation
eval_only, do_eval | | python eval.py measures a checkpoint
log_interval, logging_steps | --log_every=10 | steps
always_save_checkpoint, save_steps | --save_every=250 | steps; best.pt: at each best validation
save_total_limit | | leave it out: only last.pt and best.pt are kept
output_dir, model_tag | --out_dir=out/mine | a folder
init_from=scratch, do_train | | leave it out: it is what train.py does
init_from=resume, resume_from_checkpoint, resume_from_step | --resume | with the run's --out_dir
model_name_or_path | --init_from=gpt2 | a name, a folder or a checkpoint
dataset_name, train_file, input_bin | --dataset=mine | made by python prepare.py FILE --name=mine
wandb_log, wandb_project, report_to | --wandb=PROJECT | leave it out for no logging
wandb_run_name, run_name, run | --name=mine | a label; runs of one name are seeds of one experiment
"""

ROWS = [[cell.strip() for cell in row.split("|")] for row in TABLE.strip().splitlines()]

# {name: what it is here}
FOREIGN_NAMES = {name: f"here {ours} ({meaning})" if ours else meaning
                 for names, ours, meaning in ROWS for name in names.split(", ")}
