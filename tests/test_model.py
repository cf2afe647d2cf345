"""The language model and its eyes against the published code's numbers, and against themselves."""

import numpy as np
import pytest
import torch
from helpers import golden_model
from transformers import StaticCache

from model.errors import BadInput
from model.LMConfig import LMConfig
from model.model import MiniMindLM
from model.model_vlm import MiniMindVLM, find_placeholders

TINY = dict(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=300)


@pytest.mark.parametrize("name", ["tiny_one_image", "tiny_two_images", "moe_tiny"])
def test_agrees_with_published_code(name):
    facts, arrays, model, tokens, features, begin = golden_model(name)
    labels = tokens.clone()
    labels[:, : begin + 1] = -100
    with torch.no_grad():
        output = model(tokens, features, labels=labels)
    np.testing.assert_allclose(output.logits[:, ::7, ::64], arrays["logits"], atol=1e-4)
    assert output.loss.item() == pytest.approx(facts["loss"], abs=1e-4)
    assert {key: list(tensor.shape) for key, tensor in model.state_dict().items()} == facts["keys"]
    assert sum(p.numel() for p in model.parameters()) == facts["n_params"]


def test_greedy_tokens_agree_with_published_code():
    facts, _, model, tokens, features, _ = golden_model("tiny_one_image")
    output = model.generate(
        tokens[:1], image_features=features[:1], max_new_tokens=32, do_sample=False, eos_token_id=None
    )
    assert output[0, tokens.shape[1] :].tolist() == facts["greedy"]


@pytest.mark.parametrize("dim, n_layers, parameters", [(512, 8, 27_272_192), (768, 16, 109_340_160)])
def test_published_sizes(dim, n_layers, parameters):
    with torch.device("meta"):
        model = MiniMindVLM(LMConfig(dim=dim, n_layers=n_layers, vision_bias=True))
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_training_loss_is_the_full_loss():
    """Logits only where labels need them: same loss, same gradient as logits everywhere."""
    torch.manual_seed(0)
    model = MiniMindLM(LMConfig(**TINY)).train()
    ids = torch.randint(3, 300, (3, 20))
    labels = torch.where(torch.rand(3, 20) < 0.3, ids, -100)
    output = model(ids, labels=labels)
    assert output.logits.shape == ((labels[:, 1:] != -100).sum(), 300)
    output.loss.backward()
    gradient = model.layers[0].attention.wq.weight.grad.clone()
    model.zero_grad()
    full = torch.nn.functional.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    full.backward()
    torch.testing.assert_close(output.loss, full)
    torch.testing.assert_close(model.layers[0].attention.wq.weight.grad, gradient)


@pytest.mark.parametrize("use_moe", [False, True])
def test_loss_of_a_batch_is_the_sum_of_its_parts(use_moe):
    torch.manual_seed(0)
    model = MiniMindLM(LMConfig(**TINY, use_moe=use_moe)).train()
    ids = torch.randint(3, 300, (4, 24))
    ids[0, 15:] = 0
    labels = torch.where((torch.rand(4, 24) < 0.4) & (ids > 0), ids, -100)
    count = (labels[:, 1:] != -100).sum()
    whole = model(ids, labels=labels).loss
    parts = sum(model(ids[i : i + 1], labels=labels[i : i + 1], num_items_in_batch=count).loss for i in range(4))
    torch.testing.assert_close(whole, parts)
    shorter = model(ids[:1, :16], labels=labels[:1, :16], num_items_in_batch=count).loss
    torch.testing.assert_close(
        model(ids[:1], labels=labels[:1], num_items_in_batch=count).loss, shorter
    )  # padding is nothing


