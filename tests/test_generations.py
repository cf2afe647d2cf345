"""Each published generation of MiniMind, small: through the stages of training, the chat, the page and export; and SigLIP."""

import json

import numpy as np
import pytest
import torch
from helpers import GOLDEN, ask, data_url, formula, generation_tokenizer, golden, question, run_python, save_clip
from PIL import Image
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from model.checkpoint import encoder_hash, in_our_layout, load_parts, read_metadata, read_weights
from model.conversation import encode_conversations
from model.errors import BadInput
from model.images import Preprocess, normalise, read_pixels, to_pixels
from model.layouts import fields_of_generation, placeholder_of_generation, sizes_of
from model.LMConfig import LMConfig
from model.model import MiniMindLM
from model.model_vlm import MiniMindVLM, find_placeholders
from model.vision_utils import load_vision
from web_server import create_app

TINY = dict(hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)


# --- encoders -------------------------------------------------------------------------------------------------------


def save_siglip(folder, alone=True, **preprocess):
    """A random SigLIP of 4 x 4 patches, with its preprocessor_config.json: the vision half `alone`, or with the other."""
    torch.manual_seed(2)
    vision = SiglipVisionConfig(**TINY, image_size=64, patch_size=16)
    text = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=99)
    model = (
        SiglipVisionModel(vision)
        if alone
        else SiglipModel(SiglipConfig(text_config=text, vision_config=vision.to_dict()))
    )
    model.save_pretrained(folder)
    SiglipImageProcessorPil(size={"height": 64, "width": 64}, **preprocess).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("alone", [True, False])
def test_features_of_a_siglip_are_those_after_its_last_norm(alone, tmp_path):
    encoder = load_vision(save_siglip(tmp_path, alone))
    assert (encoder.image_tokens, encoder.vision_width) == (16, 48)
    pixels = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    theirs = SiglipVisionModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        expected = theirs(normalise(pixels, *encoder.preprocess.statistics())).last_hidden_state
    torch.testing.assert_close(encoder(pixels), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("resample", [2, 3])
def test_pictures_are_prepared_as_the_folder_says(resample, tmp_path):
    """Within one step of 255 of what transformers' own image processor makes of a picture that is not square."""
    statistics = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.6, 0.7]}
    encoder = load_vision(save_siglip(tmp_path, resample=resample, **statistics))
    y, x = np.mgrid[:90, :130]
    image = Image.fromarray(np.stack([x * 255 // 129, y * 255 // 89, (x * y) // 7 % 256], axis=-1).astype(np.uint8))
    theirs = SiglipImageProcessorPil.from_pretrained(tmp_path)(image, return_tensors="pt")["pixel_values"]
    ours = normalise(to_pixels(image, encoder.preprocess)[None], encoder.mean, encoder.std)
    assert (ours - theirs).abs().max() <= 1 / 255 / 0.5 + 1e-6


def test_what_is_no_encoder_of_fixed_size_is_refused(tmp_path):
    folder = save_siglip(tmp_path)
    with pytest.raises(BadInput, match="a SigLIP has no class token: name the CLIP that .* or leave out --drop_class"):
        load_vision(folder, drop_class_token=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "siglip2_vision_model"}))
    with pytest.raises(
        BadInput, match=r"neither a CLIP nor a SigLIP of fixed size \(model_type siglip2_vision_model\)"
    ):
        load_vision(folder)
    (folder / "config.json").write_text(json.dumps(config))


HALVES, TENTHS = (0.5, 0.5, 0.5), (0.1, 0.1, 0.1)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({}, Preprocess(64, 3, HALVES, HALVES)),
        ({"size": 64, "resample": 2}, Preprocess(64, 2, HALVES, HALVES)),
        ({"size": {"shortest_edge": 64}, "image_mean": TENTHS}, Preprocess(64, 3, TENTHS, HALVES)),
        ({"size": [64, 64], "image_std": None, "resample": None}, Preprocess(64, 3, HALVES, HALVES)),
        ({"do_normalize": False, "image_std": TENTHS}, Preprocess(64, 3, (0, 0, 0), (1, 1, 1))),
        ({"size": {"height": 384, "width": 384}}, "has size .*384.*, expected 64, as config.json says"),
        ({"size": "64"}, "has size '64', expected 64"),
        ({"resample": "bicubic"}, "has resample 'bicubic', expected the number of one of Pillow's filters"),
        ({"image_mean": 0.5}, "has image_mean 0.5, expected three numbers"),
        ({"image_std": [0.5]}, "has image_std .0.5., expected three numbers"),
        ({"image_mean": [123.7, 116.3, 103.5]}, "has image_mean .*123.7.*, on a scale from 0 to 1"),
        ({"image_std": [0, 0, 0]}, "has image_std"),
        ({"rescale_factor": 1 / 127.5}, "has rescale_factor 0.0078.*, expected 1/255"),
        ({"do_rescale": False}, "has do_rescale False, expected true"),
    ],
)
def test_what_folders_say_of_the_preparation_of_pictures(content, expected, tmp_path):
    folder = save_siglip(tmp_path)
    (folder / "preprocessor_config.json").write_text(json.dumps(content))
    if isinstance(expected, Preprocess):
        assert load_vision(folder).preprocess == expected

        # within the other file, as transformers 5 writes it
        (folder / "preprocessor_config.json").unlink()
        (folder / "processor_config.json").write_text(json.dumps({"image_processor": content}))
        assert load_vision(folder).preprocess == expected
    else:
        with pytest.raises(BadInput, match=expected):
            load_vision(folder)


