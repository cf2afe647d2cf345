"""Files made by others come in, files made here go out, and what does not fit is refused in one sentence."""

import json
import os
import pickle
import re
import shutil

import numpy as np
import pytest
import safetensors.torch
import torch
from helpers import ROOT, feature, formula_file, formula_state, golden_model, run_python, save_random_vlm
from published import forward
from transformers import CLIPVisionModel

from model.chat import Chat
from model.checkpoint import (
    build_config,
    encoder_hash,
    load_parts,
    load_tokenizer,
    load_vlm,
    read_metadata,
    read_weights,
    save_weights,
    tokenizer_hash,
)
from model.conversation import tokenizer_fields
from model.errors import BadInput
from model.export import export, reverse
from model.LMConfig import LMConfig
from model.model_vlm import MiniMindVLM
from model.training.resume import read_state
from model.vision_utils import VisionEncoder, load_vision

SIZES = {
    "512+8": dict(dim=512, n_layers=8),
    "768+16": dict(dim=768, n_layers=16),
    "512+8 moe": dict(dim=512, n_layers=8, use_moe=True),
}


class Published:
    """Stands in for minimind_tokenizer, which is not part of the repository: only its size and special ids matter here."""

    unk_token_id, bos_token_id, eos_token_id = 0, 1, 2

    def get_vocab(self):
        return {str(i): i for i in range(6400)}

    def __len__(self):
        return 6400

    def convert_tokens_to_ids(self, tokens):
        return [{"<": 30, ">": 32}[token] for token in tokens]


def asked(count=2):
    """Two prompts with one picture each: tokens (B, T) and features (N, 50, 768)."""
    tokens = torch.randint(33, 6400, (count, 60), generator=torch.Generator().manual_seed(0))
    tokens[:, 4:54] = torch.tensor([30] * 25 + [32] * 25)
    return tokens, torch.stack([feature(f"img{b}.0") for b in range(count)])


@pytest.mark.parametrize("name", ["tiny_one_image", "tiny_two_images", "moe_tiny"])
def test_the_second_writing_is_the_published_model(name):
    facts, arrays, _, tokens, features, _ = golden_model(name)
    config = facts["config"]
    logits = forward(formula_state(facts["keys"]), tokens, features, config["n_heads"], config["n_kv_heads"])
    np.testing.assert_allclose(logits[:, ::7, ::64], arrays["logits"], atol=1e-4)


