"""Hugging Face's layout, in and out: transformers' GPT-2 has our logits, whoever wrote the weights.

The weights are random ones that transformers makes, so no network is needed.
"""

import dataclasses
import json

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from config import ARCHITECTURE_OPTIONS
from conftest import (assert_same_logits, equal_weights, losses, no_watch, run_main, run_quickly,
                      stop_at)
from model import GPTConfig
from nanolab import huggingface
from nanolab.checkpoint import load_model, read_checkpoint
from nanolab.common import UserError
from nanolab.data import TokenDataset, window_ids
from nanolab.huggingface import check_expressible, read_any
from nanolab.tokenizer import encode, get_tokenizer


def make_hf_model(folder, scale=0.5, **options):
    """A GPT2LMHeadModel with random weights and biases, saved in a folder. -> the model."""
    import transformers  # here: it takes seconds
    transformers.utils.logging.disable_progress_bar()
    options = {"vocab_size": 300, "n_positions": 48, "n_embd": 32, "n_layer": 2, "n_head": 4,
               "eos_token_id": 0, "bos_token_id": 0, **options}
    hf_model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**options)).eval()
    generator = torch.Generator().manual_seed(1)
    for p in hf_model.parameters():
        nn.init.normal_(p, std=scale, generator=generator)
    hf_model.save_pretrained(folder)
    return hf_model


def to_old_file(folder):
    """Like OpenAI's first upload: a pickle, names without a prefix, the causal masks too, few keys
    in config.json."""
    weights = load_file(folder / "model.safetensors")
    weights = {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}
    weights |= {"h.1.attn.bias": torch.ones(1, 1, 48, 48), "h.1.attn.masked_bias": torch.ones(())}
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    hf_config = json.loads((folder / "config.json").read_text())
    keys = ("model_type", "vocab_size", "n_positions", "n_embd", "n_layer", "n_head")
    (folder / "config.json").write_text(json.dumps({key: hf_config[key] for key in keys}))


def to_shards(folder):
    weights = list(load_file(folder / "model.safetensors").items())
    save_file(dict(weights[:9]), folder / "model-00001-of-00002.safetensors")
    save_file(dict(weights[9:]), folder / "model-00002-of-00002.safetensors")
    (folder / "model.safetensors").unlink()


# --- in

@pytest.mark.parametrize("options, change", [
    ({"tie_word_embeddings": False, "n_layer": 1, "n_head": 1}, None),
    ({"n_inner": 128, "activation_function": "gelu_pytorch_tanh", "n_layer": 3}, to_shards),
    ({"vocab_size": 50257, "n_embd": 16, "n_positions": 100}, None),
    ({}, to_old_file)])
def test_weights_of_hugging_face(tmp_path, options, change):
    """The logits of transformers' GPT-2, whatever its shape, its files and their age."""
    hf_model = make_hf_model(tmp_path, **options)
    if change:
        change(tmp_path)
    checkpoint = read_any(tmp_path)
    assert checkpoint["config"]["tie_weights"] == options.get("tie_word_embeddings", True)
    assert checkpoint["tokenizer"] == ("gpt2" if "vocab_size" in options else "unknown")
    assert_same_logits(load_model(checkpoint), hf_model)


