"""Text from a checkpoint: one sample streamed as it is made, or several made side by side.

    python sample.py
    python sample.py --ckpt out --prompt "def main():" --num_samples 3 --temperature 0.8
    python sample.py --prompt_file prompt.txt --top_p 0.9
"""

import codecs
import sys
from pathlib import Path

import torch

from config import OPTIONS
from nanolab.checkpoint import load_model
from nanolab.common import UserError, argument_parser, run_script
from nanolab.distributed import pick_device
from nanolab.huggingface import read_any
from nanolab.tokenizer import (END_OF_TEXT, UNKNOWN, encode_prompt, get_tokenizer, kind_of,
                               text_of)


def main():
    args = parse_arguments()
    checkpoint = read_any(args.ckpt)
    vocab_size = checkpoint["config"]["vocab_size"]
    if args.top_k and args.top_k > vocab_size:
        raise UserError(f"--top_k={args.top_k} is more than the {vocab_size} tokens of {args.ckpt}")
    if args.tokenizer not in (None, checkpoint["tokenizer"]) and checkpoint["tokenizer"] != UNKNOWN:
        raise UserError(f"{args.ckpt} reads {kind_of(checkpoint['tokenizer'])} tokens; "
                        f"leave out --tokenizer={args.tokenizer}")
    tokenizer = get_tokenizer(args.tokenizer or checkpoint["tokenizer"])
    prompt = args.prompt
    if args.prompt_file is not None:
        prompt = read_prompt(args.prompt_file)
    if prompt is None:  # weights in Hugging Face's layout come without one
        prompt = checkpoint["config"].get("sample_prompt", OPTIONS["sample_prompt"].default)
    device = pick_device(args.device)
    if device.type == "cpu":
        torch.set_num_threads(1)  # as fast for one token; others would wait for a busy core
    model = load_model(checkpoint).to(device)

    tokens = encode_prompt(tokenizer, prompt, vocab_size)
    prompts = torch.tensor([tokens] * args.num_samples, device=device)  # (num_samples, T)
    seeds = range(args.seed, args.seed + args.num_samples)
    generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
    steps = model.stream(prompts, args.max_new_tokens, args.temperature, args.top_k, args.top_p,
                         generators)  # of (num_samples,)
    if args.num_samples == 1:
        print_stream(prompt, map(int, steps), tokenizer)
        return
    samples = torch.stack(list(steps), dim=1).tolist()  # (num_samples, max_new_tokens)
    for i, new_tokens in enumerate(samples):
        text = b"".join(text_of(new_tokens, tokenizer)).decode(errors="replace")
        print(f"--- sample {i + 1}\n{prompt}{text}")


def read_prompt(file):
    """The text of a file, or of standard input for "-". Raises UserError."""
    data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"--prompt_file={file} is not UTF-8 text (byte {error.start:,})") from None
    if not text:
        raise UserError(f"--prompt_file={file} is empty; --prompt='{END_OF_TEXT}' asks for a text "
                        "from nothing")
    return text


def print_stream(prompt, tokens, tokenizer):
    """Prints one text as it is made, up to an end-of-text token. A character of several tokens is
    printed when it is complete."""
    print(prompt, end="", flush=True)
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    try:
        for part in text_of(tokens, tokenizer):
            print(decoder.decode(part), end="", flush=True)
    finally:  # Ctrl-C ends the line too
        print(decoder.decode(b"", final=True))


def parse_arguments():
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add("--ckpt", default="out/best.pt",
        help="a checkpoint, nanoGPT's too, a run's folder, a folder in Hugging Face's layout, or "
             "gpt2, gpt2-medium, gpt2-large, gpt2-xl (default: %(default)s)")
    add("--prompt", help="default: the run's sample_prompt")
    add("--prompt_file", metavar="FILE",
        help="the prompt from a file, or - for standard input (default: --prompt)")
    add("--tokenizer", choices=("gpt2", "bytes"),
        help="of a folder that names none, such as a byte-level one (default: the model's own)")
    add("--num_samples", type=int, default=1,
        help="sample i draws with seed + i - 1, whatever their number (default: %(default)s)")
    add("--max_new_tokens", type=int, default=200, help="default: %(default)s")
    add("--temperature", type=float, default=1.0,
        help="0: the most likely token (default: %(default)s)")
    add("--top_k", type=int, help="draw from the k most likely tokens only (default: from all)")
    add("--top_p", type=float, help="draw from the most likely tokens only, as many as it takes for "
                                    "this probability (default: from all)")
    add("--seed", type=int, default=42, help="default: %(default)s")
    add("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"),
        help="default: %(default)s: cuda, else mps, else cpu")
    args = parser.parse_args()
    for is_wrong, message in (
            (args.prompt == "", f"--prompt is empty; '{END_OF_TEXT}' asks for a text from nothing"),
            (not 1 <= args.num_samples <= 1000, "--num_samples must be from 1 to 1,000"),
            (args.max_new_tokens < 1, "--max_new_tokens must be at least 1"),
            (args.temperature and not 0.01 <= args.temperature <= 100,
             "--temperature must be 0, or from 0.01 to 100"),
            (not 0 <= args.seed <= 9e18, "--seed must be from 0 to 9e18"),
            (args.top_k is not None and args.top_k < 1, "--top_k must be at least 1"),
            (args.top_p is not None and not 0 < args.top_p <= 1,
             "--top_p must be above 0 and at most 1")):
        if is_wrong:
            parser.error(message)
    return args


if __name__ == "__main__":
    run_script(main)
