"""Text from a checkpoint: one streamed as it is made, several made side by side.

    python sample.py
    python sample.py --ckpt out/best.pt --prompt "def main():" --num_samples 3 --temperature 0.8 --top_k 50
"""

import argparse
import codecs
import os
import sys

import torch

from model import GPT, CheckpointError, DeviceError, pick_device, read_checkpoint
from prepare import END_OF_TEXT, DataError, get_tokenizer


def print_stream(steps, tokenizer):
    """Prints one text as it is made, up to an end-of-text token. A character of several tokens comes when it is whole."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for step in steps:
        if step.item() == tokenizer.eot_token:
            break
        print(decoder.decode(bytes_of(tokenizer, step.item())), end="", flush=True)
    print(decoder.decode(b"", final=True))


def print_together(steps, tokenizer, prompt, num_samples):
    """Prints several texts, made side by side, each up to an end-of-text token, when the last of them is made."""
    texts, ended = [prompt.encode()] * num_samples, [False] * num_samples
    for step in steps:
        for i, token in enumerate(step.tolist()):
            ended[i] |= token == tokenizer.eot_token
            texts[i] += b"" if ended[i] else bytes_of(tokenizer, token)
        if all(ended):
            break
    for i, text in enumerate(texts):
        print(f"--- sample {i + 1}\n{text.decode(errors='replace')}")


def bytes_of(tokenizer, token):
    try:
        return tokenizer.decode_single_token_bytes(token)
    except KeyError:  # a vocab_size above the tokenizer's leaves ids without text
        return "\N{REPLACEMENT CHARACTER}".encode()


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"sample.py: {message}; --help lists what there is\n")
    parser.add_argument("--ckpt", default="out/best.pt", help="default: %(default)s")
    parser.add_argument("--prompt", default="Every effort moves you", help="default: %(default)s")
    parser.add_argument("--num_samples", type=int, default=1, help="sample i draws with seed + i - 1, whatever their number")
    parser.add_argument("--max_new_tokens", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=1.0, help="0: always the likeliest token")
    parser.add_argument("--top_k", type=int, help="draw from the k likeliest tokens only")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"))
    args = parser.parse_args()
    for is_wrong, message in (
            (not args.prompt, f"--prompt is empty; '{END_OF_TEXT}' asks for a text from nothing"),
            (args.num_samples < 1, "--num_samples must be at least 1"),
            (args.max_new_tokens < 1, "--max_new_tokens must be at least 1"),
            (args.temperature and not 0.01 <= args.temperature <= 100, "--temperature must be 0, or from 0.01 to 100"),
            (not 0 <= args.seed <= 9e18, "--seed must be from 0 to 9e18"),
            (args.top_k is not None and args.top_k < 1, "--top_k must be at least 1")):
        if is_wrong:
            parser.error(message)
    return args


def sample(args):
    checkpoint = read_checkpoint(args.ckpt)
    vocab_size = checkpoint["config"]["vocab_size"]
    if args.top_k and args.top_k > vocab_size:
        raise CheckpointError(f"--top_k={args.top_k} is more than the {vocab_size} tokens of {args.ckpt}")
    tokenizer = get_tokenizer(checkpoint["tokenizer"])
    device = pick_device(args.device)
    model = GPT.from_checkpoint(checkpoint).to(device)
    prompt = torch.tensor([tokenizer.encode(args.prompt, allowed_special={END_OF_TEXT})], device=device)
    generators = [torch.Generator(device).manual_seed(args.seed + i) for i in range(args.num_samples)]
    steps = model.stream(prompt.repeat(args.num_samples, 1), args.max_new_tokens, args.temperature, args.top_k, generators)
    if args.num_samples == 1:
        print(args.prompt, end="", flush=True)
        print_stream(steps, tokenizer)
    else:
        print_together(steps, tokenizer, args.prompt, args.num_samples)


def main():
    try:
        sample(parse_arguments())
    except (CheckpointError, DataError, DeviceError) as error:
        sys.exit(f"sample.py: {error}")
    except BrokenPipeError:  # whoever read the text, such as head, has enough; Python's last flush must not complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        sys.exit("\nsample.py: stopped")


if __name__ == "__main__":
    main()