def test_weights_of_openai_through_the_cache(tmp_path, monkeypatch):
    """`gpt2` is read from the hub's cache at the pinned revision, without network. If it is not
    there, or the download fails, the error is one line."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    monkeypatch.chdir(tmp_path)
    for answers, message in ((True, "cannot download config.json of openai-community/gpt2 .*$"),
                             (False, "gpt2 is not on this machine and huggingface.co does not")):
        monkeypatch.setattr(huggingface, "reachable", lambda host: answers)
        with pytest.raises(UserError, match=message):
            read_any("gpt2")
    snapshots = tmp_path / "models--openai-community--gpt2" / "snapshots"
    hf_model = make_hf_model(snapshots / huggingface.OPENAI_REVISIONS["gpt2"], vocab_size=50257,
                             n_embd=16)
    checkpoint = read_any("gpt2")
    assert (checkpoint["path"], checkpoint["config"]["name"]) == ("gpt2", "gpt2")
    assert_same_logits(load_model(checkpoint), hf_model)


def test_eval_and_sample_take_hugging_face(tmp_path, gpt2_data, monkeypatch, capsys):
    """transformers' loss on the test split, and its greedy text. Nothing is written beside it."""
    folder = tmp_path / "theirs"
    hf_model = make_hf_model(folder, vocab_size=50257, n_embd=16, n_positions=32)
    to_shards(folder)  # still a model, not a folder of runs
    run_main(monkeypatch, "eval", "--ckpt", folder, "--dataset=words", f"--data_dir={gpt2_data}",
             "--device=cpu", "--json", tmp_path / "result.json")
    result, = json.loads((tmp_path / "result.json").read_text())["runs"]
    dataset = TokenDataset(gpt2_data, "words", "test", 32)
    inputs, targets = dataset.batch(range(len(dataset)))
    with torch.no_grad():
        logits = hf_model(inputs).logits
        expected = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).item()
    assert result["test_loss"] == pytest.approx(expected, abs=1e-4)
    assert {file.name for file in tmp_path.iterdir()} == {"theirs", "result.json"}

    capsys.readouterr()
    run_main(monkeypatch, "sample", "--ckpt", folder, "--prompt=Every effort", "--temperature=0",
             "--max_new_tokens=9", "--device=cpu")
    tokenizer = get_tokenizer("gpt2")
    expected = hf_model.generate(torch.tensor([tokenizer.encode("Every effort")]), do_sample=False,
                                 max_new_tokens=9, eos_token_id=50256)
    assert capsys.readouterr().out == tokenizer.decode(expected[0].tolist()) + "\n"


def test_start_from_weights(tmp_path, data_dir):
    """By config/finetune.py, whose loss falls. Shape, bias, tying and vocabulary are the source's,
    positions are cropped, and the first loss is that of the weights. A stopped run goes on without
    the source. One of our checkpoints is a source too."""
    source = tmp_path / "source"
    make_hf_model(source, scale=0.1, vocab_size=257, nanolab_tokenizer="bytes")

    def run(name, *flags, init_from=source, on_step=no_watch):
        run_quickly(["config/finetune.py", "--dataset=stdlib", f"--data_dir={data_dir}",
                     "--learning_rate=5e-3", "--dropout=0", "--eval_tokens=2048", "--eval_every=0",
                     "--max_steps=10", "--device=cpu", f"--out_dir={tmp_path / name}",
                     f"--init_from={init_from}", *flags], on_step)
        return tmp_path / name

    whole = run("whole", "--block_size=24")
    options = read_checkpoint(whole / "last.pt")["config"]
    expected = GPTConfig(block_size=24, vocab_size=257, n_layer=2, n_head=4, n_embd=32,
                         qkv_bias=True, tie_weights=True)
    for key in ARCHITECTURE_OPTIONS:
        assert options[key] == getattr(expected, key), key
    data = TokenDataset(data_dir, "stdlib", "train", 24)
    batch = data.batch(window_ids("shuffled", 42, len(data), 0, 32))
    with torch.no_grad():
        first_loss = load_model(read_any(source))(*batch).item()
    assert losses(whole)[0] == pytest.approx(first_loss, abs=1e-5)
    assert losses(whole)[-1] < 0.95 * losses(whole)[0]

    parts = run("parts", "--block_size=24", on_step=stop_at(4))
    source.rename(tmp_path / "gone")
    run("parts", "--block_size=24", "--resume")
    assert equal_weights(whole / "last.pt", parts / "last.pt")
    with pytest.raises(UserError, match="another run: init_from was '.*source', is 'gpt2'"):
        run("parts", "--block_size=24", "--resume", init_from="gpt2")

    again = run("again", "--qkv_bias", "--max_steps=1", "--learning_rate=1e-30",
                init_from=whole / "last.pt")
    before, after = (read_checkpoint(folder / "last.pt")["model"] for folder in (whole, again))
    assert all(torch.equal(before[name], after[name]) for name in before)


