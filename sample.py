"""Text from a checkpoint, as it is made.

    python sample.py
    python sample.py --ckpt out --prompt "def main():" --num_samples 3 --temperature 0.8
    python sample.py --prompt_file prompt.txt --top_p 0.9
    python sample.py --interactive

nanoGPT's --out_dir, --init_from and --start (also FILE:prompt.txt) are taken too.
"""

import contextlib
import itertools
import sys
from argparse import SUPPRESS
from pathlib import Path

import torch

from config import OPTIONS
from nanolab.common import UserError, argument_parser, run_script
from nanolab.language_model import LanguageModel


def main():
    args = parse_arguments()
    lm = LanguageModel(args.ckpt, args.device, args.tokenizer)
    if lm.device.type == "cpu":
        torch.set_num_threads(1)  # as fast for one token; others would wait for a busy core
    seeds = itertools.count(args.seed)

    def stream(text):
        """Yields what the model adds to a text, with the next seed."""
        return lm.stream(text, args.max_new_tokens, args.temperature, args.top_k, args.top_p,
                         next(seeds))

    if args.interactive:
        return continue_prompts(stream)
    prompt = args.prompt
    if prompt is None:  # weights in Hugging Face's layout come without one
        prompt = lm.options.get("sample_prompt", OPTIONS["sample_prompt"].default)
    for i in range(args.num_samples):
        parts = stream(prompt)
        if args.num_samples > 1:
            print(f"--- sample {i + 1}")
        print(prompt, end="", flush=True)
        try:
            for part in parts:
                print(part, end="", flush=True)
        finally:  # Ctrl-C ends the line too
            print()


def continue_prompts(stream):
    """Reads the beginning of a text from the terminal and continues it, again and again."""
    with contextlib.suppress(ImportError):  # some Pythons are built without it
        import readline  # noqa: F401: input() then has arrow keys and a history
    print("Type how a text begins. An empty line goes on with it, Ctrl-C stops it, Ctrl-D ends.")
    text = ""
    while True:
        try:
            text = input("> ") or text
        except EOFError:
            print()
            return
        try:
            for part in stream(text) if text else ():
                print(part, end="", flush=True)
                text += part
        except UserError as error:
            print(error, end="")
            text = ""
        except KeyboardInterrupt:
            pass  # an empty line goes on from what was printed
        print()


def utf8_text(file):
    """The text of a file, or of standard input for "-". Raises UserError."""
    try:
        return (sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()).decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text (byte {error.start:,})") from None


def start_text(start):
    """nanoGPT's --start: a text, or FILE:name of a file."""
    return utf8_text(start.removeprefix("FILE:")) if start.startswith("FILE:") else start


def parse_arguments():
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add("--ckpt", "--out_dir", metavar="CKPT", default="out/best.pt",
        help="a checkpoint, nanoGPT's too, a run's folder, a folder in Hugging Face's layout, or "
             "gpt2, gpt2-medium, gpt2-large, gpt2-xl (default: %(default)s)")
    add("--prompt", help="default: the run's sample_prompt")
    add("--prompt_file", metavar="FILE", dest="prompt", type=utf8_text,
        help="the prompt from a file, or - for standard input")
    add("--interactive", action="store_true", help="continue texts that you type")
    add("--init_from", help=SUPPRESS)  # nanoGPT's
    add("--start", dest="prompt", type=start_text, help=SUPPRESS)
    add("--tokenizer", choices=("gpt2", "bytes"),
        help="for weights that name none, such as byte-level ones (default: the model's own)")
    add("--num_samples", type=int, default=1,
        help="sample i draws with seed + i - 1 (default: %(default)s)")
    add("--max_new_tokens", type=int, default=200, help="default: %(default)s")
    add("--temperature", type=float, default=1.0,
        help="0: the most likely token (default: %(default)s)")
    add("--top_k", type=int, help="draw from the k most likely tokens only (default: from all)")
    add("--top_p", type=float,
        help="draw from the most likely tokens of this probability together (default: from all)")
    add("--seed", type=int, default=42, help="default: %(default)s")
    add("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"),
        help="default: %(default)s: cuda, else mps, else cpu")
    args = parser.parse_args()
    if args.init_from not in (None, "resume"):
        args.ckpt = args.init_from
    if min(args.num_samples, args.seed + 1) < 1 or args.seed > 10**18:
        parser.error("--num_samples must be at least 1, and --seed from 0 to 10^18")
    return args


if __name__ == "__main__":
    run_script(main)
