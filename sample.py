"""Text from a checkpoint: one sample streamed as it is made, or several made side by side.

    python sample.py
    python sample.py --ckpt out/best.pt --prompt "def main():" --num_samples 3 --temperature 0.8
"""

import codecs

import torch

from model import GPT
from nanolab.checkpoint import read_checkpoint
from nanolab.common import UserError, argument_parser, run_script
from nanolab.devices import pick_device
from nanolab.tokenizer import END_OF_TEXT, get_tokenizer, token_bytes


def main():
    args = parse_arguments()
    checkpoint = read_checkpoint(args.ckpt)
    vocab_size = checkpoint["config"]["vocab_size"]
    if args.top_k and args.top_k > vocab_size:
        raise UserError(f"--top_k={args.top_k} is more than the {vocab_size} tokens of {args.ckpt}")
    tokenizer = get_tokenizer(checkpoint["tokenizer"])
    device = pick_device(args.device)
    model = GPT.from_checkpoint(checkpoint).to(device)

    tokens = tokenizer.encode(args.prompt, allowed_special={END_OF_TEXT})
    prompts = torch.tensor([tokens] * args.num_samples, device=device)  # (num_samples, T)
    seeds = range(args.seed, args.seed + args.num_samples)
    generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
    steps = model.stream(prompts, args.max_new_tokens, args.temperature, args.top_k, generators)
    if args.num_samples == 1:
        print_stream(args.prompt, steps, tokenizer)
    else:
        print_samples(args.prompt, steps, tokenizer, args.num_samples)


def print_stream(prompt, steps, tokenizer):
    """Prints one text as it is made, up to an end-of-text token.

    steps: an iterator of token ids, each (1,). A character of several tokens is printed when it is
    complete.
    """
    print(prompt, end="", flush=True)
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    try:
        for token in steps:
            if token.item() == tokenizer.eot_token:
                break
            print(decoder.decode(token_bytes(tokenizer, token.item())), end="", flush=True)
    finally:  # Ctrl-C ends the line too
        print(decoder.decode(b"", final=True))


def print_samples(prompt, steps, tokenizer, num_samples):
    """Prints several texts when all of them have ended, each up to an end-of-text token.

    steps: an iterator of token ids, each (num_samples,).
    """
    texts, ended = [prompt.encode()] * num_samples, [False] * num_samples
    for tokens in steps:
        for i, token in enumerate(tokens.tolist()):
            ended[i] |= token == tokenizer.eot_token
            texts[i] += b"" if ended[i] else token_bytes(tokenizer, token)
        if all(ended):
            break
    for i, text in enumerate(texts):
        print(f"--- sample {i + 1}\n{text.decode(errors='replace')}")


def parse_arguments():
    parser = argument_parser(__doc__)
    parser.add_argument("--ckpt", default="out/best.pt", help="default: %(default)s")
    parser.add_argument("--prompt", default="Every effort moves you", help="default: %(default)s")
    parser.add_argument("--num_samples", type=int, default=1,
                        help="sample i draws with seed + i - 1, whatever their number")
    parser.add_argument("--max_new_tokens", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=1.0, help="0: the likeliest token")
    parser.add_argument("--top_k", type=int, help="draw from the k likeliest tokens only")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"))
    args = parser.parse_args()
    for is_wrong, message in (
            (not args.prompt, f"--prompt is empty; '{END_OF_TEXT}' asks for a text from nothing"),
            (args.num_samples < 1, "--num_samples must be at least 1"),
            (args.max_new_tokens < 1, "--max_new_tokens must be at least 1"),
            (args.temperature and not 0.01 <= args.temperature <= 100,
             "--temperature must be 0, or from 0.01 to 100"),
            (not 0 <= args.seed <= 9e18, "--seed must be from 0 to 9e18"),
            (args.top_k is not None and args.top_k < 1, "--top_k must be at least 1")):
        if is_wrong:
            parser.error(message)
    return args


if __name__ == "__main__":
    run_script(main)
