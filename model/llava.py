"""MiniMind-V as transformers' LLaVA, exactly: what vLLM and others run without any code of this repository.

A dense MiniMind-V with a CLIP and a linear projector is a LLaVA but for one thing: LLaVA's projector has two layers, with
an activation between them. So the first layer is ours times SCALE, so small that tanh(x) is x there, and the second layer
is the identity over SCALE. A power of two changes no digit, so that the way back gives the same numbers.

    ours                         LLaVA's
    tok_embeddings, layers, ...  language_model.model.*, in the llama layout (layouts.py)
    vision_proj.vision_proj.0    multi_modal_projector.linear_1
    the CLIP's tensors           vision_tower.vision_model.*
"""

import copy

import torch
from transformers import LlavaConfig

from .errors import BadInput
from .layouts import to_llama, transformers_config

SCALE = 2.0**-8
PROJECTOR = "vision_proj."
OUR_PROJECTOR = "vision_proj.vision_proj.0."
LINEAR_1, LINEAR_2 = "multi_modal_projector.linear_1.", "multi_modal_projector.linear_2."
LANGUAGE, TOWER = "language_model.", "vision_tower.vision_model."


def not_a_llava(config, encoder):
    """What a model has that a LLaVA can't express; None if it has nothing of the kind."""
    if config.use_moe:
        return "experts"
    if config.projector != "linear":
        return "an mlp with a norm as projector"
    if encoder.model.config.model_type != "clip_vision_model":
        return "a SigLIP, whose vectors are those after its last norm"
    return None


def holds_llava(state):
    """Whether named tensors are a LLaVA's."""
    return f"{LINEAR_1}weight" in state


def llava_config(config, encoder, image_token_id, **extras):
    """The `LlavaConfig` of a model; `extras` are kept in its config.json, for the way back."""
    return LlavaConfig(
        text_config=transformers_config(config),
        vision_config=copy.deepcopy(encoder.model.config),  # transformers resets how one that it is given attends
        image_token_index=image_token_id,
        image_seq_length=config.image_tokens,
        projector_hidden_act="tanh",
        multimodal_projector_bias=config.vision_bias,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default" if config.drop_class_token else "full",
        tie_word_embeddings=config.tie_word_embeddings,
        architectures=["LlavaForConditionalGeneration"],
        **extras,
    )


def pack_llava(state, config, vision):
    """Named tensors of a model in our layout, and those of its CLIP, as LLaVA's on the hub are named.

    The projector is in float32, whatever the others are: in float16, SCALE would cost digits.
    """
    language = {name: tensor for name, tensor in state.items() if not name.startswith(PROJECTOR)}
    if config.tie_word_embeddings:
        del language["output.weight"]
    tensors = {f"{LANGUAGE}{name}": tensor for name, tensor in to_llama(language, config.head_dim).items()}

    for name in ("weight", "bias")[: 1 + config.vision_bias]:
        tensors[LINEAR_1 + name] = state[OUR_PROJECTOR + name].float() * SCALE
    tensors[f"{LINEAR_2}weight"] = torch.eye(config.dim) / SCALE
    if config.vision_bias:
        tensors[f"{LINEAR_2}bias"] = torch.zeros(config.dim)
    return tensors | {f"{TOWER}{name.removeprefix('vision_model.')}": tensor for name, tensor in vision.items()}


def unpack_llava(tensors, path):
    """The language model's tensors of a LLaVA, in the llama layout, and our projector. BadInput if it has a projector of
    another kind, or one that was trained since; path: for its message."""
    identity = tensors[f"{LINEAR_2}weight"].float() * SCALE
    if not torch.equal(identity, torch.eye(len(identity))) or tensors.get(f"{LINEAR_2}bias", torch.zeros(1)).any():
        raise BadInput(f"{path} is a LLaVA whose projector has two layers: only one that was exported here can be read")
    state = {name.removeprefix(LANGUAGE): tensor for name, tensor in tensors.items() if name.startswith(LANGUAGE)}
    dtype = state["model.embed_tokens.weight"].dtype
    for name in ("weight", "bias"):
        if LINEAR_1 + name in tensors:
            state[OUR_PROJECTOR + name] = (tensors[LINEAR_1 + name].float() / SCALE).to(dtype)
    return state


def chat_template(template, image_token):
    """A tokenizer's chat template that also takes contents as lists of parts, and puts the image token where pictures go.

    The template of a folder that was exported before does so already, and stays as it is.
    """
    parts = TEMPLATE.replace("IMAGE", image_token)
    return parts + template.removeprefix(parts)


TEMPLATE = """\
{%- set ns = namespace(messages=[], text="") -%}
{%- for message in messages -%}
{%- if message.content is string -%}
{%- set ns.text = message.content | replace("<image>", "IMAGE") -%}
{%- else -%}
{%- set ns.text = "" -%}
{%- for part in message.content if part.type != "text" -%}
{%- set ns.text = ns.text + "IMAGE\\n" -%}
{%- endfor -%}
{%- for part in message.content if part.type == "text" -%}
{%- set ns.text = ns.text + part.text -%}
{%- endfor -%}
{%- endif -%}
{%- set ns.messages = ns.messages + [{"role": message.role, "content": ns.text}] -%}
{%- endfor -%}
{%- set messages = ns.messages -%}
"""
