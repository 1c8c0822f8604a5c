"""Text from a checkpoint: one sample streamed as it is made, or several made side by side.

    python sample.py
    python sample.py --ckpt out --prompt "def main():" --num_samples 3 --temperature 0.8
    python sample.py --prompt_file prompt.txt --top_p 0.9
    python sample.py --interactive

nanoGPT's --out_dir, --init_from and --start (also FILE:prompt.txt) are taken too.
"""

import codecs
import contextlib
import sys
from argparse import SUPPRESS
from pathlib import Path

import torch

from config import OPTIONS
from nanolab.checkpoint import load_model
from nanolab.common import UserError, argument_parser, run_script
from nanolab.distributed import pick_device
from nanolab.huggingface import read_any
from nanolab.tokenizer import END_OF_TEXT, UNKNOWN, encode_prompt, get_tokenizer, text_of


def main():
    args = parse_arguments()
    checkpoint = read_any(args.ckpt)
    vocab_size = checkpoint["config"]["vocab_size"]
    if args.top_k and args.top_k > vocab_size:
        raise UserError(f"--top_k={args.top_k} is more than the {vocab_size} tokens of {args.ckpt}")
    if args.tokenizer not in (None, checkpoint["tokenizer"]) and checkpoint["tokenizer"] != UNKNOWN:
        raise UserError(f"{args.ckpt} reads {checkpoint['tokenizer']} tokens; "
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

    seeds = range(args.seed, args.seed + args.num_samples)
    generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def stream(text):
        """Yields the next token ids of all samples after the text, (num_samples,) at a time."""
        tokens = encode_prompt(tokenizer, text, vocab_size)
        prompts = torch.tensor([tokens] * args.num_samples, device=device)  # (num_samples, T)
        return model.stream(prompts, args.max_new_tokens, args.temperature, args.top_k, args.top_p,
                            generators)

    if args.interactive:
        continue_prompts(stream, tokenizer)
    elif args.num_samples == 1:
        steps = stream(prompt)
        print(prompt, end="", flush=True)
        try:
            for part in characters(steps, tokenizer):
                print(part, end="", flush=True)
        finally:  # Ctrl-C ends the line too
            print()
    else:
        samples = torch.stack(list(stream(prompt)), dim=1).tolist()  # (num_samples, max_new_tokens)
        for i, new_tokens in enumerate(samples):
            text = "".join(characters(new_tokens, tokenizer))
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


def characters(tokens, tokenizer):
    """Yields the text of tokens as they are made, up to an end-of-text token. A character that has
    several tokens comes with the last one."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for part in text_of(map(int, tokens), tokenizer):
        yield decoder.decode(part)
    yield decoder.decode(b"", final=True)


def continue_prompts(stream, tokenizer):
    """Reads the beginning of a text from the terminal and continues it, again and again."""
    with contextlib.suppress(ImportError):  # Windows has none
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
            for part in characters(stream(text), tokenizer) if text else ():
                print(part, end="", flush=True)
                text += part
        except UserError as error:
            print(error, end="")
            text = ""
        except KeyboardInterrupt:
            pass  # of what was printed an empty line goes on
        print()


def parse_arguments():
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add("--ckpt", "--out_dir", metavar="CKPT", default="out/best.pt",
        help="a checkpoint, nanoGPT's too, a run's folder, a folder in Hugging Face's layout, or "
             "gpt2, gpt2-medium, gpt2-large, gpt2-xl (default: %(default)s)")
    add("--prompt", help="default: the run's sample_prompt")
    add("--prompt_file", metavar="FILE",
        help="the prompt from a file, or - for standard input (default: --prompt)")
    add("--interactive", action="store_true", help="continue texts that you type")
    add("--init_from", help=SUPPRESS)  # nanoGPT's
    add("--start", help=SUPPRESS)
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
    if args.init_from not in (None, "resume"):
        args.ckpt = args.init_from
    if args.start is not None and args.start.startswith("FILE:"):
        args.prompt_file = args.start.removeprefix("FILE:")
    elif args.start is not None:
        args.prompt = args.start
    for is_wrong, message in (
            (args.prompt == "", f"--prompt is empty; '{END_OF_TEXT}' asks for a text from nothing"),
            (args.interactive and (args.num_samples != 1 or args.prompt or args.prompt_file),
             "--interactive asks for the prompts, and makes one sample of each"),
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
