"""What notebooks and other programs use: nanolab.load. docs/library.md shows it."""


def load(source="out/best.pt", device="auto"):
    """A trained model and its tokenizer. -> LanguageModel, in float32, in eval mode

    source: a checkpoint, a run's folder, a folder in Hugging Face's layout, or gpt2, gpt2-medium,
    ...; device: auto, cuda, mps, cpu. Loads no training code. Raises common.UserError.
    """
    from nanolab.language_model import LanguageModel  # here: not every module needs torch
    return LanguageModel(source, device)