# --- out

def export_run(monkeypatch, run, folder):
    """-> our model, and transformers' from what we exported"""
    from transformers import AutoModelForCausalLM
    run_main(monkeypatch, "nanolab.huggingface", "export", run / "best.pt", folder)
    return load_model(run / "best.pt"), AutoModelForCausalLM.from_pretrained(folder).eval()


def test_export(tmp_path, gpt2_data, small_run, monkeypatch):
    """transformers has our logits, our greedy text and our tokens. The card says what was
    trained."""
    from transformers import AutoTokenizer
    run = small_run("run", "--dataset=words", f"--data_dir={gpt2_data}", "--learning_rate=0.02",
                    "--block_size=64", "--zero_init", "--name=exported")
    folder = tmp_path / "folder"
    folder.mkdir()  # an empty one may be there
    ours, theirs = export_run(monkeypatch, run, folder)
    weights = load_file(folder / "model.safetensors")
    assert weights["transformer.h.1.attn.c_attn.bias"].tolist() == [0.0] * 96
    assert weights.keys() == theirs.state_dict().keys()
    assert_same_logits(ours, theirs)
    tokens = torch.tensor([get_tokenizer("gpt2").encode("Document 7")])
    text = theirs.generate(tokens, max_new_tokens=50, do_sample=False, eos_token_id=-1)
    assert torch.equal(text, ours.generate(tokens, 50, temperature=0))

    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "Every effort moves you: été, 12 345  spaces,\n\n<|endoftext|>new"
    assert tokenizer(text)["input_ids"] == encode(get_tokenizer("gpt2"), text)[:-1].tolist()
    assert {50256} == {tokenizer.eos_token_id, theirs.config.eos_token_id,
                       theirs.generation_config.eos_token_id}
    card = (folder / "README.md").read_text()
    for part in (f"{ours.num_params():,} parameters", "`exported`", "5,120", "`words`"):
        assert part in card, part


def test_export_and_back(tmp_path, small_run, monkeypatch):
    """A byte-level model, tied and with QKV bias, has no tokenizer files, and is read back as what
    it is."""
    run = small_run("run", "--tie_weights", "--qkv_bias", "--vocab_size=300",
                    "--learning_rate=0.02")
    folder = tmp_path / "folder"
    ours, theirs = export_run(monkeypatch, run, folder)
    assert {file.name for file in folder.iterdir()} == {"config.json", "generation_config.json",
                                                        "model.safetensors", "README.md"}
    assert_same_logits(ours, theirs)
    assert theirs.config.eos_token_id == theirs.generation_config.eos_token_id == 256
    back = read_any(folder)
    assert (back["tokenizer"], back["config"]["tie_weights"]) == ("bytes", True)
    assert all(torch.equal(back["model"][name], p) for name, p in ours.state_dict().items())


def test_export_refuses_what_gpt2_lacks(tmp_path, small_run, monkeypatch):
    """An intervention, also one of your own; and a folder that is not empty. Nothing is written."""
    run, folder = small_run("run", "--max_steps=1", "--norm=rmsnorm"), tmp_path / "folder"
    with pytest.raises(UserError, match="best.pt has norm='rmsnorm', which transformers' GPT-2"):
        export_run(monkeypatch, run, folder)
    mine = dataclasses.make_dataclass("GPTConfig", [("mine", bool, False)], bases=(GPTConfig,))
    with pytest.raises(UserError, match="out.pt has mine=True, which transformers' GPT-2"):
        check_expressible(mine(mine=True), "out.pt")
    assert not folder.exists()
    with pytest.raises(UserError, match="is there and not empty"):
        export_run(monkeypatch, run, run)
