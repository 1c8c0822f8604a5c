"""Hugging Face's layout, in and out: transformers' GPT-2 has our logits, whoever wrote the weights.

The weights are random ones that transformers makes, so no network is needed.
"""

import base64
import dataclasses
import http.server
import importlib
import json
import runpy
import threading
import time

import pytest
import torch
from conftest import SMALL, assert_same_logits, call, equal_weights, losses, run_main
from torch import nn

import config
import train
from model import GPT, GPTConfig
from nanolab import huggingface
from nanolab.checkpoint import read_checkpoint
from nanolab.common import UserError
from nanolab.data import TokenDataset
from nanolab.export import export
from nanolab.tokenizer import encode, get_tokenizer


def make_hf_model(folder, scale=0.5, **options):
    """A GPT2LMHeadModel with random weights and biases, saved in a folder. -> the model."""
    transformers = importlib.import_module("transformers")  # here: it takes seconds
    transformers.utils.logging.disable_progress_bar()
    options = {"vocab_size": 300, "n_positions": 48, "n_embd": 32, "n_layer": 2, "n_head": 4,
               "eos_token_id": 0, "bos_token_id": 0, **options}
    hf_model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**options)).eval()
    generator = torch.Generator().manual_seed(1)
    for p in hf_model.parameters():
        nn.init.normal_(p, std=scale, generator=generator)
    hf_model.save_pretrained(folder)
    return hf_model


def read_hf_model(folder):
    from transformers import AutoModelForCausalLM
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def to_old_file(folder):
    """Like OpenAI's first upload: a pickle, names without a prefix, the causal masks among the
    weights, few keys in config.json."""
    from safetensors.torch import load_file
    weights = {name.removeprefix("transformer."): tensor
               for name, tensor in load_file(folder / "model.safetensors").items()}
    for i in range(2):
        weights[f"h.{i}.attn.bias"] = torch.ones(48, 48).tril()[None, None]
        weights[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    hf_config = json.loads((folder / "config.json").read_text())
    keys = ("model_type", "vocab_size", "n_positions", "n_embd", "n_layer", "n_head")
    (folder / "config.json").write_text(json.dumps({key: hf_config[key] for key in keys}))


def to_shards(folder):
    from safetensors.torch import load_file, save_file
    weights = list(load_file(folder / "model.safetensors").items())
    save_file(dict(weights[:9]), folder / "model-00001-of-00002.safetensors")
    save_file(dict(weights[9:]), folder / "model-00002-of-00002.safetensors")
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize("options, change", [
    ({}, None),
    ({"tie_word_embeddings": False, "n_layer": 1, "n_head": 1}, None),
    ({"n_inner": 128, "activation_function": "gelu_pytorch_tanh", "n_layer": 3, "n_embd": 32},
     to_shards),
    ({"vocab_size": 50257, "n_embd": 16, "n_positions": 100}, None),
    ({}, to_old_file),
])
def test_weights_of_hugging_face(tmp_path, options, change):
    """The logits of transformers' GPT-2, whatever its shape, its files and their age."""
    hf_model = make_hf_model(tmp_path, **options)
    if change:
        change(tmp_path)
    checkpoint = read_checkpoint(tmp_path)
    assert checkpoint["config"]["tie_weights"] == options.get("tie_word_embeddings", True)
    assert checkpoint["tokenizer"] == ("gpt2" if "vocab_size" in options else "unknown")
    assert_same_logits(GPT.from_checkpoint(checkpoint), hf_model)


def test_weights_of_openai_through_the_cache(tmp_path, monkeypatch):
    """`gpt2` is read from the hub's cache at the pinned revision, without network. If it is not
    there, the error is one line."""
    import huggingface_hub
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface, "reachable", lambda host: False)
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    monkeypatch.chdir(tmp_path)
    missing = "gpt2 is not on this machine and huggingface.co does not answer"
    with pytest.raises(UserError, match=missing):
        read_checkpoint("gpt2")
    snapshots = tmp_path / "models--openai-community--gpt2" / "snapshots"
    hf_model = make_hf_model(snapshots / "607a30d783dfa663caf39e06633721c8d4cfcd7e",
                             vocab_size=50257, n_embd=16)
    checkpoint = read_checkpoint("gpt2")
    assert checkpoint["config"]["name"] == "gpt2"
    assert (checkpoint["path"], checkpoint["tokenizer"]) == ("gpt2", "gpt2")
    assert_same_logits(GPT.from_checkpoint(checkpoint), hf_model)


