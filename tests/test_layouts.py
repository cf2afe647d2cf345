"""Language models of other layouts: the same logits as transformers' own classes and as the published MiniMind code gives."""

import json

import numpy as np
import pytest
import safetensors.torch
import torch
from helpers import GOLDEN, formula, golden, run_python
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from model import checkpoint
from model.checkpoint import config_of, in_our_layout, load_vlm, read_metadata, read_weights, save_weights
from model.errors import BadInput
from model.model import MiniMindLM

SMALL = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=300)
OTHERS = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SMALL, intermediate_size=96, tie_word_embeddings=True)),
    "llama, untied": (LlamaForCausalLM, LlamaConfig(**SMALL, intermediate_size=96, rope_theta=5e5)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SMALL, intermediate_size=96, head_dim=24, tie_word_embeddings=True)),
    "qwen3, untied": (Qwen3ForCausalLM, Qwen3Config(**SMALL, intermediate_size=96, head_dim=16, rms_norm_eps=1e-5)),
    "qwen3 moe": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig(
            **SMALL,
            intermediate_size=96,
            moe_intermediate_size=48,
            num_experts=4,
            num_experts_per_tok=1,
            norm_topk_prob=True,
            head_dim=16,
        ),
    ),
}


def load(path):
    """The language model in a file or a folder, of whatever layout."""
    config = config_of(path)
    model = MiniMindLM(config).eval()
    model.load_state_dict(in_our_layout(read_weights(path), config))
    return model


@pytest.mark.parametrize("name", OTHERS)
def test_logits_are_those_of_transformers(name, tmp_path):
    kind, config = OTHERS[name]
    torch.manual_seed(0)
    theirs = kind(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # norms that do something
    theirs.save_pretrained(tmp_path)
    tokens = torch.randint(0, 300, (2, 40))
    ours = load(tmp_path)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens).logits, theirs(tokens).logits, atol=1e-4, rtol=0)
        answers = [
            model.generate(tokens[:1], max_new_tokens=8, do_sample=False, pad_token_id=0) for model in (ours, theirs)
        ]
    assert torch.equal(*answers)


@pytest.mark.parametrize("name", OTHERS)
def test_back_to_the_layout_it_came_from(name, tmp_path):
    kind, config = OTHERS[name]
    torch.manual_seed(0)
    kind(config).save_pretrained(tmp_path / "theirs")
    save_weights(tmp_path / "ours.pth", load(tmp_path / "theirs"), Known())
    code, _, err = run_python("-m", "model.export", tmp_path / "ours.pth", tmp_path / "back", "--language_model")
    assert code == 0, err
    first, second = (
        safetensors.torch.load_file(tmp_path / folder / "model.safetensors") for folder in ("theirs", "back")
    )
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    tokens = torch.arange(20)[None]
    again = kind.from_pretrained(tmp_path / "back").eval()
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, kind.from_pretrained(tmp_path / "theirs").eval()(tokens).logits)


@pytest.mark.parametrize("name", ["minimind3_tiny", "minimind3_moe_tiny"])
def test_logits_are_those_of_the_published_minimind_3(name, tmp_path):
    """From a bare .pth, as published: sizes, heads and theta are found."""
    facts, arrays = golden(name), np.load(GOLDEN / f"{name}.npz")
    state = {key: formula(key, shape) for key, shape in facts["keys"].items()}
    state["model.embed_tokens.weight"] = state["lm_head.weight"]
    torch.save(state, tmp_path / "llm_64.pth")
    model = load(tmp_path / "llm_64.pth")
    tokens = torch.from_numpy(arrays["tokens"]).long()
    with torch.no_grad():
        np.testing.assert_allclose(model(tokens).logits[:, ::7, ::64].numpy(), arrays["logits"], atol=1e-4)
    answer = model.generate(tokens[:1], max_new_tokens=16, do_sample=False, eos_token_id=None)
    assert answer[0, tokens.shape[1] :].tolist() == facts["greedy"]


def minimind2(dim=64, layers=2):
    """MiniMind2's tensors as of 2025-02, and as of 2025-04: the same model under other names, with its rows in another order."""
    kv_heads, head_dim = 2, dim // 8
    old = {"tok_embeddings.weight": torch.randn(6400, dim) * 0.1, "norm.weight": 1 + 0.1 * torch.randn(dim)}
    new = {"model.embed_tokens.weight": old["tok_embeddings.weight"], "model.norm.weight": old["norm.weight"]}
    for i in range(layers):
        sizes = {"wq": (dim, dim), "wk": (kv_heads * head_dim, dim), "wv": (kv_heads * head_dim, dim), "wo": (dim, dim)}
        for name, size in sizes.items():
            weight = torch.randn(size) * 0.2
            old[f"layers.{i}.attention.{name}.weight"] = weight
            if name in ("wq", "wk"):  # row by row, as one would by hand
                order = [
                    h * head_dim + row
                    for h in range(len(weight) // head_dim)
                    for row in (*range(0, head_dim, 2), *range(1, head_dim, 2))
                ]
                weight = weight[order]
            new[f"model.layers.{i}.self_attn.{name[1]}_proj.weight"] = weight
        for ours, theirs in (("w1", "gate"), ("w2", "down"), ("w3", "up")):
            weight = torch.randn((dim, 192) if ours == "w2" else (192, dim)) * 0.2
            old[f"layers.{i}.feed_forward.{ours}.weight"] = new[f"model.layers.{i}.mlp.{theirs}_proj.weight"] = weight
        for ours, theirs in (("attention_norm", "input_layernorm"), ("ffn_norm", "post_attention_layernorm")):
            weight = 1 + 0.1 * torch.randn(dim)
            old[f"layers.{i}.{ours}.weight"] = new[f"model.layers.{i}.{theirs}.weight"] = weight
    old["output.weight"], new["lm_head.weight"] = old["tok_embeddings.weight"], old["tok_embeddings.weight"].clone()
    return old, new


def test_minimind2_of_both_layouts_is_the_same_model(tmp_path):
    torch.manual_seed(0)
    tokens = torch.randint(0, 6400, (2, 30))
    logits = []
    for name, state in zip(("lm_64.pth", "llm_64.pth"), minimind2(), strict=True):
        torch.save(state, tmp_path / name)
        config = config_of(tmp_path / name)
        assert (config.n_heads, config.n_kv_heads, config.rope_theta, config.norm_eps) == (8, 2, 1e6, 1e-5)
        with torch.no_grad():
            logits.append(load(tmp_path / name)(tokens).logits)
    assert torch.equal(*logits)
    theirs = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=8,
            num_key_value_heads=2,
            intermediate_size=192,
            vocab_size=6400,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_theta": 1e6, "rope_type": "default"},
        )
    ).eval()
    theirs.load_state_dict(torch.load(tmp_path / "llm_64.pth"))
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, logits[0], atol=1e-4, rtol=0)