def test_a_dropped_class_token_leaves_the_patches(tiny_clip):
    whole, patches = load_vision(tiny_clip), load_vision(tiny_clip, drop_class_token=True)
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    assert patches.image_tokens == 4 and torch.equal(patches(pixels), whole(pixels)[:, 1:])
    assert encoder_hash(whole) != encoder_hash(patches)


# --- placeholders ---------------------------------------------------------------------------------------------------


def test_placeholders_of_one_id_may_touch():
    """Two pictures side by side are one run of an id; shorter runs, and what is left of longer ones, are text."""
    ids = torch.tensor([[7, *[12] * 8, 5, 12, 12, 12], [12, 12, 12, 12, 12, 12, 3, *[12] * 5, 9]])
    starts = find_placeholders(ids, [12] * 4)
    assert starts.nonzero().tolist() == [[0, 1], [0, 5], [1, 0], [1, 7]]


def test_logits_are_those_of_the_published_minimind_3v(tmp_path):
    """From a bare .pth, as published: the projector's form and the placeholder are found."""
    facts, arrays = golden("minimind3v_tiny"), np.load(GOLDEN / "minimind3v_tiny.npz")
    state = {key: formula(key, shape) for key, shape in facts["keys"].items()}
    state["vision_proj.mlp.0.weight"] += 1
    state["model.embed_tokens.weight"] = state["lm_head.weight"]
    torch.save(state, tmp_path / "sft_vlm_64.pth")
    state = read_weights(tmp_path / "sft_vlm_64.pth")
    fields = {**fields_of_generation(state), **sizes_of(state), **placeholder_of_generation(state)}
    config = LMConfig(**fields, image_char_ids=[12, 12])
    model = MiniMindVLM(config).eval()
    model.load_state_dict(in_our_layout(state, config))
    tokens = torch.from_numpy(arrays["tokens"]).long()
    features = torch.stack([formula(f"img{row}", (64, 768)) / 0.05 for row in range(len(tokens))])
    with torch.no_grad():
        output = model(tokens, features)
        np.testing.assert_allclose(output.logits[:, ::7, ::64].numpy(), arrays["logits"], atol=1e-4)
        labels = torch.where(torch.arange(tokens.shape[1]) < 70, -100, tokens)
        assert model(tokens, features, labels=labels).loss.item() == pytest.approx(facts["loss"], abs=1e-4)


# --- from the language model to answers -----------------------------------------------------------------------------

SIZES = dict(hidden_size=64, num_hidden_layers=2, intermediate_size=96)
ROPE = {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}
HEADS2 = dict(num_attention_heads=8, num_key_value_heads=2, rms_norm_eps=1e-5)  # MiniMind2's
HEADS3 = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=24, rms_norm_eps=1e-6)  # MiniMind-3's


def language_model(generation, folder, vocab_size):
    """Saves a small random language model as its generation was published, and returns the path."""
    torch.manual_seed(0)
    common = dict(**SIZES, **ROPE, vocab_size=vocab_size, tie_word_embeddings=True)
    if generation == "MiniMind v1":
        sizes = dict(dim=64, n_layers=2, n_heads=16, n_kv_heads=8, hidden_dim=96)
        state = MiniMindLM(LMConfig(**sizes, vocab_size=vocab_size)).state_dict()
    elif generation == "MiniMind2 of 2025-02":
        sizes = dict(dim=64, n_layers=2, n_heads=8, n_kv_heads=2, hidden_dim=96)
        state = MiniMindLM(LMConfig(**sizes, vocab_size=vocab_size)).state_dict()
    elif generation == "MiniMind2 of 2025-04":
        LlamaForCausalLM(LlamaConfig(**common, **HEADS2)).save_pretrained(folder / "llm")
        return folder / "llm"
    elif generation == "MiniMind-3":
        Qwen3ForCausalLM(Qwen3Config(**common, **HEADS3)).save_pretrained(folder / "llm")
        return folder / "llm"
    else:
        experts = dict(moe_intermediate_size=48, num_experts=4, num_experts_per_tok=1, norm_topk_prob=True)
        Qwen3MoeForCausalLM(Qwen3MoeConfig(**common, **HEADS3, **experts)).save_pretrained(folder / "llm")
        return folder / "llm"
    torch.save(state, folder / "llm_64.pth")
    return folder / "llm_64.pth"