def test_no_network_is_one_line(tmp_path):
    """By the command line, with an empty cache and a hub that nobody can reach."""
    start = time.perf_counter()
    result = call("sample.py", "--ckpt", "gpt2-medium", HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1",
                  HTTPS_PROXY="http://127.0.0.1:9")
    assert result.returncode == 1 and result.stderr.count("\n") == 1
    assert "config.json of openai-community/gpt2-medium" in result.stderr
    assert time.perf_counter() - start < 20, "most of it to start Python"


def test_eval_and_sample_take_hugging_face(tmp_path, gpt2_data, monkeypatch, capsys):
    """transformers' loss on the test split, and its greedy text."""
    folder = tmp_path / "theirs"
    hf_model = make_hf_model(folder, vocab_size=50257, n_embd=16, n_positions=32)
    measure = ["--ckpt", folder, "--dataset=words", f"--data_dir={gpt2_data}", "--device=cpu"]
    run_main(monkeypatch, "eval", *measure, "--json", tmp_path / "result.json")
    result = json.loads((tmp_path / "result.json").read_text())["runs"][0]
    dataset = TokenDataset(gpt2_data, "words", "test", 32)
    inputs, targets = dataset.batch(range(len(dataset)))
    with torch.no_grad():
        logits = hf_model(inputs).logits
        expected = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).item()
    assert result["test_loss"] == pytest.approx(expected, abs=1e-4)
    assert {file.name for file in tmp_path.iterdir()} == {"theirs", "result.json"}, "no others"

    to_shards(folder)  # still a model, not a folder of runs
    capsys.readouterr()
    run_main(monkeypatch, "eval", *measure)
    assert f"{result['test_loss']:.6f} nats" in capsys.readouterr().out

    run_main(monkeypatch, "sample", "--ckpt", folder, "--prompt=Every effort", "--temperature=0",
             "--max_new_tokens=9", "--device=cpu")
    tokens = torch.tensor([get_tokenizer("gpt2").encode("Every effort")])
    expected = hf_model.generate(tokens, max_new_tokens=9, do_sample=False, eos_token_id=50256)
    text = get_tokenizer("gpt2").decode(expected[0].tolist())
    assert capsys.readouterr().out == text + "\n"


def test_export(tmp_path, gpt2_data, small_run, monkeypatch, capsys):
    """transformers has our logits and our greedy text; we read back the same weights."""
    from safetensors.torch import load_file
    from transformers import AutoTokenizer
    run = small_run("run", "--dataset=words", f"--data_dir={gpt2_data}", "--learning_rate=0.02",
                    "--block_size=64")
    folder = tmp_path / "folder"
    folder.mkdir()  # an empty one may be there
    run_main(monkeypatch, "model", "export", run / "best.pt", folder)
    model, hf_model = GPT.from_checkpoint(run / "best.pt"), read_hf_model(folder)
    weights = load_file(folder / "model.safetensors")
    assert weights["transformer.h.1.attn.c_attn.bias"].tolist() == [0.0] * 96
    assert weights.keys() == hf_model.state_dict().keys()
    assert_same_logits(model, hf_model)
    tokens = torch.tensor([get_tokenizer("gpt2").encode("Document 7")])
    expected = model.generate(tokens, 50, temperature=0)[0].tolist()
    found = hf_model.generate(tokens, max_new_tokens=50, do_sample=False, eos_token_id=-1)[0]
    assert found.tolist() == expected

    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "Every effort moves you: été, 12 345  spaces,\n\n<|endoftext|>new"
    assert tokenizer(text)["input_ids"] == encode(get_tokenizer("gpt2"), text)[:-1].tolist()
    assert tokenizer.eos_token_id == 50256
    assert hf_model.config.eos_token_id == hf_model.generation_config.eos_token_id == 50256
    run_code_of_card(folder, capsys)

    back = read_checkpoint(folder)
    assert back["tokenizer"] == "gpt2"
    assert torch.equal(back["model"]["head.weight"], model.head.weight)