def test_a_training_step_has_no_device_sync(monkeypatch):
    """No shape and no Python number depends on what a GPU has computed, forward or backward."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)  # where the placeholder check is skipped
    config = LMConfig(**TINY)
    model, features = MiniMindVLM(config).train(), torch.randn(3, 50, 768)
    ids = torch.tensor([[5, *config.image_ids * 2, 6, 7], [*config.image_ids, *range(8, 61)]])
    with torch.profiler.profile() as profile:
        loss = model(ids, features, labels=ids, label_positions=torch.arange(40), num_items_in_batch=40).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    called = {event.key for event in profile.key_averages()}
    assert "aten::index_put" in called
    assert not called & {"aten::nonzero", "aten::masked_select", "aten::_local_scalar_dense"}
    assert model.vision_proj.vision_proj[0].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("tokens", [1, 33])
def test_grouped_experts_and_a_loop_over_experts_are_the_same(tokens):
    """Values and gradients; with one token, two of the four experts have nothing to do."""
    torch.manual_seed(0)
    layer = MiniMindLM(LMConfig(**TINY, use_moe=True)).layers[0].feed_forward
    x = torch.randn(1, tokens, 64)
    found = []
    for training in (True, False):
        y, _, _ = layer.train(training)(x.requires_grad_())
        names, tensors = zip(*layer.named_parameters(), strict=True)
        grads = torch.autograd.grad(y.square().sum(), (x, *tensors), allow_unused=True)
        found.append([y, *(torch.zeros(1) if grad is None else grad for grad in grads)])
    for name, one, other in zip(("y", "x", *names), *found, strict=True):
        torch.testing.assert_close(one, other.expand_as(one), msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_learn_and_are_balanced(dtype):
    torch.manual_seed(0)
    model = MiniMindLM(LMConfig(**TINY, use_moe=True)).train()
    with torch.no_grad():
        for layer in model.layers:
            layer.feed_forward.gate.weight.zero_()  # an even gate: the balance loss has its least value, alpha per layer
    ids = torch.randint(3, 300, (4, 16))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            output = model(ids, labels=ids)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(output.loss.item())
    assert losses[-1] < 0.5 * losses[0]
    plain = torch.nn.functional.cross_entropy(output.logits.float(), ids[:, 1:].flatten())
    assert 0.015 < (output.loss - plain).item() < 0.04  # two layers, alpha 0.01 each


def test_a_shared_expert_is_there_or_not():
    with torch.device("meta"):
        models = [MiniMindLM(LMConfig(**TINY, use_moe=True, n_shared_experts=n)) for n in (0, 1, False, True)]
    none, one, off, on = (sum(p.numel() for p in model.parameters()) for model in models)
    assert one - none == 2 * 3 * 64 * models[0].config.hidden_dim  # one SwiGLU in each of two layers
    assert (off, on) == (none, one)
    for n in (2, -1, None):
        with pytest.raises(BadInput, match=f"n_shared_experts is {n}: use 1 for a shared expert or 0 for none"):
            LMConfig(**TINY, use_moe=True, n_shared_experts=n)


@pytest.mark.parametrize("use_moe", [False, True])
def test_cached_logits_equal_uncached(use_moe):
    torch.manual_seed(0)
    model = MiniMindVLM(LMConfig(**TINY, use_moe=use_moe)).eval()
    ids = torch.tensor([[1, 5, *model.config.image_ids, 7, 9, 11, 13, 15, 17]])
    features = torch.randn(1, 50, 768)
    with torch.no_grad():
        whole = model(ids, features).logits
        for cache in (None, StaticCache(config=model.config, max_cache_len=80)):
            first = model(ids[:, :54], features, past_key_values=cache, use_cache=True)
            second = model(ids[:, 54:56], past_key_values=first.past_key_values)
            steps = [model(ids[:, i : i + 1], past_key_values=second.past_key_values).logits for i in (56, 57)]
            torch.testing.assert_close(torch.cat([first.logits, second.logits, *steps], dim=1), whole)


def test_batched_generation_equals_single():
    """Prompts of different lengths, padded on the left, with 0, 1 and 2 images."""
    torch.manual_seed(0)
    model = MiniMindVLM(LMConfig(**TINY)).eval()
    image = model.config.image_ids
    prompts = [[1, 40, 50, 60], [1, 40, *image, 41, 42], [1, *image, 77, *image, 78, 79]]
    features = torch.randn(3, 50, 768)
    options = dict(max_new_tokens=12, do_sample=False, eos_token_id=None)
    own = [None, features[:1], features[1:]]
    single = [
        model.generate(torch.tensor([p]), image_features=f, **options)[0, len(p) :]
        for p, f in zip(prompts, own, strict=True)
    ]
    width = max(map(len, prompts))
    padded = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    together = model.generate(padded, attention_mask=(padded != 0).long(), image_features=features, **options)
    assert together[:, width:].tolist() == [tokens.tolist() for tokens in single]


def test_pictures_stand_where_their_placeholders_are():
    model = MiniMindVLM(LMConfig(**TINY)).eval()
    image = model.config.image_ids
    ids = torch.tensor(
        [[1, *image, 5, *image], [1, 30, 30, *image, 32, *[7] * 48]]
    )  # loose < and > beside the second row's
    features = torch.randn(3, 50, 768)
    embedded = model.embed(ids, features)
    plain = model.tok_embeddings(ids)
    projected = model.vision_proj(features)
    torch.testing.assert_close(embedded[0, 1:51], projected[0])
    torch.testing.assert_close(embedded[0, 52:102], projected[1])
    torch.testing.assert_close(embedded[1, 3:53], projected[2])
    for row, rest in ((0, [0, 51]), (1, [0, 1, 2, 53, 54, 101])):
        torch.testing.assert_close(embedded[row, rest], plain[row, rest])
    assert find_placeholders(ids, image).nonzero().tolist() == [[0, 1], [0, 52], [1, 3]]


@pytest.mark.parametrize("images", [0, 1, 3])
def test_wrong_number_of_images_names_both(images):
    model = MiniMindVLM(LMConfig(**TINY))
    ids = torch.tensor([[1, *model.config.image_ids * 2]])
    with pytest.raises(ValueError, match=f"{images} images were given, but the text has 2"):
        model(ids, torch.randn(images, 50, 768) if images else None)


def test_batch_without_pictures_still_has_a_gradient_for_the_projector():
    """Else DDP would hang on the ranks whose batches have pictures."""
    model = MiniMindVLM(LMConfig(**TINY)).train()
    ids = torch.randint(40, 300, (2, 60))
    model(ids, labels=ids).loss.backward()
    assert not model.vision_proj.vision_proj[0].weight.grad.any()


@pytest.mark.parametrize("use_moe", [False, True])
def test_survives_transformers_folder(tmp_path, use_moe):
    model = MiniMindVLM(LMConfig(**TINY, vision_bias=True, use_moe=use_moe)).eval()
    model.save_pretrained(tmp_path)
    loaded, info = MiniMindVLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert loaded.output.weight is loaded.tok_embeddings.weight
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    ids = torch.tensor([[1, 5, *model.config.image_ids, 7]])
    features = torch.randn(1, 50, 768)
    with torch.no_grad():
        assert torch.equal(model(ids, features).logits, loaded.eval()(ids, features).logits)
    assert loaded.config.to_dict()["image_char_ids"] == [30, 32]


def test_other_vision_encoders_change_the_placeholder():
    config = LMConfig(image_tokens=257, vision_width=1024)
    assert len(config.image_ids) == len(config.image_special_token) == 257
    assert LMConfig().image_special_token == "<" * 25 + ">" * 25
    assert LMConfig().image_ids == [30] * 25 + [32] * 25