GENERATIONS = {  # name -> (tokenizer's, flags of stage 1, heads that the weights then have)
    "MiniMind v1": ("MiniMind v1", [], (16, 8)),
    "MiniMind2 of 2025-02": ("MiniMind2 of 2025-02", [], (8, 2)),
    "MiniMind2 of 2025-04": ("MiniMind2 of 2025-04", [], (8, 2)),
    "MiniMind-3": ("MiniMind-3", ["--projector", "mlp"], (4, 2)),
    "MiniMind-3 moe": ("MiniMind-3", [], (4, 2)),
}


def answer(flags, picture, siglip):
    """The chat in the terminal answers its questions; the page's API says this about a picture."""
    code, out, err = run_python("3-eval_chat.py", *flags, "--all", "--max_new_tokens", 4)
    assert code == 0 and out.count("A: ") > 3, err
    client = create_app(*map(str, [*flags, "--temperature", 0])).test_client()
    messages = question("颜色？", data_url(picture))
    reply = ask(client, messages=messages, max_tokens=8, return_token_ids=True).get_json()
    message = reply["choices"][0]["message"]

    # the heat map has every patch, and nothing else
    looked = client.post("/attention", json={"messages": messages, "token_ids": message["token_ids"]}).get_json()
    grid = 4 if siglip else 2
    assert looked["grid"] == grid and {len(one[0]) for layer in looked["shares"] for one in layer} == {grid**2}
    return message["content"]


@pytest.mark.parametrize("generation", GENERATIONS)
def test_a_generation_from_its_language_model_to_an_exported_folder(generation, place, pictures, tmp_path):
    name, projector, heads = GENERATIONS[generation]
    tokenizer = generation_tokenizer(name)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    siglip = "3" in generation
    encoder = save_siglip(tmp_path / "siglip") if siglip else save_clip(tmp_path / "clip")
    source = language_model(generation, tmp_path, len(tokenizer))
    where = ["--vision_path", encoder, "--tokenizer_path", tmp_path / "tokenizer", "--device", "cpu"]
    training = [*where, "--out_dir", place.out, "--batch_size", 8, "--max_seq_len", 300, "--learning_rate", 1e-3]

    code, _, err = run_python(
        "1-pretrain_vlm.py", *training, *place.data("pretrain.json"), "--from_weights", source, *projector
    )
    assert code == 0, err
    experts = "_moe" if "moe" in generation else ""
    written = place.out / f"64{experts}_vlm_pretrain.pth"
    kept = read_metadata(written)["config"]
    assert (kept["n_heads"], kept["n_kv_heads"]) == heads and kept["image_tokens"] == (16 if siglip else 5)
    assert kept["projector"] == (projector or [0, "linear"])[1]

    code, _, err = run_python("2-sft_vlm.py", *training, *place.data("sft.json"), "--from_weights", written)
    assert code == 0, err
    trained = place.out / f"64{experts}_vlm_sft.pth"
    if projector:
        flags = [*training, *place.data("pretrain.json"), "--from_weights", source, "--projector", "linear"]
        code, _, err = run_python("1-pretrain_vlm.py", *flags, "--resume")
        assert code == 1 and "--projector is linear, was mlp" in err, err
    said = answer(["--weights", trained, *where], pictures[0], siglip)

    code, _, err = run_python("-m", "model.export", trained, tmp_path / "folder", *where[:4], "--with_vision")
    assert code == 0, err
    assert answer(["--weights", tmp_path / "folder", "--device", "cpu"], pictures[0], siglip) == said


# --- published VLMs -------------------------------------------------------------------------------------------------

VLMS = {  # what a folder's config.json says of the placeholder, as published
    "MiniMind2-V of 2025-02": {"image_special_token": "@" * 4, "image_ids": [34] * 4},
    "MiniMind2-V of 2025-04": {"image_special_token": "@" * 4, "image_ids": [34] * 4},
    "minimind-3v": {"image_special_token": "<|image_pad|>", "image_ids": [12], "image_token_len": 16},
}