def test_model_card(tmp_path, gpt2_data, small_run, monkeypatch):
    """It has what the run recorded, and the test loss of the very file that was exported."""
    run = small_run("run", "--dataset=words", f"--data_dir={gpt2_data}", "--name=exported",
                    "--init_seed=7", "--learning_rate=0.02", "--dollars_per_hour=3600",
                    "--block_size=64")

    def export_card(name):
        run_main(monkeypatch, "model", "export", run / "best.pt", tmp_path / name)
        return (tmp_path / name / "README.md").read_text()

    summary = json.loads((run / "summary.json").read_text())
    card = export_card("unmeasured")
    for part in ("run `exported`", "`words`, tokenizer gpt2",
                 "10 steps of 8 x 64 tokens, 5,120 tokens", "init_seed 7, data_seed 42",
                 f"{summary['best_val_loss']:.6f} nats", "test loss | not measured",
                 summary["machine"], f"${summary['cost']:.2f}", "learning_rate = 0.02",
                 f"{GPT.from_checkpoint(run / 'best.pt').num_params():,} parameters",
                 f"torch {torch.__version__}"):
        assert part in card, part

    run_main(monkeypatch, "eval", "--ckpt", run / "best.pt", "--device=cpu",
             "--json", tmp_path / "result.json")
    test_loss = json.loads((tmp_path / "result.json").read_text())["runs"][0]["test_loss"]
    assert f"test loss | {test_loss:.6f} nats per token" in export_card("measured")

    checkpoint = torch.load(run / "best.pt", weights_only=True)
    torch.save({**checkpoint, "step": 9}, run / "best.pt")  # not the file that was measured
    assert "test loss | not measured" in export_card("another")


def run_code_of_card(folder, capsys):
    """Runs the Python that a model card gives."""
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    (folder.parent / "card.py").write_text(code.replace("THIS FOLDER", str(folder)))
    capsys.readouterr()
    runpy.run_path(str(folder.parent / "card.py"))
    assert capsys.readouterr().out.startswith("Every effort moves you")


def test_export_of_bytes(tmp_path, small_run, capsys):
    """A byte-level model, tied and with QKV bias, has no tokenizer files, says so, and is read back
    as what it is."""
    run = small_run("run", "--tie_weights", "--qkv_bias", "--vocab_size=300",
                    "--learning_rate=0.02", "--block_size=64")
    folder = tmp_path / "folder"
    result = call("model.py", "export", run / "best.pt", folder)
    assert result.returncode == 0, result.stderr
    assert {file.name for file in folder.iterdir()} == {"config.json", "generation_config.json",
                                                        "model.safetensors", "README.md"}
    assert "no tokenizer files" in (folder / "README.md").read_text()
    run_code_of_card(folder, capsys)
    hf_model = read_hf_model(folder)
    assert_same_logits(GPT.from_checkpoint(run / "best.pt"), hf_model)
    assert hf_model.config.eos_token_id == hf_model.generation_config.eos_token_id == 256
    back, ours = read_checkpoint(folder), read_checkpoint(run / "best.pt")
    assert (back["tokenizer"], back["config"]["tie_weights"]) == ("bytes", True)
    assert all(torch.equal(back["model"][name], tensor) for name, tensor in ours["model"].items())


