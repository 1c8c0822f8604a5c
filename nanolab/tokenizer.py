"""Text to token ids: GPT-2's tokenizer and a byte-level one."""

import functools
import hashlib
import json
import os
import tempfile
from pathlib import Path

import numpy as np
import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str

from nanolab.common import UserError, describe, reachable

END_OF_TEXT = "<|endoftext|>"
UNKNOWN = "unknown"  # for weights and token files whose tokenizer nothing names
CHARACTERS = "character:"  # begins a tokenizer's name; its characters follow, by id, as JSON
GPT2_HOST = "openaipublic.blob.core.windows.net"
GPT2_VOCABULARY = [f"https://{GPT2_HOST}/gpt-2/encodings/main/{file}"
                   for file in ("vocab.bpe", "encoder.json")]
# The two files as OpenAI and as Hugging Face name them.
VOCABULARY_NAMES = (("vocab.bpe", "encoder.json"), ("merges.txt", "vocab.json"))
# SHA-256 of GPT-2's vocabulary, written as JSON: its [token, id] pairs by id.
GPT2_VOCABULARY_SHA256 = "140f02bb05c0d82c3e45f14050c6be40a9b6fe2773b7dfce0fbb815918c30199"


@functools.cache
def get_tokenizer(name):
    """'gpt2': 50,257 tokens. 'bytes': the 256 bytes and an end-of-text token. CHARACTERS + '"abc"':
    a is 0, b is 1, c is 2, and what these lack has higher ids. -> tiktoken.Encoding"""
    if name == "bytes" or name.startswith(CHARACTERS):
        characters = json.loads(name[len(CHARACTERS):]) if name != "bytes" else ""
        ranks = {character.encode(): i for i, character in enumerate(characters)}
        for byte in range(256):
            ranks.setdefault(bytes([byte]), len(ranks))
        pattern = r"[\s\S]" if characters else r"[\s\S]{1,32}"  # of bytes, many at once: faster
        return tiktoken.Encoding(name.split(":")[0], pat_str=pattern, mergeable_ranks=ranks,
                                 special_tokens={END_OF_TEXT: len(ranks)})
    if name != "gpt2":
        raise UserError(f"the tokenizer of these tokens is unknown ('{name}'); name it to "
                        "sample.py with --tokenizer=bytes or gpt2")
    merges, vocabulary = gpt2_vocabulary_files()
    if vocabulary.name.endswith(".json"):
        return gpt2_from_file(vocabulary)
    try:
        if not all(map(os.path.exists, (merges, vocabulary))) and not reachable(GPT2_HOST):
            raise OSError(f"{GPT2_HOST} does not answer")
        return tiktoken.get_encoding("gpt2")
    except Exception as error:  # of requests, or tiktoken's own if a hash does not match
        raise UserError(f"GPT-2's vocabulary could not be loaded ({describe(error)}): connect once,"
                        " or set TIKTOKEN_CACHE_DIR to a folder that has vocab.bpe and encoder.json"
                        " (docs/data.md says where they are), or use --tokenizer=bytes") from None


def gpt2_vocabulary_files():
    """vocab.bpe and encoder.json in TIKTOKEN_CACHE_DIR, by these names or Hugging Face's; else
    where tiktoken caches them (see its load.py). -> [Path, Path]"""
    folder = (os.environ.get("TIKTOKEN_CACHE_DIR") or os.environ.get("DATA_GYM_CACHE_DIR")
              or Path(tempfile.gettempdir(), "data-gym-cache"))
    for names in VOCABULARY_NAMES:
        paths = [Path(folder, name) for name in names]
        if all(map(os.path.exists, paths)):  # no error for another user's folder
            return paths
    return [Path(folder, hashlib.sha1(url.encode()).hexdigest()) for url in GPT2_VOCABULARY]


def gpt2_from_file(path):
    """GPT-2's tokenizer from its encoder.json, under any name. Raises UserError."""
    try:
        vocabulary = json.loads(path.read_text(encoding="utf-8"))
        is_gpt2 = vocabulary_sha256(vocabulary) == GPT2_VOCABULARY_SHA256
    except (ValueError, AttributeError, TypeError):
        is_gpt2 = False
    if not is_gpt2:
        raise UserError(f"{path} is damaged, or not GPT-2's vocabulary")
    bytes_of = {character: byte for byte, character in byte_characters().items()}
    end_of_text = {END_OF_TEXT: vocabulary.pop(END_OF_TEXT)}
    ranks = {bytes(bytes_of[character] for character in token): i
             for token, i in vocabulary.items()}
    return tiktoken.Encoding("gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks,
                             special_tokens=end_of_text)


def byte_characters():
    """How GPT-2's vocabulary writes bytes: {byte: character}. A byte that is no visible character
    is one from 256 on."""
    visible = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {**{byte: chr(byte) for byte in visible},
            **{byte: chr(256 + i) for i, byte in enumerate(hidden)}}


def vocabulary_sha256(vocabulary):
    """vocabulary: {token: id}, as in encoder.json. See GPT2_VOCABULARY_SHA256."""
    pairs = sorted(vocabulary.items(), key=lambda pair: pair[1])
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()


def guess_tokenizer(vocab_size):
    """The tokenizer of weights or token files that do not name one."""
    return "gpt2" if vocab_size in (50257, 50304) else UNKNOWN  # nanoGPT pads GPT-2's tokens


def encode(tokenizer, text):
    """The token ids of a document and its end-of-text token. -> (n,) uint32

    As in the published data, "<|endoftext|>" inside the text becomes that token too.
    """
    tokens = tokenizer.encode_to_numpy(text, allowed_special={END_OF_TEXT})
    return np.append(tokens, np.uint32(tokenizer.eot_token))


def encode_prompt(tokenizer, prompt, vocab_size):
    """-> [id]. Raises UserError."""
    tokens = tokenizer.encode(prompt, allowed_special={END_OF_TEXT})
    if max(tokens, default=0) >= vocab_size:
        raise UserError(f"the prompt {prompt[:60]!r} has characters that the model has no tokens "
                        "for; choose another")
    return tokens


def text_of(tokens, tokenizer):
    """Yields the text of each token id, as UTF-8 bytes, up to an end-of-text token."""
    for token in tokens:
        if token == tokenizer.eot_token:
            return
        try:
            yield tokenizer.decode_single_token_bytes(token)
        except KeyError:  # a model's vocab_size may exceed the tokenizer's
            yield "\N{REPLACEMENT CHARACTER}".encode()


def token_dtype(tokenizer):
    """The smallest little-endian integer type that holds every token id."""
    return np.dtype("<u2" if tokenizer.n_vocab <= 2**16 else "<u4")