def published_vlm(name, folder, vocab_size):
    """Tensors and config.json of a small VLM, as that generation published them."""
    language = name.replace("-V", "").replace("-3v", "-3").replace("minimind", "MiniMind")
    path = language_model(language, folder, vocab_size)
    state, config = read_weights(path), {"model_type": "minimind-v", **VLMS[name]}
    if path.is_dir():
        config = {**json.loads((path / "config.json").read_text()), **config}
    else:
        config |= {"dim": 64, "n_layers": 2, "n_heads": 8, "n_kv_heads": 2, "rope_theta": 1e6, "hidden_dim": 96}
    linear = {"vision_proj.vision_proj.0.weight": (64, 48), "vision_proj.vision_proj.0.bias": (64,)}
    mlp = {"0.weight": (48,), "0.bias": (48,), "1.weight": (64, 48), "1.bias": (64,), "3.weight": (64, 64)}
    mlp = {f"vision_proj.mlp.{key}": shape for key, shape in {**mlp, "3.bias": (64,)}.items()}
    state |= {key: torch.randn(shape) for key, shape in (mlp if "3v" in name else linear).items()}
    return state, config


@pytest.mark.parametrize("name", VLMS)
def test_a_published_vlm_answers_from_its_folder(name, pictures, tmp_path):
    tokenizer = generation_tokenizer(name.replace("-V", "").replace("minimind-3v", "MiniMind-3"))
    state, config = published_vlm(name, tmp_path, len(tokenizer))
    folder = tmp_path / name.split()[0]
    tokenizer.save_pretrained(folder)
    torch.save(state, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": len(tokenizer)}))
    encoder = save_siglip(tmp_path / "siglip") if "3v" in name else save_clip(tmp_path / "clip")

    parts = load_parts(folder, encoder, folder)
    assert parts.model.config.image_ids == [
        tokenizer.convert_tokens_to_ids("<|image_pad|>" if "3v" in name else "@")
    ] * (16 if "3v" in name else 4)
    # the page's answer is that of the vectors that transformers' own encoder gives
    kind = SiglipVisionModel if "3v" in name else CLIPVisionModel
    pixels = torch.stack([read_pixels(path, parts.encoder.preprocess) for path in (pictures[0], pictures[-1])])
    with torch.no_grad():
        features = kind.from_pretrained(encoder)(normalise(pixels, *parts.encoder.preprocess.statistics()))[0]
        features = features[:, -parts.model.config.image_tokens :]
        ids = encode_conversations(parts.tokenizer, [[("user", "<image>\n颜色？")]], parts.model.config)[0][0]
        ids = torch.from_numpy(ids)[None]
        first, last = (parts.model.eval()(ids, features[row : row + 1]).logits for row in (0, 1))
        assert (first - last)[:, -1].abs().max() > 0.01
        written = parts.model.generate(ids, image_features=features[:1], max_new_tokens=8, do_sample=False)
    expected = parts.tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)
    assert (
        answer(["--weights", folder, "--vision_path", encoder, "--device", "cpu"], pictures[0], "3v" in name)
        == expected
    )

    # with another encoder, one sentence says so
    other = save_clip(tmp_path / "other") if "3v" in name else save_siglip(tmp_path / "other")
    code, _, err = run_python("3-eval_chat.py", "--weights", folder, "--vision_path", other, "--all")
    assert code == 1 and err.count("\n") == 1 and "--vision_path" in err or "class token" in err, err


def test_a_published_pth_is_known_by_its_tensors(tmp_path):
    """As `sft_vlm_512.pth`, without a config: 196 of a ViT-B/16's 197 vectors."""
    tokenizer = generation_tokenizer("MiniMind2 of 2025-04")
    state, _ = published_vlm("MiniMind2-V of 2025-04", tmp_path, len(tokenizer))
    torch.save(state, tmp_path / "sft_vlm_64.pth")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    CLIPVisionModel(CLIPVisionConfig(**TINY, image_size=224, patch_size=16)).save_pretrained(tmp_path / "clip")
    parts = load_parts(tmp_path / "sft_vlm_64.pth", tmp_path / "clip", tmp_path / "tokenizer")
    assert parts.encoder.image_tokens == 196 and set(parts.model.config.image_ids) == {
        tokenizer.convert_tokens_to_ids("@")
    }
    with pytest.raises(BadInput, match="has image_tokens 196, expected 4: it was trained with another"):
        load_parts(tmp_path / "sft_vlm_64.pth", save_clip(tmp_path / "small"), tmp_path / "tokenizer")

    # a file that was trained here has no bias: all of CLIP's vectors, between < and >
    del state["vision_proj.vision_proj.0.bias"]
    torch.save(state, tmp_path / "own.pth")
    parts = load_parts(tmp_path / "own.pth", tmp_path / "clip", tmp_path / "tokenizer")
    assert parts.encoder.image_tokens == 197 and parts.model.config.image_chars == ["<", ">"]