def test_export_refuses_what_gpt2_lacks(tmp_path, small_run):
    """An intervention of your own: an option of GPTConfig that GPT-2 does not have."""
    checkpoint = read_checkpoint(small_run("run", "--max_steps=1") / "best.pt")
    model = GPT.from_checkpoint(checkpoint)
    new_option = [("rotary", bool, False)]
    extended = dataclasses.make_dataclass("GPTConfig", new_option, bases=(GPTConfig,))
    model.config = extended.from_options({**checkpoint["config"], "rotary": True})
    with pytest.raises(UserError, match="rotary=True, which transformers' GPT-2"):
        export(checkpoint, model, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
    with pytest.raises(UserError, match="is there and not empty"):
        export(checkpoint, model, tmp_path / "run")


def test_start_from_weights(tmp_path, data_dir):
    """Shape, bias, tying and vocabulary are the source's, positions are cropped, and the first loss
    is that of the weights. A stopped run goes on without the source as if it had not been stopped.
    One of our checkpoints is a source too."""
    source = tmp_path / "source"
    make_hf_model(source, scale=0.1, vocab_size=257, nanolab_tokenizer="bytes")
    shape = ("--n_layer", "--n_head", "--n_embd", "--block_size")
    flags_without_shape = [flag for flag in SMALL if not flag.startswith(shape)]

    def run(name, *flags, init_from=source):
        train.train(config.load([*flags_without_shape, "--dataset=stdlib", f"--data_dir={data_dir}",
                                 f"--out_dir={tmp_path / name}", f"--init_from={init_from}",
                                 *flags]))
        return tmp_path / name

    whole = run("whole", "--block_size=24")
    options = read_checkpoint(whole / "last.pt")["config"]
    assert {key: options[key] for key in config.ARCHITECTURE_OPTIONS} == {
        "block_size": 24, "vocab_size": 257, "n_layer": 2, "n_head": 4, "n_embd": 32,
        "qkv_bias": True, "tie_weights": True, "norm": "layernorm", "position": "learned",
        "qk_norm": False, "activation": "gelu", "logit_softcap": 0.0, "value_residual": False,
        "value_embeddings": False, "x0_lambdas": False, "embed_norm": False}
    inputs, targets = TokenDataset(data_dir, "stdlib", "train", 24).batch(range(8))
    with torch.no_grad():
        expected = GPT.from_checkpoint(source)(inputs, targets).item()
    assert losses(whole)[0] == pytest.approx(expected, abs=1e-5)
    assert losses(whole)[-1] < losses(whole)[0]

    run("parts", "--block_size=24", "--max_steps=4")
    source.rename(tmp_path / "gone")
    run("parts", "--block_size=24", "--resume")
    assert equal_weights(whole / "last.pt", tmp_path / "parts" / "last.pt")
    changed = "belongs to another run: init_from was '.*source', is 'gpt2'$"
    with pytest.raises(UserError, match=changed):
        run("parts", "--block_size=24", "--resume", init_from="gpt2")

    again = run("again", "--qkv_bias", "--max_steps=1", "--learning_rate=1e-30",
                init_from=whole / "last.pt")
    before, after = (read_checkpoint(folder / "last.pt")["model"] for folder in (whole, again))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_fine_tuning_lowers_the_loss(tmp_path, small_run, monkeypatch):
    """Weights exported, another text prepared, config/finetune.py: the loss on that text falls."""
    source = small_run("run", "--max_steps=30", "--learning_rate=5e-3")
    run_main(monkeypatch, "model", "export", source / "best.pt", tmp_path / "exported")
    (tmp_path / "mine.txt").write_text("".join(f"Line {i} of a tale: {i % 7} hares.\n"
                                               for i in range(20_000)))
    run_main(monkeypatch, "prepare", tmp_path / "mine.txt", "--tokenizer=bytes", "--heldout=0.2",
             f"--data_dir={tmp_path}/data")
    train.train(config.load(["config/finetune.py", f"--init_from={tmp_path}/exported",
                             "--dataset=mine", f"--data_dir={tmp_path}/data", "--device=cpu",
                             f"--out_dir={tmp_path}/tuned", "--learning_rate=5e-3",
                             "--max_steps=20", "--eval_every=10", "--eval_tokens=2048"]))
    found = losses(tmp_path / "tuned")
    assert found[-1] < 0.8 * found[0]


class Hub(http.server.BaseHTTPRequestHandler):
    """A stand-in for the part of the hub's interface that an upload uses."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.calls.append((self.path, self.headers["Authorization"], body))
        files = []
        if "/preupload/" in self.path:
            files = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                     for file in json.loads(body)["files"]]
        here = f"http://{self.headers['Host']}/me/tiny"
        self.send_response(200 if self.headers["Authorization"] == "Bearer hf_mine" else 401)
        self.end_headers()
        self.wfile.write(json.dumps({"url": here, "files": files, "commitUrl": f"{here}/commit/1",
                                     "commitOid": "1"}).encode())

    do_GET = do_POST

    def log_message(self, *args):
        pass


def test_push(tmp_path, small_run):
    """The exported folder arrives, with the token; without one, or without --push, nothing does."""
    run = small_run("run", "--max_steps=1")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.calls = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    env = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path),
           "NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "0"}

    def export_to(name, *flags, **more):
        return call("model.py", "export", run / "best.pt", tmp_path / name, *flags, **env, **more)

    assert export_to("unpushed", HF_TOKEN="hf_mine").returncode == 0 and not server.calls
    result = export_to("pushed", "--push=me/tiny", HF_TOKEN="hf_mine")
    assert result.returncode == 0 and "/me/tiny" in result.stdout.splitlines()[-1], result.stderr
    assert {token for _, token, _ in server.calls} == {"Bearer hf_mine"}
    [commit] = [body for path, _, body in server.calls if "/commit/" in path]
    sent = {line["value"]["path"]: base64.b64decode(line["value"]["content"])
            for line in map(json.loads, commit.splitlines()) if line["key"] == "file"}
    assert sent == {file.name: file.read_bytes() for file in (tmp_path / "pushed").iterdir()}
    assert 'from_pretrained("me/tiny")' in sent["README.md"].decode()

    result = export_to("refused", "--push=me/tiny", HF_TOKEN="hf_other")
    assert result.returncode == 1 and result.stderr.count("\n") == 1
    assert "could not be pushed to me/tiny" in result.stderr
    assert (tmp_path / "refused" / "model.safetensors").exists()
    server.shutdown()