@pytest.mark.parametrize("size", SIZES)
def test_parity_in_both_directions(size, tmp_path):
    """A published file answers here as there; what is saved here answers there as here."""
    sizes = SIZES[size]
    path = formula_file(tmp_path / "published.pth", **sizes)
    model, loaded = load_vlm(path, LMConfig(**sizes), Published())
    assert (
        f"{sum(p.numel() for p in model.parameters()):,} parameters of language model and projector with a bias"
        in loaded
    )
    tokens, features = asked()
    with torch.no_grad():
        ours = model.eval()(tokens, features).logits
    published = torch.load(path)
    torch.testing.assert_close(ours, forward(published, tokens, features, 16, 8).float(), atol=1e-4, rtol=0)

    # what is saved has the same names and numbers, so that it answers there in the same way
    save_weights(tmp_path / "ours.pth", model, Published())
    state = torch.load(tmp_path / "ours.pth", weights_only=True)
    assert state.keys() == published.keys() and all(torch.equal(state[name], published[name]) for name in state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bias", [True, False])
def test_every_kind_of_published_file_loads(tmp_path, dtype, bias):
    tiny = dict(dim=64, n_layers=2, n_heads=4, n_kv_heads=2)
    plain = torch.load(formula_file(tmp_path / "plain.pth", bias=bias, **tiny))
    kinds = {
        "64_vlm_sft.pth": dict(bias=bias),
        "64_vlm_pretrain.pth": dict(bias=bias, prefix="_orig_mod.", extras=True),
        "64_vlm_sft_multi.pth": dict(bias=bias, prefix="_orig_mod.module.", extras=True),
        "64_llm.pth": dict(projector=False, extras=True),
    }
    for name, kind in kinds.items():
        path = formula_file(tmp_path / name, dtype=dtype, **kind, **tiny)
        model, loaded = load_vlm(path, LMConfig(**tiny), Published(), allow_missing_projector="llm" in name)
        assert ("projector" in loaded) == ("llm" not in name) and ("bias" in loaded) == (bias and "llm" not in name)
        for key, tensor in model.state_dict().items():
            if "vision" not in key or "llm" not in name:
                assert tensor.dtype == torch.float32 and torch.equal(tensor, plain[key].to(dtype).float())


@pytest.mark.parametrize("form", ["pytorch_model.bin", "model.safetensors"])
def test_the_published_folder_loads_without_running_its_code(tmp_path, tiny_clip, form, tokenizer):
    """`minimind-v-v1`: a config with fields of its own, tensors, and code that would tell on itself."""
    folder = tmp_path / "minimind-v-v1"
    folder.mkdir()
    tokenizer.save_pretrained(folder)
    sizes = dict(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=len(tokenizer))
    config = {**sizes, "model_type": "minimind-v", "flash_attn": True, "image_special_token": "<" * 25 + ">" * 25}
    config |= {"auto_map": {"AutoModelForCausalLM": "model.Transformer"}, "hidden_dim": None, "max_seq_len": 8192}
    config |= {"image_ids": [30] * 25 + [32] * 25, "multiple_of": 64, "n_shared_experts": True, "architectures": ["X"]}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    state = torch.load(formula_file(tmp_path / "a.pth", **sizes, vision_width=48))
    if form == "pytorch_model.bin":
        torch.save(state, folder / form)
    else:
        safetensors.torch.save_file({name: t for name, t in state.items() if name != "output.weight"}, folder / form)
    chat = Chat(folder, tiny_clip, "nowhere")
    assert (chat.config.dim, chat.config.n_layers, chat.config.max_seq_len) == (64, 2, 8192)
    assert torch.equal(chat.model.output.weight, state["output.weight"])
    assert "does not say which tokenizer" in chat.summary and not (tmp_path / "ran").exists()


class Evil:
    def __reduce__(self):
        return os.system, ("touch ran",)


def test_refusals_name_the_first_difference_and_its_cause(tmp_path, tokenizer):
    tiny = dict(dim=64, n_layers=2, n_heads=4, n_kv_heads=2)
    path = formula_file(tmp_path / "64_vlm_sft.pth", **tiny)

    def refused(says, path=path, tokenizer=Published(), **changed):  # noqa: B008
        fields = {**tiny, **tokenizer_fields(tokenizer), **changed}
        with pytest.raises(BadInput, match=says) as caught:
            load_vlm(path, LMConfig(**fields), tokenizer)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 400

    refused("has dim 64, expected 128: use --dim 64, or other weights", dim=128)
    refused("has n_layers 2, expected 3: use --n_layers 2", n_layers=3)
    refused("has use_moe False, expected True: use --use_moe False", use_moe=True)
    refused("vocab_size 6400, expected 940: it was trained with another tokenizer", tokenizer=tokenizer)
    refused("vision_width 768, expected 1024: it was trained with another CLIP", vision_width=1024)
    refused(r"layers.0.attention.wk.weight is \(32, 64\), expected \(64, 64\): check --n_heads", n_kv_heads=4)

    llm = formula_file(tmp_path / "64_llm.pth", projector=False, **tiny)
    refused("without a vision projector: run 1-pretrain_vlm.py", path=llm)
    broken = tmp_path / "broken.pth"
    broken.write_bytes(path.read_bytes()[:50_000])
    refused("is truncated, or not a file of weights", path=broken)
    broken.write_bytes(b"<html>404</html>")
    refused("is truncated, or not a file of weights", path=broken)
    broken.write_bytes(b"")
    refused("is truncated, or not a file of weights", path=broken)
    broken.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 109123456\n")
    refused("is a Git LFS pointer and not yet the file: run `git lfs pull`", path=broken)
    torch.save({"weights": [1, 2, 3]}, broken)
    refused("is not a file of weights: expected named tensors", path=broken)
    torch.save({"fc.weight": torch.zeros(3)}, broken)
    refused("is not a MiniMind: it has no tok_embeddings.weight, but fc.weight", path=broken)
    state = torch.load(path)
    torch.save({name: t for name, t in state.items() if name != "layers.1.ffn_norm.weight"}, broken)
    refused(r"lacks layers.1.ffn_norm.weight \(1 missing, 0 unexpected", path=broken)
    torch.save({**state, "layers.1.extra": torch.zeros(1)}, broken)
    refused("has layers.1.extra, which this model does not", path=broken)
    for evil in (lambda f: torch.save({"a": Evil()}, f), lambda f: f.write_bytes(pickle.dumps(Evil(), 2))):
        evil(broken)
        refused("contains pickled code, not only tensors: refusing to load it", path=broken)
    assert not (ROOT / "ran").exists() and not os.path.exists("ran")
    path.with_suffix(".json").write_text('{"config": {"dim"')
    with pytest.raises(
        BadInput, match=r"64_vlm_sft.json is truncated, or not a JSON object: copy or download it again"
    ):
        load_vlm(path, LMConfig(**tiny), Published())
    (tmp_path / "folder").mkdir()
    with pytest.raises(BadInput, match="model.safetensors not found"):
        load_vlm(tmp_path / "folder", LMConfig(**tiny), Published())
    index = tmp_path / "folder/model.safetensors.index.json"
    index.write_text("{}")
    with pytest.raises(BadInput, match="index.json lists no files of weights: copy or download it again"):
        load_vlm(tmp_path / "folder", LMConfig(**tiny), Published())
    index.write_text('{"weight_map": {"output.weight": "model-00001-of-00002.safetensors"}}')
    with pytest.raises(BadInput, match="model-00001-of-00002.safetensors not found: copy or download it again"):
        load_vlm(tmp_path / "folder", LMConfig(**tiny), Published())
    with pytest.raises(BadInput, match=f"is the index of a folder of weights: name the folder, {tmp_path}/folder"):
        load_vlm(index, LMConfig(**tiny), Published())


NO_PICKLES = [
    b"Repository not found",
    b"(\n",
    b"\x80\x04.",
    b"cos\nsystem",
    b"hello",
    b"X",
    b"\x80\x02}q\x00.",
    b"PK\x03\x04",
    b"0",
]


@pytest.mark.parametrize("content", NO_PICKLES)
def test_any_bytes_in_place_of_weights_are_told(tmp_path, tiny_clip, content):
    for file in (tmp_path / "64_llm.pth", tmp_path / "model.safetensors", tmp_path / "pytorch_model.bin"):
        file.write_bytes(content)
        with pytest.raises(BadInput, match=f"{file} (is|contains) "):
            read_weights(file)
    with pytest.raises(BadInput, match="64_llm.pth is truncated or corrupt|by another version"):
        read_state(tmp_path / "64_llm.pth")
    for name in ("model.safetensors", "pytorch_model.bin"):
        for file in tiny_clip.glob("*.safetensors"):
            file.unlink()
        (tiny_clip / name).write_bytes(content)
        with pytest.raises(BadInput, match=f"{tiny_clip}.*: copy or download it again|pickled code"):
            load_vision(tiny_clip)


WRAPPED = {
    "compiled before data-parallel": lambda state: {f"module._orig_mod.{name}": state[name] for name in state},
    "three times": lambda state: {f"_orig_mod.module._orig_mod.{name}": state[name] for name in state},
    "each layer compiled": lambda state: {
        re.sub(r"^(layers\.\d+)\.", r"\1._orig_mod.", name): state[name] for name in state
    },
    "fsdp": lambda state: {f"_fsdp_wrapped_module.{name}": state[name] for name in state},
    "under model": lambda state: {"model": state, "epoch": 3, "optimizer": {"state": {}}},
    "twice": lambda state: {"state_dict": {"model": state}},
    "under model_state_dict": lambda state: {"epoch": 3, "model_state_dict": state},
    "Lightning's": lambda state: {
        "pytorch-lightning_version": "2.5",
        "state_dict": {f"model.{name}": state[name] for name in state} | {"criterion.weight": state["norm.weight"][:0]},
    },
}


@pytest.mark.parametrize("wrapped", WRAPPED)
def test_what_is_wrapped_around_weights_is_taken_off(tmp_path, wrapped):
    tiny = dict(dim=64, n_layers=2, n_heads=4, n_kv_heads=2)
    path = formula_file(tmp_path / "64_vlm_sft.pth", **tiny)
    state = torch.load(path)
    torch.save(WRAPPED[wrapped](state), path)
    model, _ = load_vlm(path, LMConfig(**tiny), Published())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_a_sharded_folder_loads(tmp_path, tokenizer, tiny_clip, form):
    """As transformers writes one of `max_shard_size`, with its CLIP."""
    weights = save_random_vlm(tmp_path / "64_vlm_sft.pth", tokenizer)
    folder = tmp_path / "folder"
    export(weights, folder, ROOT / "model/demo", tiny_clip, with_vision=True)
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    usual = "model.safetensors" if form == "safetensors" else "pytorch_model.bin"
    shards = {}
    for i, name in enumerate(sorted(tensors)):
        shards.setdefault(usual.replace(".", f"-0000{i % 3 + 1}-of-00003."), {})[name] = tensors[name]
    for file, shard in shards.items():
        (safetensors.torch.save_file if form == "safetensors" else torch.save)(shard, folder / file)
    names = {name: file for file, shard in shards.items() for name in shard}
    (folder / f"{usual}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    chat = Chat(folder, "nowhere", "nowhere")
    ours = torch.load(weights)
    assert all(torch.equal(tensor, ours[name]) for name, tensor in chat.model.state_dict().items())
    assert encoder_hash(chat.encoder) == encoder_hash(load_vision(tiny_clip))
    assert "0.7 MB" not in chat.summary and "161,856 parameters of language model and projector" in chat.summary
    reverse(folder, tmp_path / "back.pth")
    (folder / usual.replace(".", "-00002-of-00003.")).unlink()
    with pytest.raises(BadInput, match="00002-of-00003.* not found: copy or download it again"):
        read_weights(folder)


def test_a_damaged_tokenizer_is_told(tmp_path):
    whole = (ROOT / "model/demo/tokenizer.json").read_text(encoding="utf-8")
    for content in (whole[:5000], "", "{}", whole.replace('"BPE"', '"XYZ"')):
        (tmp_path / "tokenizer.json").write_text(content, encoding="utf-8")
        with pytest.raises(BadInput, match="the tokenizer in .* could not be loaded .*: copy or download it again"):
            load_tokenizer(tmp_path)


@pytest.mark.parametrize("token", ["<", ">"])
def test_a_tokenizer_without_what_pictures_or_turns_need_is_told(tmp_path, tokenizer, token):
    tokenizer.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    content["model"]["vocab"]["~~"] = content["model"]["vocab"].pop(token)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(BadInput, match=f"the tokenizer in {tmp_path} has no token {token}, which stands for pictures"):
        tokenizer_fields(load_tokenizer(tmp_path))
    shutil.copy(ROOT / "model/demo/tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(BadInput, match=f"the tokenizer in {tmp_path} has no <s> or no </s>: copy its tokenizer_config"):
        load_tokenizer(tmp_path)


def test_own_files_know_their_tokenizer_and_their_clip(tmp_path, tokenizer, tiny_clip):
    path = save_random_vlm(tmp_path / "64_vlm_sft.pth", tokenizer)
    sizes = dict(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vision_width=48)
    with pytest.raises(BadInput, match="image_tokens 5, expected 17: it was trained with another CLIP"):
        load_vlm(path, LMConfig(**sizes, image_tokens=17, **tokenizer_fields(tokenizer)), tokenizer)

    class Twin:  # as many tokens, two of them swapped
        bos_token_id, eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
        convert_tokens_to_ids = tokenizer.convert_tokens_to_ids
        __len__ = tokenizer.__len__

        def get_vocab(self):
            return {token: {400: 401, 401: 400}.get(i, i) for token, i in tokenizer.get_vocab().items()}

    with pytest.raises(BadInput, match="was trained with another tokenizer of the same size"):
        load_vlm(path, LMConfig(**sizes, image_tokens=5, **tokenizer_fields(tokenizer)), Twin())
    assert tokenizer_hash(Twin()) != tokenizer_hash(tokenizer)


def test_scripts_say_what_they_loaded(tmp_path, tokenizer, tiny_clip):
    path = save_random_vlm(tmp_path / "64_vlm_sft.pth", tokenizer)
    flags = ["--weights", path, "--vision_path", tiny_clip, "--tokenizer_path", "model/demo", "--max_new_tokens", 2]
    code, out, err = run_python("3-eval_chat.py", *flags, "--device", "cpu")
    assert code == 0, err
    assert out.startswith(f"loaded {path}: 0.7 MB, 161,856 parameters of language model and projector\n")
    path.with_suffix(".json").unlink()  # as if made elsewhere
    sizes = ["--dim", 64, "--n_layers", 2, "--n_heads", 4, "--n_kv_heads", 2, "--max_seq_len", 128]
    code, out, err = run_python("3-eval_chat.py", *flags, "--device", "cpu", *sizes)
    assert code == 0 and f"warning: {path} does not say which tokenizer" in out, err


def test_weights_of_another_clip_of_the_same_size_are_refused(tmp_path, tokenizer, tiny_clip):
    config = CLIPVisionModel.from_pretrained(tiny_clip).config
    torch.manual_seed(5)
    CLIPVisionModel(config).save_pretrained(tmp_path / "twin")
    ours, twin = load_vision(tiny_clip), load_vision(tmp_path / "twin")
    sizes = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2}
    model = MiniMindVLM(build_config({}, tokenizer, ours, sizes))
    save_weights(tmp_path / "64_vlm_sft.pth", model, tokenizer, ours)
    paths = {"vision_path": tiny_clip, "tokenizer_path": ROOT / "model" / "demo"}
    parts = load_parts(tmp_path / "64_vlm_sft.pth", **paths)
    assert parts.metadata["encoder"] == encoder_hash(ours) and parts.model.config.n_heads == 4
    with pytest.raises(BadInput, match="trained with another CLIP of the same size: pass that one with --vision_path"):
        load_parts(tmp_path / "64_vlm_sft.pth", **{**paths, "vision_path": tmp_path / "twin"})
    # the same CLIP in half precision is the same
    assert encoder_hash(ours) == encoder_hash(VisionEncoder(ours.model.half())) != encoder_hash(twin)


def test_loading_leaves_the_callers_configuration_alone(tmp_path, tokenizer):
    path = save_random_vlm(tmp_path / "64_vlm_sft.pth", tokenizer)
    state = torch.load(path)
    torch.save(state | {"vision_proj.vision_proj.0.bias": torch.zeros(64)}, path)
    config = build_config(read_metadata(path), tokenizer, None)
    model, _ = load_vlm(path, config, tokenizer)
    assert model.config.vision_bias and not config.vision_bias
