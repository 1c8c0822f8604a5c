"""Text to token ids: GPT-2's tokenizer and a byte-level one."""

import functools
import hashlib
import os
import tempfile
from pathlib import Path

import numpy as np
import tiktoken

from nanolab.common import UserError, describe, reachable

END_OF_TEXT = "<|endoftext|>"
UNKNOWN = "unknown"  # for weights and token files whose tokenizer nothing names
GPT2_HOST = "openaipublic.blob.core.windows.net"
GPT2_VOCABULARY = [f"https://{GPT2_HOST}/gpt-2/encodings/main/{file}"
                   for file in ("vocab.bpe", "encoder.json")]


@functools.cache
def get_tokenizer(name):
    """'gpt2': 50,257 tokens. 'bytes': the 256 bytes and an end-of-text token. -> tiktoken.Encoding

    Raises UserError, within 2 seconds if GPT-2's vocabulary is not here and the network is down.
    """
    if name == "bytes":
        return tiktoken.Encoding("bytes", pat_str=r"[\s\S]{1,32}",
                                 mergeable_ranks={bytes([byte]): byte for byte in range(256)},
                                 special_tokens={END_OF_TEXT: 256})
    if name == UNKNOWN:
        raise UserError("these tokens cannot be turned into text: "
                        "their tokenizer is unknown, neither gpt2 nor bytes")
    if name != "gpt2":
        raise UserError(f"unknown tokenizer '{name}'; there are gpt2 and bytes")
    advice = ("connect once, or set TIKTOKEN_CACHE_DIR to a folder that has it, "
              "or use --tokenizer=bytes")
    on_disk = all(path.exists() for path in gpt2_vocabulary_files())
    if not on_disk and not reachable(GPT2_HOST):
        raise UserError("GPT-2's vocabulary is not on this machine "
                        f"and {GPT2_HOST} does not answer: {advice}")
    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as error:  # of requests, or tiktoken's own if a hash does not match
        raise UserError("GPT-2's vocabulary could not be loaded "
                        f"({type(error).__name__}): {advice}") from None


def gpt2_vocabulary_files():
    """Where tiktoken caches vocab.bpe and encoder.json (see its load.py). -> [Path, Path]"""
    folder = (os.environ.get("TIKTOKEN_CACHE_DIR") or os.environ.get("DATA_GYM_CACHE_DIR")
              or Path(tempfile.gettempdir(), "data-gym-cache"))
    return [Path(folder, hashlib.sha1(url.encode()).hexdigest()) for url in GPT2_VOCABULARY]


def guess_tokenizer(vocab_size):
    """The tokenizer of weights or token files that do not name one.

    GPT-2's has 50,257 tokens; nanoGPT pads them to 50,304.
    """
    return "gpt2" if vocab_size in (50257, 50304) else UNKNOWN


def encode(tokenizer, text):
    """The token ids of a document and its end-of-text token. -> (n,) uint32. Raises UserError.

    As in the published data, "<|endoftext|>" inside the text becomes that token too.
    """
    try:
        tokens = tokenizer.encode_to_numpy(text, allowed_special={END_OF_TEXT})
    except ValueError as error:  # about a million spaces overflow the stack of tiktoken's regex
        raise UserError("tiktoken cannot encode the document that starts with "
                        f"{text[:60]!r} ({describe(error)})") from None
    return np.append(tokens, np.uint32(tokenizer.eot_token))


def token_bytes(tokenizer, token):
    """The text of one token id, as UTF-8; of an id that the tokenizer does not have, a sign that
    says so."""
    try:
        return tokenizer.decode_single_token_bytes(token)
    except KeyError:  # a model's vocab_size may exceed the tokenizer's
        return "\N{REPLACEMENT CHARACTER}".encode()


def token_dtype(tokenizer):
    """The smallest little-endian integer type that holds every token id."""
    return np.dtype("<u2" if tokenizer.n_vocab <= 2**16 else "<u4")
