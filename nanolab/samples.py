"""A text that the model writes while it trains. Drawing it leaves no trace in the training."""

import torch

from nanolab.common import UserError
from nanolab.devices import autocast
from nanolab.tokenizer import END_OF_TEXT, get_tokenizer, token_bytes

SAMPLE_TOKENS = 128  # at most; a text also ends at an end-of-text token


def make_sampler(model, config, tokenizer_name, device, dtype):
    """A function that draws a text after config.sample_prompt from the model as it is then.

    It always draws the same random numbers, from a generator of its own, so texts differ by what
    the model has learnt. None if config.sample_every is 0. Raises UserError if the tokenizer is
    not there.
    """
    if not config.sample_every:
        return None
    try:
        tokenizer = get_tokenizer(tokenizer_name)
    except UserError as error:
        raise UserError(f"{error}; or train without --sample_every") from None
    prompt = tokenizer.encode(config.sample_prompt, allowed_special={END_OF_TEXT})

    def draw():
        was_training = model.training
        model.eval()
        generator = torch.Generator(device).manual_seed(config.seed)
        tokens = torch.tensor([prompt], device=device)
        text = b"".join(token_bytes(tokenizer, token) for token in prompt)
        try:
            with autocast(dtype, device):
                for token in model.stream(tokens, SAMPLE_TOKENS, generator=generator):
                    if token.item() == tokenizer.eot_token:
                        break
                    text += token_bytes(tokenizer, token.item())
        except UserError as error:  # logits that are not finite end no run
            text += f" (no sample: {error})".encode()
        model.train(was_training)
        return text.decode(errors="replace")

    return draw
