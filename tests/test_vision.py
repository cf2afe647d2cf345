"""Preprocessing, the frozen CLIP and its feature cache."""

import errno
import json
import os
import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import golden
from PIL import Image
from transformers import CLIPConfig, CLIPModel, CLIPVisionModel

from model.errors import BadInput
from model.files import find_weights
from model.images import Preprocess, normalise, read_pixels, to_pixels, to_rgb
from model.training.feature_cache import FeatureCache, cache_key, open_cache
from model.vision_utils import VisionEncoder, load_vision


def gradient(width=300, height=200):
    """The picture that golden/preprocess.json describes."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x * 255 // 299, y * 255 // 199, (x * y) // 7 % 256], axis=-1).astype(np.uint8))


def test_preprocessing_agrees_with_published(tiny_clip):
    facts = golden("preprocess")
    pixels = normalise(to_pixels(gradient(), Preprocess())[None], *Preprocess().statistics())[0]
    assert list(pixels.shape) == facts["shape"]
    for index, value in facts["samples"].items():
        assert pixels[tuple(map(int, index.split(",")))].item() == pytest.approx(value, abs=1e-4), index
    np.testing.assert_allclose(pixels.mean(dim=(1, 2)), facts["mean"], atol=1e-4)
    np.testing.assert_allclose(pixels.std(dim=(1, 2)), facts["std"], atol=1e-4)


def test_exif_rotation_is_honoured(tmp_path):
    image = Image.new("RGB", (60, 20), "white")
    image.paste("red", (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter to the right
    image.save(tmp_path / "turned.png", exif=exif)
    upright = to_rgb(Image.open(tmp_path / "turned.png"))
    assert upright.size == (20, 60)
    assert upright.getpixel((10, 5)) == (255, 0, 0) and upright.getpixel((10, 50)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK", "YCbCr", "HSV", "I;16", "F"])
def test_every_mode_becomes_rgb(mode):
    grey = Image.linear_gradient("L")
    if mode == "I;16":
        image = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    elif mode == "HSV":
        image = grey.convert("RGB").convert("HSV")
    else:
        image = grey.convert(mode)
    result = np.asarray(to_rgb(image)).astype(int)
    assert result.shape == (256, 256, 3)
    if mode != "1":
        assert abs(result - np.asarray(grey)[..., None].astype(int)).max() <= 4


def test_transparency_is_laid_on_white():
    assert to_rgb(Image.new("RGBA", (4, 4), (255, 0, 0, 0))).getpixel((0, 0)) == (255, 255, 255)


def test_a_large_jpeg_is_read_at_a_smaller_scale_and_looks_the_same(tmp_path):
    whole = Image.effect_mandelbrot((1600, 1200), (-2, -1.2, 1, 1.2), 100).convert("RGB")
    whole.save(tmp_path / "large.jpg", quality=95)
    with Image.open(tmp_path / "large.jpg") as image:
        pixels = to_pixels(image, Preprocess())
        assert image.size == (800, 600)  # half of it was decoded
    assert (pixels.float() - to_pixels(whole, Preprocess()).float()).abs().mean() < 1


def test_features_are_the_encoder_output_before_pooling(tiny_clip):
    encoder = load_vision(tiny_clip)
    assert (encoder.preprocess.size, encoder.image_tokens, encoder.vision_width) == (64, 5, 48)
    pixels = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    features = encoder(pixels)
    assert features.shape == (3, 5, 48) and not features.requires_grad
    expected = CLIPVisionModel.from_pretrained(tiny_clip).eval()(
        normalise(pixels, *Preprocess().statistics()), output_hidden_states=True
    )
    torch.testing.assert_close(features, expected.hidden_states[-1])
    torch.testing.assert_close(torch.cat([encoder(one[None]) for one in pixels]), features, atol=1e-5, rtol=1e-5)
    assert not any(p.requires_grad for p in encoder.model.parameters())


def test_a_cache_opens_its_file_in_every_worker(tiny_clip, pictures, tmp_path):
    """What a spawned process is sent holds no features: on the real data they are 45 GB."""
    encoder = load_vision(tiny_clip)
    cache = FeatureCache(tmp_path, "key")
    pixels = torch.stack([read_pixels(path, encoder.preprocess) for path in pictures[:3]])
    cache.build(encoder, 3, [(pixels, [None] * 3)], lambda count: None)
    assert cache.open()
    sent = pickle.dumps(cache)
    assert len(sent) < 1000
    assert torch.equal(pickle.loads(sent)[np.array([2, 0])], cache[np.array([2, 0])])


def test_a_cache_is_renamed_only_when_it_is_no_longer_mapped(tiny_clip, pictures, tmp_path, monkeypatch):
    """Windows refuses to rename a file that is mapped."""
    replace = os.replace

    def refuse_mapped(source, target):
        if str(source) in Path("/proc/self/maps").read_text():
            raise PermissionError(errno.EACCES, "it is in use")
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse_mapped)
    encoder = load_vision(tiny_clip)
    cache = FeatureCache(tmp_path, "key")
    pixels = torch.stack([read_pixels(path, encoder.preprocess) for path in pictures[:3]])
    cache.build(encoder, 3, [(pixels, [None] * 3)], lambda count: None)
    assert cache.open()


def test_only_a_full_disk_asks_for_room(tiny_clip, pictures, tmp_path, monkeypatch):
    encoder = load_vision(tiny_clip)
    dataset = SimpleNamespace(fingerprints=list, image_names=[], preprocess=Preprocess(64))
    processes = SimpleNamespace(is_main=True, broadcast=lambda key: key, barrier=lambda: None)
    for number, says in ((errno.ENOSPC, "it takes 0.0 GB; make room, name another"), (errno.EACCES, "name another")):

        def fail(*_, number=number):
            raise OSError(number, "why")

        monkeypatch.setattr(FeatureCache, "build", fail)
        with pytest.raises(BadInput, match=f"could not be written .why.: {says} --out_dir, or use --cache_features F"):
            open_cache(dataset, encoder, processes, folder=tmp_path, vision_path=tiny_clip, num_workers=0)


def test_loads_only_the_vision_half_and_quietly(tmp_path, capfd):
    clip = CLIPModel(
        CLIPConfig(
            vision_config=dict(
                hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, image_size=64
            ),
            text_config=dict(
                vocab_size=99, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
            ),
        )
    )
    clip.save_pretrained(tmp_path)
    capfd.readouterr()
    encoder = load_vision(tmp_path)
    assert len("".join(capfd.readouterr())) < 200
    assert not [name for name, _ in encoder.model.named_parameters() if "text" in name]
    pixels = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    own = clip.eval().vision_model(normalise(pixels, *Preprocess().statistics())).last_hidden_state
    torch.testing.assert_close(encoder(pixels), own)


def test_what_is_not_a_whole_clip_is_refused(tiny_clip):
    """As it is found on disks: truncated files, files of two models, other models, and pointers of Git LFS."""
    weights, notes = tiny_clip / "model.safetensors", tiny_clip / "config.json"
    config, tensors = json.loads(notes.read_text()), weights.read_bytes()

    def refused(says):
        with pytest.raises(BadInput, match=says) as caught:
            load_vision(tiny_clip)
        assert str(tiny_clip) in str(caught.value) and "\n" not in str(caught.value)

    weights.write_bytes(tensors[:10_000])
    refused("model.safetensors is truncated, or not a file of weights")
    weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 605157884\n")
    refused("model.safetensors is a Git LFS pointer and not yet the file: run `git lfs pull`")
    weights.rename(tiny_clip / "pytorch_model.bin")
    refused("pytorch_model.bin is a Git LFS pointer")
    (tiny_clip / "pytorch_model.bin").write_bytes(b"")
    refused("pytorch_model.bin is truncated, or not a file of weights")
    weights.write_bytes(tensors)
    notes.write_text(json.dumps({**config, "hidden_size": 96}))
    refused(r"don't match \(.*class_embedding is \(48,\), config.json says \(96,\)\): download both")
    notes.write_text(json.dumps({**config, "model_type": "bert"}))
    refused(r"is neither a CLIP nor a SigLIP of fixed size \(model_type bert\): name the folder of one")
    notes.write_text(json.dumps(config)[:50])
    refused("config.json is truncated, or not a JSON object")


def test_a_clip_in_several_files(tiny_clip):
    """As save_pretrained writes a large one: every shard is checked, and the error names the file."""
    whole = load_vision(tiny_clip)
    (tiny_clip / "model.safetensors").unlink()
    whole.model.save_pretrained(tiny_clip, max_shard_size="100KB")
    first, *others = sorted(tiny_clip.glob("model-*.safetensors"))
    assert others and find_weights(tiny_clip) == tiny_clip / "model.safetensors.index.json"
    pixels = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    assert torch.equal(load_vision(tiny_clip)(pixels), whole(pixels))
    first.write_bytes(first.read_bytes()[:1000])
    with pytest.raises(BadInput, match=f"{first} is truncated, or not a file of weights"):
        load_vision(tiny_clip)
    first.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 605157884\n")
    with pytest.raises(BadInput, match=f"{first} is a Git LFS pointer"):
        load_vision(tiny_clip)
    first.unlink()
    with pytest.raises(BadInput, match=f"{first} not found: copy or download it again"):
        load_vision(tiny_clip)


def test_unreadable_picture_is_named(tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    for name in ("broken.jpg", "missing.jpg"):
        with pytest.raises(BadInput, match=name):
            read_pixels(tmp_path / name, Preprocess(64))


def test_feature_cache_is_rebuilt_when_stale_or_half_written(tmp_path, tiny_clip):
    encoder = load_vision(tiny_clip)
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for i, path in enumerate(paths):
        gradient(64 + i, 64).save(path)
    pixels = torch.stack([read_pixels(path, Preprocess(64)) for path in paths])
    folder = tmp_path / "features"

    cache = FeatureCache(folder, cache_key(tiny_clip, paths))
    assert not cache.open()
    cache.build(encoder, 3, [(pixels[:2], [None] * 2), (pixels[2:], [None])], lambda n: None)
    again = FeatureCache(folder, cache_key(tiny_clip, paths))
    assert again.open()
    torch.testing.assert_close(again[np.array([2, 0])].float(), encoder(pixels)[[2, 0]], atol=5e-3, rtol=5e-3)

    whole = again.file.read_bytes()
    for damaged in (b"", b"Repository not found", whole[:1000]):
        again.file.write_bytes(damaged)
        assert not FeatureCache(folder, cache_key(tiny_clip, paths)).open()
    again.file.write_bytes(whole)

    again.note.unlink()  # what a run killed while writing leaves behind
    assert not FeatureCache(folder, cache_key(tiny_clip, paths)).open()
    gradient(80, 80).save(paths[1])
    assert not FeatureCache(folder, cache_key(tiny_clip, paths)).open()
    other = VisionEncoder(CLIPVisionModel(encoder.model.config))
    other.model.save_pretrained(tiny_clip)
    assert cache_key(tiny_clip, paths) != cache.key


def test_half_written_file_is_not_taken_for_whole(tmp_path, tiny_clip):
    encoder = load_vision(tiny_clip)
    gradient().save(tmp_path / "a.png")

    def interrupted():
        yield read_pixels(tmp_path / "a.png", Preprocess(64))[None], [None]
        raise KeyboardInterrupt

    cache = FeatureCache(tmp_path / "features", cache_key(tiny_clip, [tmp_path / "a.png"] * 2))
    with pytest.raises(KeyboardInterrupt):
        cache.build(encoder, 2, interrupted(), lambda n: None)
    assert not FeatureCache(tmp_path / "features", cache.key).open()
    assert FeatureCache(tmp_path / "features", cache.key).progress() == (1, {})
    cache.note.rename(cache.note.with_name("other.json"))
    assert cache.progress() == (0, {})  # nothing tells how much of it is there
