"""Language models of other layouts in ours, exactly: MiniMind2's, MiniMind-3's, and any Llama, Qwen3 or Qwen3-MoE.

    layout   tensors                                   rotary embedding turns          models
    ours     layers.N.attention.wq, ...                neighbours (2k, 2k + 1)         MiniMind v1, MiniMind2 until April 2025
    llama    model.layers.N.self_attn.q_proj, ...      halves (k, k + C/2)             MiniMind2 since, MiniMind-3, SmolLM2, Qwen3

A head's C rows can be in any order if queries and keys have the same one, so sorting the rows of `wq` and `wk` turns one
rotary embedding into the other, bit for bit. The norms of queries and keys (Qwen3, MiniMind-3) are sorted alike.

Shapes: D model width, H heads, K key/value heads, C width of a head.
"""

import re

import torch
from transformers import LlamaConfig, Qwen3Config, Qwen3MoeConfig

from .errors import BadInput

# parts of a tensor's name in the llama layout, and in ours
THEIRS_TO_OURS = {
    "embed_tokens": "tok_embeddings",
    "lm_head": "output",
    "self_attn": "attention",
    "q_proj": "wq",
    "k_proj": "wk",
    "v_proj": "wv",
    "o_proj": "wo",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp": "feed_forward",
    "gate_proj": "w1",
    "down_proj": "w2",
    "up_proj": "w3",
}
OURS_TO_THEIRS = {ours: theirs for theirs, ours in THEIRS_TO_OURS.items()}
ROTATED = re.compile(r"\.attention\.(wq|wk|q_norm|k_norm)\.weight$")

# our names of the fields of other models' config.json
FIELDS = {
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "head_dim": "head_dim",
    "rms_norm_eps": "norm_eps",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_seq_len",
    "num_experts_per_tok": "num_experts_per_tok",
}
# fields of config.json, and the value with which each changes nothing
NEUTRAL = {
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
    "hidden_act": "silu",
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
}
# model_type of a config.json -> the class that knows its defaults; MiniMind's own code is not run
TYPES = {
    "llama": LlamaConfig,
    "qwen3": Qwen3Config,
    "qwen3_moe": Qwen3MoeConfig,
    "minimind": None,
    "minimind-v": None,
}
# the placeholders of the later MiniMind-V, as LMConfig fields
MINIMIND2_V = {"image_chars": ["@", "@"], "image_tokens": 196, "drop_class_token": True}
MINIMIND_3V = {"image_chars": ["<|image_pad|>", "<|image_pad|>"], "image_tokens": 64}


# --- tensors --------------------------------------------------------------------------------------------------------


def is_llama(state):
    """Whether named tensors are in the llama layout."""
    return "model.embed_tokens.weight" in state


def our_name(name):
    """A tensor's name in our layout, from either; that of a projector stays."""
    if name.startswith("vision_proj."):
        return name
    name = name.removeprefix("model.").replace(".shared_experts.0.", ".shared_experts.")
    return ".".join(THEIRS_TO_OURS.get(part, part) for part in name.split("."))


def their_name(name):
    """The inverse of `our_name`, for the tensors of a language model."""
    name = ".".join(OURS_TO_THEIRS.get(part, part) for part in name.split("."))
    return name if name.startswith("lm_head.") else f"model.{name}"


def from_llama(state, head_dim):
    """Named tensors of the llama layout in ours."""
    renamed = {our_name(name): tensor for name, tensor in state.items()}
    return {
        name: halves_to_pairs(tensor, head_dim) if ROTATED.search(name) else tensor for name, tensor in renamed.items()
    }


def to_llama(state, head_dim):
    """The inverse of `from_llama`, for the tensors of a language model."""
    renamed = {their_name(name): tensor for name, tensor in state.items()}
    return {
        name: pairs_to_halves(tensor, head_dim) if ROTATED.search(our_name(name)) else tensor
        for name, tensor in renamed.items()
    }


def halves_to_pairs(tensor, head_dim):
    """Rows (heads * C, ...) sorted for a rotary embedding that turns neighbours: k and k + C/2 become 2k and 2k + 1."""
    return tensor.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def pairs_to_halves(tensor, head_dim):
    """The inverse of `halves_to_pairs`."""
    return tensor.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


# --- sizes ----------------------------------------------------------------------------------------------------------


def fields_of_config(content, path):
    """The LMConfig fields in the config.json of a Llama, Qwen3, Qwen3-MoE, or a MiniMind of 2025 and later.

    BadInput names what can't be computed here: another architecture, a bias, a scaled rotary embedding, ...
    """
    kind = content.get("model_type")
    if kind not in TYPES:
        raise BadInput(f"{path} is of type {kind}: only Llama, Qwen3, Qwen3-MoE and MiniMind can be trained here")
    if TYPES[kind]:
        content = TYPES[kind](**content).to_dict()  # with the values that the file leaves out
    for name, value in NEUTRAL.items():
        if content.get(name) not in (None, value):
            raise BadInput(f"{path} has {name} {content[name]}, which is not implemented here: use another model")

    # the rotary embedding's base is on its own, or since transformers 5 within rope_parameters
    rope = content.get("rope_parameters") or content.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type != "default":
        raise BadInput(
            f"{path} scales its rotary embedding ({rope_type}), which is not implemented here: use another model"
        )
    fields = {ours: content[theirs] for theirs, ours in FIELDS.items() if content.get(theirs) is not None}
    theta = rope.get("rope_theta") or content.get("rope_theta")
    return {**fields, "rope_theta": theta} if theta else fields