class Known:
    """Stands in for a published tokenizer, which is not part of the repository: only what it is known by matters here."""

    bos_token_id, eos_token_id = 1, 2

    def __len__(self):
        return 6400

    def get_vocab(self):
        return {}

    def convert_tokens_to_ids(self, tokens):
        return [30, 32]


@pytest.mark.parametrize("tokenizer", ["MiniMind v1", "MiniMind2", "MiniMind-3"])
def test_a_tokenizer_of_another_generation_is_refused(tokenizer, tmp_path, monkeypatch):
    """All have 6,400 tokens, so that nothing else would tell."""
    known = {name: key for key, name in checkpoint.KNOWN_TOKENIZERS.items()}
    monkeypatch.setattr(checkpoint, "tokenizer_hash", lambda _: known[tokenizer])
    torch.manual_seed(0)
    torch.save(minimind2()[1], tmp_path / "second.pth")
    facts = golden("minimind3_tiny")
    torch.save({key: formula(key, shape) for key, shape in facts["keys"].items()}, tmp_path / "third.pth")
    for file, generation in (("second.pth", "MiniMind2"), ("third.pth", "MiniMind-3")):
        config = config_of(tmp_path / file)
        if (generation == "MiniMind-3") == (tokenizer == "MiniMind-3"):
            load_vlm(tmp_path / file, config, Known(), allow_missing_projector=True)
        else:
            with pytest.raises(BadInput, match=f"and the tokenizer is {tokenizer}'s: pass the one that came with them"):
                load_vlm(tmp_path / file, config, Known(), allow_missing_projector=True)


REFUSED = {  # what is changed in a config.json, and what is said
    "gpt2": ({"model_type": "gpt2"}, "is of type gpt2: only Llama, Qwen3, Qwen3-MoE and MiniMind"),
    "bias": ({"attention_bias": True}, "has attention_bias True, which is not implemented here"),
    "gelu": ({"hidden_act": "gelu"}, "has hidden_act gelu"),
    "scaled": (
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
        "scales its rotary embedding (linear)",
    ),
    "window": ({"model_type": "qwen3", "use_sliding_window": True}, "has use_sliding_window True"),
    "experts": ({"model_type": "qwen3_moe", "norm_topk_prob": False}, "has norm_topk_prob False"),
    "quantized": ({"quantization_config": {"bits": 4}}, "has quantization_config"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_computed_is_refused_by_name(name, tmp_path):
    kind, config = OTHERS["llama"]
    kind(config).save_pretrained(tmp_path)
    change, says = REFUSED[name]
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(BadInput) as error:
        load(tmp_path)
    assert says in str(error.value) and str(tmp_path) in str(error.value)


@pytest.mark.parametrize("name", ["llama", "qwen3, untied", "qwen3 moe"])
def test_a_stage_starts_from_a_folder_without_any_size_named(name, place, tokenizer, tmp_path):
    kind, config = OTHERS[name]
    config = type(config)(**{**config.to_dict(), "vocab_size": len(tokenizer)})
    kind(config).save_pretrained(tmp_path / "theirs")
    training = [part for part in place.training]
    for flag in ("--dim", "--n_layers", "--n_heads", "--n_kv_heads"):
        del training[training.index(flag) : training.index(flag) + 2]
    flags = [*training, "--from_weights", tmp_path / "theirs", *place.data("pretrain.json"), "--learning_rate", 1e-3]
    code, out, err = run_python("1-pretrain_vlm.py", *flags, "--epochs", 2)
    assert code == 0, err
    written = place.out / f"64{'_moe' if 'moe' in name else ''}_vlm_pretrain.pth"
    kept = read_metadata(written)["config"]
    assert kept["qk_norm"] == ("qwen3" in name) and kept["n_heads"] == 4 and kept["rope_theta"] == 1e4
    code, out, err = run_python("3-eval_chat.py", *flags[:0], "--weights", written, *place.model[8:], "--all")
    assert code == 0 and out.count("A: ") > 3, err

    # the flags may say the same, but nothing else
    code, _, err = run_python("1-pretrain_vlm.py", *flags, "--n_heads", 8)
    assert code == 1 and f"{tmp_path / 'theirs'} has n_heads 4, expected 8: use --n_heads 4" in err, err
