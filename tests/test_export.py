"""Weights out: whatever its flags, transformers reads an exported model, computes its logits and
writes its text; and nanolab reads the folder back without running its code."""

import re

import pytest
import torch

from conftest import assert_same_logits, read_json
from model import GPT, GPTConfig
from nanolab.checkpoint import load_model
from nanolab.common import UserError
from nanolab.export import export
from nanolab.huggingface import read_any
from nanolab.tokenizer import encode, get_tokenizer

SHAPE = {"vocab_size": 257, "block_size": 32, "n_layer": 3, "n_head": 2, "n_embd": 32}
MODERN = {"norm": "rmsnorm", "position": "rope", "qk_norm": True, "qk_bound": 12.0,
          "activation": "swiglu", "logit_softcap": 2.0, "value_residual": True,
          "value_embeddings": True, "x0_lambdas": True, "embed_norm": True, "qkv_bias": True}

AS_GPT2 = [{}, {"qkv_bias": True, "tie_weights": True}, {"activation": "gelu_erf"},
           {"init": "gpt2", "zero_init": True}]
WITH_CODE = [{"position": "rope"}, {"qk_norm": True}, {"qk_norm": True, "qk_bound": 7.0},
             {"norm": "rmsnorm"}, {"activation": "relu2"}, {"activation": "swiglu"},
             {"logit_softcap": 2.0}, {"value_residual": True}, {"value_embeddings": True},
             {"x0_lambdas": True}, {"embed_norm": True}, MODERN,
             {**MODERN, "tie_weights": True, "qkv_bias": False}]


@pytest.fixture(scope="module", autouse=True)
def code_cache(tmp_path_factory):
    """Where transformers copies the code that it runs."""
    with pytest.MonkeyPatch.context() as patch:
        from transformers import dynamic_module_utils
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE",
                      str(tmp_path_factory.mktemp("modules")))
        yield


def random_model(**flags):
    """In which every parameter counts: none is 0 or 1, as some are at the start."""
    gpt = GPT(GPTConfig(**{**SHAPE, **flags})).eval()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for p in gpt.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.3)
    return gpt


def export_model(gpt, folder, tokenizer="bytes"):
    export({"path": "out/best.pt", "tokenizer": tokenizer, "tokens": 5120, "step": 10,
            "config": {"name": "mine", "dataset": "stdlib"}}, gpt, folder)


def read_hf_model(folder, **options):
    from transformers import AutoModelForCausalLM, logging
    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def generate(hf_model, tokens, n, **options):
    return hf_model.generate(tokens, max_new_tokens=n, eos_token_id=None, pad_token_id=256,
                             **{"do_sample": False, **options})


def prompts(*lengths):
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(1, 256, (1, n), generator=generator) for n in lengths]


@pytest.mark.parametrize("flags", AS_GPT2 + WITH_CODE, ids=lambda flags: " ".join(flags) or "plain")
def test_flags(tmp_path, flags):
    """Logits to 1e-4, loss, greedy text with and without a cache, and back again."""
    ours, folder = random_model(**flags), tmp_path / "folder"
    export_model(ours, folder)
    has_code = (folder / "modeling_nanolab.py").exists()
    assert has_code is (flags in WITH_CODE)
    theirs = read_hf_model(folder, trust_remote_code=has_code)
    assert type(theirs).__name__ == ("NanolabForCausalLM" if has_code else "GPT2LMHeadModel")
    assert theirs.config.tie_word_embeddings is ours.config.tie_weights
    assert has_code or theirs.config.attn_pdrop == ours.config.dropout == 0.1
    assert_same_logits(ours, theirs)

    tokens = torch.cat(prompts(5, 5))
    expected = ours.generate(tokens, 27, temperature=0)
    n_read = []
    theirs.get_input_embeddings().register_forward_hook(
        lambda module, args, out: n_read.append(args[0].shape[1]))
    assert torch.equal(generate(theirs, tokens, 27), expected)
    assert n_read == [5] + [1] * 26, "later tokens come from the cache"
    assert torch.equal(generate(theirs, tokens, 5, use_cache=False), expected[:, :10])
    with torch.no_grad():
        loss = theirs(expected, labels=expected).loss.item()
        assert loss == pytest.approx(ours(expected[:, :-1], expected[:, 1:]).item(), abs=1e-5)

    back = load_model(read_any(folder))
    assert back.config.tie_weights is ours.config.tie_weights
    with torch.no_grad():
        assert torch.equal(back(tokens), ours(tokens)) or not ours.config.qkv_bias
    assert read_any(folder)["tokenizer"] == "bytes"


@pytest.fixture(scope="module")
def modern(tmp_path_factory):
    """-> a model with every flag, its folder, and transformers' model of that"""
    ours, folder = random_model(**MODERN), tmp_path_factory.mktemp("modern") / "folder"
    export_model(ours, folder)
    return ours, folder, read_hf_model(folder, trust_remote_code=True)


