"""Our GPT as a class of transformers. Nothing imports this file: export.py writes its text, after
model.py's, into the folder of a model that transformers' GPT-2 cannot express."""

import torch
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from model import GPT


class NanolabConfig(PretrainedConfig):
    """The options of GPTConfig, from config.json."""
    model_type = "nanolab"
    attribute_map = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer",
                     "num_attention_heads": "n_head", "max_position_embeddings": "block_size"}


class NanolabForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = NanolabConfig
    base_model_prefix = "gpt"
    _supports_sdpa = True
    _tied_weights_keys = {"gpt.head.weight": "gpt.wte.weight"}  # if config.tie_word_embeddings

    def __init__(self, config):
        super().__init__(config)
        self.gpt = GPT(config)
        self.post_init()

    def _init_weights(self, module):
        """GPT has initialised itself. But from_pretrained leaves tables that are no weights, such
        as Rope's, with random content."""
        if module._non_persistent_buffers_set:
            with next(module.buffers()).device:
                module.__init__(self.config)

    def get_input_embeddings(self):
        return self.gpt.wte

    def get_output_embeddings(self):
        return self.gpt.head

    def forward(self, input_ids, attention_mask=None, past_key_values=None, labels=None,
                use_cache=None, logits_to_keep=0, return_dict=True):
        """As transformers' GPT2LMHeadModel. attention_mask: (B, all tokens so far), with padding
        on the left; padding on the right changes no earlier token."""
        if past_key_values is None and use_cache:
            past_key_values = DynamicCache(config=self.config)
        n_past = past_key_values.get_seq_length() if past_key_values is not None else 0
        n_tokens = n_past + input_ids.shape[1]
        padding = left_padding(attention_mask, len(input_ids), n_tokens)
        if n_tokens - min(padding) > self.config.block_size:
            raise ValueError(f"{n_tokens - min(padding)} tokens are more than the "
                             f"{self.config.block_size} that this model reads")
        x = self.hidden_states(input_ids, padding, past_key_values, n_past)
        keep = logits_to_keep
        logits = self.gpt.logits(x[:, -keep:] if isinstance(keep, int) else x[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size)
        output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)
        return output if return_dict else output.to_tuple()

    def hidden_states(self, input_ids, padding, past_key_values, n_past):
        """(B, T) token ids after n_past cached ones -> (B, T, C). Sequences with the same padding
        go through the model together, without it."""
        B, T = input_ids.shape
        x = self.gpt.wte.weight.new_zeros(B, T, self.config.n_embd)
        cache = None
        if past_key_values is not None:
            cache = self.gpt.new_cache(B)
            cache = cache.new_zeros(*cache.shape[:-2], n_past + T, cache.shape[-1])
            if n_past:
                cache[..., :n_past, :] = torch.stack([
                    torch.stack((layer.keys, layer.values)) for layer in past_key_values.layers
                ])[..., :n_past, :]
        for n in sorted(set(padding)):
            rows = [i for i in range(B) if padding[i] == n]
            first, position = max(n - n_past, 0), max(n_past - n, 0)
            part = None if cache is None else cache[:, :, rows, :, n:]  # a copy
            x[rows, first:] = self.read(input_ids[rows, first:], part, position).to(x.dtype)
            if cache is not None:
                cache[:, :, rows, :, n:] = part
        if cache is not None:
            for layer, (keys, values) in enumerate(cache[..., n_past:, :]):
                past_key_values.update(keys, values, layer)
        return x

    def read(self, tokens, cache, position):
        """GPT.hidden_states, which reads several tokens at position 0 only."""
        if position == 0:
            return self.gpt.hidden_states(tokens, cache)
        return torch.cat([self.gpt.hidden_states(token, cache, position + i)
                          for i, token in enumerate(tokens.split(1, dim=1))], dim=1)


def left_padding(attention_mask, B, n_tokens):
    """How many tokens of padding each of B sequences begins with."""
    if attention_mask is None:
        return [0] * B
    mask = attention_mask.bool()
    n_beginnings = (mask[..., 1:] & ~mask[..., :-1]).sum(dim=-1) + mask[..., 0]
    if mask.shape != (B, n_tokens) or (n_beginnings > 1).any():
        raise ValueError("this model reads an attention_mask of the shape (sequences, tokens, with "
                         "those in the cache), in which the padding is on one side")
    return (mask.cumsum(dim=1) == 0).sum(dim=1).clamp(max=n_tokens - 1).tolist()
