"""A trained model that reads and writes text, and shows what it computes: see nanolab.load."""

import codecs
import math
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from nanolab.checkpoint import load_model
from nanolab.common import UserError
from nanolab.distributed import pick_device
from nanolab.huggingface import read_any
from nanolab.tokenizer import (END_OF_TEXT, encode_prompt, get_tokenizer, gpt2_from_file,
                               text_of)


class Loss(NamedTuple):
    """How badly a model predicts a text."""
    nats: float  # the mean over the tokens
    bits_per_byte: float  # comparable between tokenizers
    per_token: torch.Tensor  # (T,), in nats


class LanguageModel:
    """model: the GPT; tokenizer: its tiktoken.Encoding. Texts are str. T is the number of a text's
    tokens, at most model.config.block_size where a method does not say otherwise.
    """

    def __init__(self, source, device="auto", tokenizer=None):
        checkpoint = read_any(source)
        self.options = checkpoint["config"]  # of its run
        name, own = tokenizer or checkpoint["tokenizer"], Path(source, "vocab.json")
        is_own = name == "gpt2" and own.is_file()  # an export needs no network
        self.tokenizer = gpt2_from_file(own) if is_own else get_tokenizer(name)
        self.device = pick_device(device)
        self.model = load_model(checkpoint).to(self.device)

    def generate(self, text="", max_new_tokens=200, temperature=1.0, top_k=None, top_p=None,
                 seed=42):
        """The text and what the model adds, up to an end of text. Both may be of any length.

        temperature, top_k, top_p: as for GPT.stream.
        """
        return text + "".join(self.stream(text, max_new_tokens, temperature, top_k, top_p, seed))

    def stream(self, text, max_new_tokens, temperature, top_k, top_p, seed):
        """What generate adds to the text, in pieces, as it is made. -> an iterator over str. Raises
        UserError."""
        for name, value, low, high in (("max_new_tokens", max_new_tokens, 1, 10**9),
                                       ("temperature", temperature or 1, 0.01, 100),
                                       ("top_k", top_k, 1, 10**9), ("top_p", top_p, 1e-9, 1)):
            if value is not None and not low <= value <= high:
                raise UserError(f"{name} must be from {low} to {high}, not {value}", exit_code=2)
        prompt = self.batch(self.encode(text or END_OF_TEXT))
        generator = torch.Generator(self.device).manual_seed(seed)
        top_k = min(top_k, self.model.config.vocab_size) if top_k else None
        tokens = self.model.stream(prompt, max_new_tokens, temperature, top_k, top_p, generator)
        # a character that has several tokens comes with the last one
        return codecs.iterdecode(text_of(map(int, tokens), self.tokenizer), "utf-8", "replace")

    @torch.no_grad()
    def loss(self, text):
        """The loss of a text of any length: of each token, given those before it in its window of
        block_size tokens. The first window begins with an end of text, after which a text starts.
        """
        tokens = self.encode(text)
        if self.tokenizer.eot_token < self.model.config.vocab_size:
            tokens = [self.tokenizer.eot_token, *tokens]  # else the first token is not predicted
        if len(tokens) < 2:
            raise UserError("a text of no tokens has no loss")
        size, losses = self.model.config.block_size, []
        for i in range(0, len(tokens) - 1, size):
            window = self.batch(tokens[i:i + size + 1])
            logits = self.model(window[:, :-1])
            losses.append(F.cross_entropy(logits[0], window[0, 1:], reduction="none").cpu())
        per_token = torch.cat(losses)
        bits = per_token.double().sum().item() / math.log(2)
        return Loss(per_token.double().mean().item(),
                    bits / len(self.tokenizer.decode_bytes(tokens[1:])), per_token)

    def tokens(self, text):
        """The tokens of a text, as T pieces of text: labels for a picture."""
        return [self.tokenizer.decode([token]) for token in self.encode(text)]

    @torch.no_grad()
    def hidden_states(self, text):
        """What the blocks read and write, (n_layer + 1, T, n_embd): the embeddings, then each
        block's output. model.logits(model.ln_f(it)) is what the model would say from there, on
        the model's device."""
        window, states = self.batch(self.encode(text), check=True), []
        hooks = [module.register_forward_hook(
            lambda module, args, out: states.append(out[0] if isinstance(out, tuple) else out))
            for module in (self.model.dropout, *self.model.blocks)]
        self.model.hidden_states(window)
        for hook in hooks:
            hook.remove()
        return torch.cat(states).cpu()

    @torch.no_grad()
    def attention(self, text):
        """How much each token looks at each earlier one and itself, (n_layer, n_head, T, T): row i
        is of token i, and sums to 1."""
        with RecordAttention() as record:
            self.model.hidden_states(self.batch(self.encode(text), check=True))
        return torch.cat(record.weights).cpu()

    def encode(self, text):
        return encode_prompt(self.tokenizer, text, self.model.config.vocab_size)

    def batch(self, tokens, check=False):
        """(1, T) token ids on the model's device."""
        if check and not 1 <= len(tokens) <= self.model.config.block_size:
            raise UserError(f"the text has {len(tokens):,} tokens; the model reads from 1 to "
                            f"{self.model.config.block_size:,} at a time")
        return torch.tensor([tokens], device=self.device)


class RecordAttention(TorchFunctionMode):
    """Computes the weights that scaled_dot_product_attention keeps to itself, wherever the model
    calls it. weights: one (1, n_head, T, T) a call."""

    def __init__(self):
        super().__init__()
        self.weights = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            q, k, v = args
            scale = kwargs["scale"] or q.shape[-1] ** -0.5
            scores = (scale * q @ k.transpose(-2, -1)).float()
            later = torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1)
            self.weights.append(scores.masked_fill(later, -math.inf).softmax(dim=-1))
        return function(*args, **kwargs)