def test_batch_of_several_prompts(modern):
    """With padding on the left, each gets the text that it gets alone; padding on the right changes
    no earlier logits; a mask of another kind is refused."""
    ours, _, theirs = modern
    texts = prompts(9, 4, 4, 1)
    tokens = torch.cat([torch.nn.functional.pad(text, (9 - text.shape[1], 0), value=256)
                        for text in texts])
    mask = (tokens != 256).long()
    for options in ({}, {"use_cache": False}, {"num_beams": 3}):
        found = generate(theirs, tokens, 8, attention_mask=mask, **options)
        for text, row in zip(texts, found):
            alone = generate(theirs, text, 8, **options)
            assert torch.equal(row[9 - text.shape[1]:], alone[0])
            if "num_beams" not in options:
                assert torch.equal(alone, ours.generate(text, 8, temperature=0))
    with torch.no_grad():
        right = theirs(tokens.flip(1), attention_mask=mask.flip(1)).logits
        for text, row in zip(texts, right):
            n = text.shape[1]
            assert torch.allclose(row[:n], ours(text.flip(1))[0], atol=1e-5)
        for bad in (torch.tensor([[1, 0] + 7 * [1]] * 4), mask[:, :5], mask[:, None, None]):
            with pytest.raises(ValueError, match="this model reads an attention_mask of the shape"):
                theirs(tokens, attention_mask=bad)


def test_cache_and_sampling(modern):
    """Several tokens after cached ones; sampling draws the same with and without a cache; more
    tokens than the context end with a line."""
    ours, _, theirs = modern
    tokens, = prompts(20)
    with torch.no_grad():
        past = theirs(tokens[:, :12], use_cache=True).past_key_values
        rest = theirs(tokens[:, 12:], past_key_values=past, logits_to_keep=3).logits
        assert torch.allclose(rest, ours(tokens)[:, -3:], atol=1e-5)
    drawn = []
    for use_cache in (True, False):
        torch.manual_seed(7)
        drawn.append(generate(theirs, tokens, 6, do_sample=True, top_p=0.9, temperature=0.7,
                              num_return_sequences=3, use_cache=use_cache))
    assert torch.equal(*drawn) and len(drawn[0].unique(dim=0)) == 3
    with pytest.raises(ValueError, match="33 tokens are more than the 32 that this model reads"):
        generate(theirs, tokens, 14)


def test_saved_again(modern, tmp_path):
    """By transformers, in 16 bits: its tables keep their 32, and we read it too."""
    _, folder, theirs = modern
    half = read_hf_model(folder, trust_remote_code=True, dtype=torch.bfloat16)
    assert torch.equal(half.gpt.blocks[0].attn.rope.cos, theirs.gpt.blocks[0].attn.rope.cos)
    half.save_pretrained(tmp_path)
    again = read_hf_model(tmp_path, trust_remote_code=True, dtype=torch.float32)
    assert_same_logits(load_model(read_any(tmp_path)), again)
    again.train()(torch.cat(prompts(8)), labels=torch.cat(prompts(8))).loss.backward()
    assert all(p.grad is not None for p in again.parameters())


@pytest.mark.parametrize("tokenizer, flags", [("gpt2", {}), ("bytes", {"position": "rope"}),
                                              ("bytes", {}), ("unknown", {})])
def test_tokenizer(tmp_path, tokenizer, flags):
    """AutoTokenizer has our tokens, where there are some to have; the card says what there is."""
    from transformers import AutoTokenizer
    export_model(random_model(vocab_size=50257, n_embd=8, n_layer=1, **flags), tmp_path / "folder",
                 tokenizer)
    names = {file.name for file in (tmp_path / "folder").iterdir()}
    assert names >= {"config.json", "generation_config.json", "model.safetensors", "README.md"}
    card = (tmp_path / "folder" / "README.md").read_text()
    assert ("**Loading it runs code**" in card) is bool(flags)
    assert "parameters, written by nanolab: `mine` after 10 steps, data set:\nstdlib" in card
    end_of_text = read_json(tmp_path / "folder/config.json")["eos_token_id"]
    if tokenizer == "unknown":
        assert not any("token" in name or "vocab" in name for name in names)
        assert end_of_text is None
        return
    theirs = AutoTokenizer.from_pretrained(tmp_path / "folder", trust_remote_code=True)
    text = "Every effort moves you: été, 12 345  spaces,\r\n\n\x00<|endoftext|>new 😀"
    expected = encode(get_tokenizer(tokenizer), text)[:-1].tolist()
    assert theirs(text)["input_ids"] == expected and theirs.decode(expected) == text
    assert theirs.eos_token_id == end_of_text == get_tokenizer(tokenizer).eot_token
    assert theirs.model_max_length == 32


def test_command(tmp_path, gpt2_data, small_run, output_of, monkeypatch):
    """From a run's file; sample.py and eval.py use the folder, without a network or another
    vocabulary; one that is not empty is refused."""
    def results(source):
        return (output_of("sample", "--ckpt", source, "--temperature=0", "--device=cpu",
                          "--prompt=Document", "--max_new_tokens=20"),
                re.search(r"test loss +(\S+)", output_of(
                    "eval", "--ckpt", source, *gpt2_data, "--device=cpu"))[1])

    run = small_run("run", "--max_steps=2", "--position=rope", *gpt2_data) / "best.pt"
    folder = tmp_path / "folder"
    folder.mkdir()  # an empty one may be there
    assert output_of("nanolab.huggingface", "export", run, folder).splitlines()[-1].startswith(
        f"wrote {folder}, from {run}, step 2; ")
    ours = results(run)
    get_tokenizer.cache_clear()
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("nanolab.tokenizer.reachable", lambda host: False)
    assert results(folder) == ours
    with pytest.raises(UserError, match="is there and not empty"):
        output_of("nanolab.huggingface", "export", run, folder)