def transformers_config(config):
    """The configuration of transformers' own class that computes the same, with tensors as `to_llama` names them.

    BadInput if there is none.
    """
    fields = {theirs: getattr(config, ours) for theirs, ours in FIELDS.items()}
    fields |= {
        "intermediate_size": config.hidden_dim,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "tie_word_embeddings": config.tie_word_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
    }
    if not config.use_moe:
        kind, name = (Qwen3Config, "Qwen3ForCausalLM") if config.qk_norm else (LlamaConfig, "LlamaForCausalLM")
        return kind(**fields, architectures=[name])
    if config.n_shared_experts or not config.qk_norm:
        raise BadInput("transformers has no class for experts with a shared one, or without norms of queries and keys")
    fields |= {
        "moe_intermediate_size": config.hidden_dim,
        "num_experts": config.n_routed_experts,
        "norm_topk_prob": True,
    }
    return Qwen3MoeConfig(**fields, architectures=["Qwen3MoeForCausalLM"])


def sizes_of(state):
    """The LMConfig fields that named tensors tell, ordered so that the first mismatch gives the most useful error."""
    tensors = {our_name(name): tensor for name, tensor in state.items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    embeddings = [tensors[name] for name in ("tok_embeddings.weight", "output.weight") if name in tensors]
    vocab_size, dim = embeddings[0].shape
    layers = [int(name.split(".")[1]) for name in shapes if name.startswith("layers.")]
    gate = shapes.get("layers.0.feed_forward.gate.weight")
    up = shapes.get(f"layers.0.feed_forward.{'experts.0.' if gate else ''}w3.weight")
    linear, mlp = (shapes.get(f"vision_proj.{name}.0.weight") for name in ("vision_proj", "mlp"))
    sizes = {
        "vocab_size": vocab_size,
        "dim": dim,
        "n_layers": max(layers, default=-1) + 1,
        "use_moe": gate is not None,
        "n_routed_experts": gate and gate[0],
        "n_shared_experts": int(any(".shared_experts." in name for name in shapes)) if gate else None,
        "hidden_dim": up and up[0],
        "qk_norm": "layers.0.attention.q_norm.weight" in shapes,
        "tie_word_embeddings": torch.equal(embeddings[0], embeddings[-1]),
        "projector": "linear" if linear else "mlp" if mlp else None,
        "vision_width": (linear or mlp or [None])[-1],
    }
    return {name: value for name, value in sizes.items() if value is not None}


def fields_of_generation(state):
    """LMConfig fields that no shape tells, of the MiniMind that named tensors are of; {} if they are of none.

    v1 has keys half as wide as the model, MiniMind2 a quarter; only MiniMind-3 has norms of queries and keys.
    """
    shapes = {our_name(name): tuple(tensor.shape) for name, tensor in state.items()}
    query, key, norm, width = (
        shapes.get(f"layers.0.attention.{name}.weight", (0,))[0] for name in ("wq", "wk", "q_norm", "wo")
    )
    if norm:
        experts = {"num_experts_per_tok": 1}  # read by models with experts only
        heads = {"n_heads": query // norm, "n_kv_heads": key // norm, "head_dim": norm}
        return {**heads, "rope_theta": 1e6, "norm_eps": 1e-6, **experts}
    if 2 * key == width:
        return {"n_heads": 16, "n_kv_heads": 8}
    if 4 * key == width:
        return {"n_heads": 8, "n_kv_heads": 2, "rope_theta": 1e6}
    return {}


# --- placeholders of pictures ---------------------------------------------------------------------------------------


def placeholder_fields(content):
    """The LMConfig fields of the placeholder that a published MiniMind-V's config.json names; {} if it names none."""
    text = content.get("image_special_token") or ""
    if text.startswith("@"):
        return {**MINIMIND2_V, "image_tokens": len(text)}
    if text.startswith("<|image_pad|>"):
        return {**MINIMIND_3V, "image_tokens": content.get("image_token_len") or MINIMIND_3V["image_tokens"]}
    return {}


def placeholder_of_generation(state):
    """The same for tensors that come without a config: by their projector and their layout.

    A linear projector that was trained here has no bias, and the published ones have one.
    """
    sizes, generation = sizes_of(state), fields_of_generation(state)
    if sizes.get("projector") == "mlp":
        return MINIMIND_3V
    if "vision_proj.vision_proj.0.bias" in state and generation.get("n_kv_heads") == 2:
        return MINIMIND2_V
    is_v1 = "vision_proj.vision_proj.0.bias" in state and generation.get("n_heads") == 16
    return {"image_tokens": 50} if is_v1 and sizes["vision_width"] == 768 else {}
