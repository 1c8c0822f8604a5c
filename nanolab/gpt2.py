"""GPT-2 as transformers has it, and our GPT: options, names and shapes of weights, both ways. Knows
no file.
"""

import re
from dataclasses import fields

import torch

from config import OPTIONS
from nanolab.common import UserError
from nanolab.options import check

# What GPT2Config calls the options of the shape: our name, GPT2Config's default and its other name.
GPT2_SHAPE = {"vocab_size": ("vocab_size", 50257, None),
              "n_positions": ("block_size", 1024, "max_position_embeddings"),
              "n_embd": ("n_embd", 768, "hidden_size"),
              "n_layer": ("n_layer", 12, "num_hidden_layers"),
              "n_head": ("n_head", 12, "num_attention_heads")}

# GPT2Config's activation_function: our name. The first of ours is the one that is written.
GPT2_ACTIVATIONS = {"gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "gelu_fast": "gelu",
                    "gelu": "gelu_erf", "gelu_python": "gelu_erf"}

# Other options of GPT2Config that change what is computed: its default, which our GPT computes.
GPT2_FIXED = {"model_type": "gpt2", "layer_norm_epsilon": 1e-5, "scale_attn_weights": True,
              "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}

# GPT-2 can express these, of activation some values. init and zero_init concern the start only.
GPT2_OPTIONS = {*(ours for ours, _, _ in GPT2_SHAPE.values()), "activation", "dropout", "qkv_bias",
                "tie_weights", "init", "zero_init"}

# Parts of our parameters' names, and a GPT2LMHeadModel's.
GPT2_NAMES = {"blocks.": "h.", "qkv.": "c_attn.", "proj.": "c_proj.", "fc.": "c_fc.",
              "head.": "lm_head."}
TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # GPT-2's Conv1D stores (in, out)

# What GPT-2's files hold besides the language model: causal masks, tables of positions, and the
# heads of transformers' other GPT-2 classes.
IGNORED = re.compile(r"(^|\.)(attn\.bias|attn\.masked_bias|position_ids|inv_freq)$"
                     r"|^(score|classifier|qa_outputs|multiple_choice_head|v_head)\.")


def gpt2_name(name):
    """A GPT2LMHeadModel's name of one of our parameters, without "transformer."."""
    for ours, theirs in GPT2_NAMES.items():
        name = name.replace(ours, theirs)
    return name


def our_name(name):
    """The inverse of gpt2_name."""
    for ours, theirs in GPT2_NAMES.items():
        name = name.replace(theirs, ours)
    return name


# --- in

def gpt2_options(hf_config, folder):
    """-> the options of our GPT, by name. Raises UserError if the model computes something else."""
    shape = {ours: hf_config.get(other_name, hf_config.get(name, default))
             for name, (ours, default, other_name) in GPT2_SHAPE.items()}
    for key, value in shape.items():
        if type(value) is not int or value < 1:
            raise UserError(f"{folder}/config.json is damaged: {key}={value!r}")
    if shape["n_embd"] % shape["n_head"]:
        raise UserError(f"{folder}/config.json is damaged: "
                        f"n_embd={shape['n_embd']}, n_head={shape['n_head']}")
    supported = {"model_type": ["gpt2"], "activation_function": list(GPT2_ACTIVATIONS),
                 "n_inner": [4 * shape["n_embd"], None],
                 **{key: [value] for key, value in GPT2_FIXED.items()},
                 "quantization_config": [None], "auto_map": [None]}  # auto_map: code of its own
    for key, values in supported.items():
        if hf_config.get(key, values[0]) not in values:
            raise UserError(f"{folder}/config.json has {key}={hf_config[key]!r}; "
                            f"nanolab's model has {values[0]!r}")
    options = {**shape, "dropout": hf_config.get("resid_pdrop", 0.1), "qkv_bias": True,
               "activation": GPT2_ACTIVATIONS[hf_config.get("activation_function", "gelu_new")],
               "tie_weights": hf_config.get("tie_word_embeddings", True)}
    return {key: check(OPTIONS[key], value, f"{folder}/config.json")
            for key, value in options.items()}


def from_gpt2(given, options, source, transposed):
    """A GPT-2's weights by our names, matrices as (out, in). Sets options["tie_weights"] to what
    they are. Raises UserError if they are not exactly those of a GPT-2 with these options.

    transposed: matrices are given as (in, out).
    """
    weights = {}
    for full_name, tensor in given.items():
        name = re.sub(r"^(transformer\.){1,2}", "", full_name)
        if IGNORED.search(name):
            continue
        if name in weights and not torch.equal(weights[name], tensor):
            raise UserError(f"{source} has {name} twice, with different values")
        weights[name] = tensor
    options["tie_weights"] = tie(weights, "lm_head.weight", options["tie_weights"])
    shapes = gpt2_shapes(options, transposed)
    for names, problem in ((weights.keys() - shapes.keys(), "has {}, which GPT-2 does not have"),
                           (shapes.keys() - weights.keys(), "lacks {}")):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise UserError(f"{source} {problem.format(min(names))}{more}")
    for name, tensor in weights.items():
        if tensor.shape != shapes[name] or not tensor.is_floating_point():
            raise UserError(f"{source}: {name} has the shape {tuple(tensor.shape)} and the type "
                            f"{tensor.dtype}; its config asks for {shapes[name]}, floating-point")
    return {our_name(name): tensor.T if transposed and name.endswith(TRANSPOSED) else tensor
            for name, tensor in weights.items()}


def tie(weights, head, asked):
    """Ties the head to wte.weight as transformers does: if config.json asks for it, and the file
    has one of the two, or both equal. -> whether it is tied"""
    present = [weights[name] for name in ("wte.weight", head) if name in weights]
    if not asked or not present or not torch.equal(present[0].float(), present[-1].float()):
        return False
    weights["wte.weight"] = weights[head] = present[0]
    return True


def gpt2_shapes(options, transposed):
    """-> {name: shape} of GPT-2's weights. transposed: matrices as (in, out)."""
    C = options["n_embd"]
    block = {"ln_1": (C,), "attn.c_attn": (3 * C, C), "attn.c_proj": (C, C),
             "ln_2": (C,), "mlp.c_fc": (4 * C, C), "mlp.c_proj": (C, 4 * C)}
    modules = {f"h.{i}.{name}": shape for i in range(options["n_layer"])
               for name, shape in block.items()} | {"ln_f": (C,)}
    shapes = {"wte.weight": (options["vocab_size"], C), "wpe.weight": (options["block_size"], C),
              "lm_head.weight": (options["vocab_size"], C)}
    for name, shape in modules.items():
        shapes[f"{name}.weight"] = shape[::-1] if transposed else shape
        if options["qkv_bias"] or "c_attn" not in name:
            shapes[f"{name}.bias"] = shape[:1]
    return shapes


# --- out

def is_gpt2(config):
    """Whether transformers' GPT-2 computes the same as a GPTConfig."""
    return config.activation in GPT2_ACTIVATIONS.values() and all(
        getattr(config, f.name) == f.default for f in fields(config) if f.name not in GPT2_OPTIONS)


def gpt2_config(config):
    activations = {ours: theirs for theirs, ours in reversed(GPT2_ACTIVATIONS.items())}
    return {"architectures": ["GPT2LMHeadModel"], **GPT2_FIXED, "n_inner": None,
            "activation_function": activations[config.activation],
            **{theirs: getattr(config, ours) for theirs, (ours, _, _) in GPT2_SHAPE.items()},
            **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), config.dropout)}


def gpt2_weights(model):
    """-> {name in GPT2LMHeadModel: tensor}. A tied head is left out. QKV biases, which GPT-2 always
    has, are zeros if the model has none."""
    weights = {}
    for name, tensor in untied(model).items():
        name = gpt2_name(name)
        tensor = tensor.T if name.endswith(TRANSPOSED) else tensor
        weights[name if name == "lm_head.weight" else f"transformer.{name}"] = tensor.contiguous()
    if not model.config.qkv_bias:
        for i in range(model.config.n_layer):
            zeros = torch.zeros(3 * model.config.n_embd)
            weights[f"transformer.h.{i}.attn.c_attn.bias"] = zeros
    return weights


def untied(model):
    """The model's weights, without a tied head."""
    weights = model.state_dict()
    if model.config.tie_weights:
        del weights["head.weight"]
    return weights
