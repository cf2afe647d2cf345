"""Folders for transformers: what leaves answers elsewhere as here, and comes back bit for bit."""

import copy
import json
import re
import shutil
import sys

import pytest
import safetensors.torch
import torch
from helpers import ROOT, data_url, formula_file, part, question, run, run_python, save_random_vlm
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration, pipeline

from model.chat import Chat
from model.conversation import PUBLISHED_TEMPLATE, as_conversation, encode_conversations
from model.export import LLAVA_EXAMPLE
from model.hf import MiniMindVForConditionalGeneration, MiniMindVProcessor
from model.images import read_pixels
from web_server import create_app

CODE = ["--format", "code", "--with_vision"]


@pytest.fixture
def export(weights, tiny_clip, tmp_path):
    """Exports the random model, or another: its folder."""

    def export(*flags, source=weights):
        folder = tmp_path / "minimind-v-v1-small"
        paths = ["--vision_path", tiny_clip, "--tokenizer_path", "model/demo"]
        code, out, err = run_python("-m", "model.export", source, folder, *paths, *flags)
        assert code == 0 and out == f"wrote {folder}\n", err
        return folder

    return export


def test_the_readme_s_ten_lines_answer_without_the_repository(export, chat, pictures, tmp_path):
    readme = (ROOT / "web" / "docs" / "serving.md").read_text(encoding="utf-8")
    lines = next(code for code in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "AutoProcessor" in code)
    folder = export()
    lines = lines.replace("my-minimind-v", folder.name)
    lines = lines.replace("dataset/eval_images/green-ring_blue-star_purple-triangle.png", "picture.png")
    assert len(lines.splitlines()) <= 10 and lines.strip() == LLAVA_EXAMPLE.format(name=folder.name)
    assert lines in (folder / "README.md").read_text(encoding="utf-8")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copytree(folder, elsewhere / folder.name)
    shutil.copyfile(pictures[0], elsewhere / "picture.png")
    (elsewhere / "ask.py").write_text(lines, encoding="utf-8")
    places = {"HF_HOME": str(elsewhere / "cache"), "HF_HUB_OFFLINE": "1", "PYTHONUTF8": "1"}
    code, out, err = run(sys.executable, "-P", "ask.py", cwd=elsewhere, **places)
    answer = "".join(chat.stream("描述这张图片。", pictures[:1], max_new_tokens=64, temperature=0))
    assert code == 0 and out == f"{answer}\n" and len(answer) > 3, err
    assert "warning" not in err.lower() and "were not" not in err, err


@pytest.mark.parametrize(("dtype", "most"), [("float32", 1e-3), ("bfloat16", 0.2), ("float16", 0.03)])
@pytest.mark.parametrize("bias", [False, True])
def test_a_llava_computes_the_same_in_each_precision(
    export, tiny_clip, tokenizer, pictures, tmp_path, dtype, most, bias
):
    """From a file in that precision, back to the same bits; with transformers' own classes, several questions at once."""
    source = formula_file(tmp_path / "a.pth", bias=bias, dim=64, n_layers=2, vocab_size=len(tokenizer), vision_width=48)
    state = {name: tensor.to(getattr(torch, dtype)) for name, tensor in torch.load(source).items()}
    torch.save(state, source)
    folder = export(source=source)
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    assert type(model) is LlavaForConditionalGeneration and model.dtype == getattr(torch, dtype)

    # two questions of unequal length and with one and two pictures: logits of what comes next
    processor, chat = AutoProcessor.from_pretrained(folder), Chat(source, tiny_clip, ROOT / "model" / "demo")
    opened = [{"type": "image", "image": Image.open(path)} for path in pictures[:3]]
    texts = [{"type": "text", "text": text} for text in ("颜色？", "两张图有什么不同？")]
    chats = [
        [{"role": "user", "content": [opened[0], texts[0]]}],
        [{"role": "user", "content": [*opened[1:], texts[1]]}],
    ]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "processor_kwargs": {"padding": True}}
    processor.tokenizer.padding_side = "left"
    inputs = processor.apply_chat_template(chats, add_generation_prompt=True, **options)
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    with torch.no_grad():
        theirs = model(**inputs).logits[:, -1].float()
        for row, (text, own) in enumerate(
            zip(("颜色？", "两张图有什么不同？"), (pictures[:1], pictures[1:3]), strict=True)
        ):
            ids = chat.encode_prompt(as_conversation(text, len(own), chat.config))
            ours = chat.model(ids, chat.encode_images(own)).logits[0, -1]
            assert (theirs[row] - ours).abs().max() < most * ours.abs().max()

    code, _, err = run_python("-m", "model.export", "--reverse", folder, tmp_path / "back.pth")
    assert code == 0, err
    back = torch.load(tmp_path / "back.pth")
    assert back.keys() == state.keys() and all(torch.equal(back[name], state[name]) for name in state)
    assert all(back[name].dtype == state[name].dtype for name in state)


def test_a_llava_of_others_is_refused(export, tmp_path):
    folder = export()
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    tensors["multi_modal_projector.linear_2.weight"] += 0.1
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    code, _, err = run_python("-m", "model.export", "--reverse", folder, tmp_path / "back.pth")
    assert code == 1 and "is a LLaVA whose projector has two layers" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "sizes",
    [{}, {"qk_norm": True}, {"projector": "mlp"}, {"drop_class_token": True, "image_tokens": 4}, {"vision_bias": True}],
    ids=str,
)
def test_onnx_runtime_alone_answers_in_an_exported_folder(export, tokenizer, tiny_clip, pictures, tmp_path, sizes):
    source = save_random_vlm(tmp_path / "vlm.pth", tokenizer, **sizes)
    folder = export("--format", "onnx", source=source)
    for name in ("torch", "transformers"):  # whoever imports them fails
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('{name} was imported')")
    chat = Chat(source, tiny_clip, ROOT / "model" / "demo")
    for picture in pictures[:2]:
        ask = (sys.executable, folder / "ask.py", picture, "什么颜色？ </s>")
        code, out, err = run(*ask, cwd=tmp_path, PYTHONPATH=str(tmp_path), PYTHONUTF8="1")
        expected = "".join(chat.stream("什么颜色？ </s>", [picture], temperature=0))
        assert code == 0 and out == f"{expected}\n" and len(expected) > 3, err
    assert "ask.py" in (folder / "README.md").read_text(encoding="utf-8")
    whole = sum(file.stat().st_size for file in folder.iterdir())
    folder = export("--format", "onnx-int8", source=source)
    code, out, err = run(*ask, cwd=tmp_path, PYTHONPATH=str(tmp_path), PYTHONUTF8="1")
    assert code == 0 and out.strip(), err
    assert sum(file.stat().st_size for file in folder.iterdir()) < whole * 0.7


def test_the_exported_model_batches_and_takes_pixels_or_features(export, chat, pictures):
    folder = export(*CODE)
    model = MiniMindVForConditionalGeneration.from_pretrained(folder).eval()
    processor = MiniMindVProcessor.from_pretrained(folder)
    opened = [Image.open(path) for path in pictures[:3]]
    texts = ["<image>\n颜色？", "<image>和<image>\n两张图有什么不同？"]
    output = model.generate(**processor(images=opened, text=texts), max_new_tokens=12, do_sample=False)
    for row, text, own in zip(output, texts, (pictures[:1], pictures[1:3]), strict=True):
        answer = chat.stream(text, own, max_new_tokens=12, temperature=0)
        list(answer)
        assert row[-12:].tolist()[: len(answer.token_ids)] == answer.token_ids and len(answer.token_ids) > 2

    inputs = processor(images=opened[:1], text="颜色？")
    ids = encode_conversations(chat.tokenizer, [as_conversation("颜色？", 1, chat.config)], chat.config)[0][0]
    assert inputs["input_ids"].tolist() == [ids.tolist()]
    features = chat.encoder(torch.stack([read_pixels(pictures[0], chat.encoder.preprocess)]))
    with torch.no_grad():
        by_pixels = model(**inputs).logits
        by_features = model(inputs["input_ids"], image_features=features).logits
    torch.testing.assert_close(by_pixels, by_features, atol=1e-5, rtol=0)


@pytest.mark.parametrize("several", [{"num_return_sequences": 3, "do_sample": True}, {"num_beams": 3}])
def test_every_answer_and_beam_sees_all_pictures_of_its_own_question(export, chat, pictures, several):
    folder = export(*CODE)
    model = MiniMindVForConditionalGeneration.from_pretrained(folder).eval()
    opened = [Image.open(path) for path in pictures[:6]]
    texts = ["<image>和<image>有什么不同？", "没有图片", "<image>颜色？", "<image>、<image>和<image>？"]
    inputs = MiniMindVProcessor.from_pretrained(folder)(images=opened, text=texts)
    features = chat.encode_images(pictures[:6])
    own = [features[0:2], features[2:2], features[2:3], features[3:6]]

    # its score, as `generate` computed it, is that of the answer to its own question about its own pictures
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "output_logits": True, "return_dict_in_generate": True}
    for looking, seen in (
        (model, {"pixel_values": inputs["pixel_values"]}),
        (chat.model, {"image_features": features}),
    ):
        text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        output = looking.generate(**text, **seen, **settings, **{"num_return_sequences": 3, **several})
        assert len(output.sequences) == 12
        transitions = looking.compute_transition_scores(
            output.sequences, output.logits, getattr(output, "beam_indices", None), normalize_logits=True
        )
        for row, ids in enumerate(output.sequences):
            question = text["input_ids"][row // 3][text["attention_mask"][row // 3] == 1]
            whole = torch.cat([question, ids[-6:]])[None]
            with torch.no_grad():
                logits = chat.model(whole, own[row // 3] if len(own[row // 3]) else None).logits[0, -7:-1]
            scores = logits.log_softmax(dim=-1).gather(1, ids[-6:, None])[:, 0]
            torch.testing.assert_close(transitions[row], scores, atol=1e-3, rtol=0)

    # a picture too few is named by its number, not by that of all beams
    with pytest.raises(ValueError, match="5 images were given, but the text has 6 image placeholders"):
        model.generate(**text, image_features=features[:5], **several)


def test_the_folder_works_as_transformers_vision_models_do(export, chat, pictures):
    folder = export(*CODE)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    pipe = pipeline("image-text-to-text", model=str(folder), trust_remote_code=True)
    opened = [Image.open(path) for path in pictures[:3]]

    def answer(turns, images):
        return "".join(chat.stream(turns, images, max_new_tokens=8, temperature=0))

    def say(**inputs):
        output = pipe(**inputs, return_full_text=False, max_new_tokens=8, do_sample=False)
        return [(one[0] if isinstance(one, list) else one)["generated_text"] for one in output]

    # questions: one, and several with a picture each, with marks, and with lists of their own
    files = [str(path) for path in pictures[:3]]
    one, two = answer("颜色？", pictures[:1]), answer("有什么不同？", pictures[1:3])
    assert one != two and say(images=files[0], text="颜色？") == say(images=opened[0], text=["颜色？"]) == [one]
    assert say(images=files[:2], text=["颜色？", "颜色？"]) == [one, answer("颜色？", pictures[1:2])]
    assert say(images=[files[:1], files[1:]], text=["颜色？", "有什么不同？"]) == [one, two]
    assert say(images=files, text=["<image>\n颜色？", "<image>\n<image>\n有什么不同？"]) == [one, two]
    assert say(text="你好") == [answer("你好", ())]

    # chats: pictures as files, OpenAI's data: URLs and Pillow's images, earlier turns, the beginning of an answer
    def message(role, text, *images):
        return {"role": role, "content": [*images, {"type": "text", "text": text}]}

    images = [{"type": "image", "url": files[0]}, part(data_url(pictures[1])), {"type": "image", "image": opened[2]}]
    talk = [message("system", "简短。"), message("user", "颜色？", images[0]), message("assistant", "红色")]
    talk += [message("user", "有什么不同？", *images[1:])]
    turns = [("system", "简短。"), ("user", "<image>\n颜色？"), ("assistant", "红色")]
    turns += [("user", "<image>\n<image>\n有什么不同？")]
    short = [{"role": "user", "content": "你好"}]
    assert say(text=copy.deepcopy(talk)) == [answer(turns, pictures[:3])]
    assert say(text=[copy.deepcopy(talk), short]) == [answer(turns, pictures[:3]), answer("你好", ())]
    begun = processor.apply_chat_template(
        [*short, message("assistant", "红")], tokenize=True, continue_final_message=True
    )
    beginning = chat.tokenizer("红", add_special_tokens=False)["input_ids"]
    assert begun[0].tolist() == [*chat.encode_prompt([("user", "你好")])[0].tolist(), *beginning]

    # the same ids as here, at once and by way of the text
    at_once = processor.apply_chat_template(talk, tokenize=True, return_dict=True, add_generation_prompt=True)
    text = processor.apply_chat_template(talk, add_generation_prompt=True)
    assert text.startswith(
        "简短。<s>user\n<image>\n颜色？</s>\n<s>assistant\n红色</s>\n<s>user\n<image>\n<image>\n有什么"
    )
    in_steps = processor(images=opened, text=text)
    for name in ("input_ids", "attention_mask"):
        assert torch.equal(at_once[name], in_steps[name])
    torch.testing.assert_close(at_once["pixel_values"], in_steps["pixel_values"])
    assert torch.equal(at_once["input_ids"], chat.encode_prompt(turns))

    # what can't be is said in one sentence, by the folder's own BadInput
    for images, texts, says in (
        ([[opened[0]]], ["?", "?"], "1 lists of images were given for 2 questions"),
        (opened, ["?", "?"], "3 images were given, but the 2 questions have 0 <image>"),
        ([[opened[0]], opened[:2]], ["?", "<image>?"], "2 images were given, but the question has 1 <image>"),
    ):
        with pytest.raises(Exception, match=says):
            processor(images=images, text=texts)
    with pytest.raises(Exception, match="only user messages can have pictures, not system messages"):
        processor.apply_chat_template([message("system", "?", {"type": "image"}), *short])
    with pytest.raises(Exception, match="parts of type 'video' are not supported"):
        processor.apply_chat_template([message("user", "?", {"type": "video"})])


def test_every_folder_has_a_chat_template_and_its_card_names_its_languages(export, weights, tiny_clip, tmp_path):
    folder = export(*CODE)
    ours = (ROOT / "model" / "demo" / "chat_template.jinja").read_bytes()
    assert (folder / "chat_template.jinja").read_bytes() == ours
    assert "language: [zh, en]" in (folder / "README.md").read_text(encoding="utf-8")

    # a tokenizer that has none, and one that has it in another place
    tokenizer = tmp_path / "tokenizer"
    shutil.copytree(ROOT / "model" / "demo", tokenizer, ignore=shutil.ignore_patterns("*.jinja", "*.pth"))
    config = json.loads((tokenizer / "tokenizer_config.json").read_text(encoding="utf-8"))
    for template in (None, ours.decode() + "{# other #}"):
        (tokenizer / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}))
        for flags in (CODE, ["--language_model"]):
            folder = tmp_path / f"folder {template is None} {len(flags)}"
            paths = ["--vision_path", tiny_clip, "--tokenizer_path", tokenizer]
            code, _, err = run_python("-m", "model.export", weights, folder, *paths, *flags)
            assert code == 0, err
            written = (folder / "chat_template.jinja").read_text(encoding="utf-8")
            assert written == (template or PUBLISHED_TEMPLATE)


def test_an_exported_llava_s_tokenizer_can_be_exported_once_more(export, weights, tiny_clip, tmp_path):
    first, second = export(), tmp_path / "second"
    paths = ["--vision_path", tiny_clip, "--tokenizer_path", first]
    code, _, err = run_python("-m", "model.export", weights, second, *paths)
    assert code == 0, err
    assert (second / "chat_template.jinja").read_bytes() == (first / "chat_template.jinja").read_bytes()


def test_the_demo_s_heads_are_known_without_the_file_beside_its_weights(export, tokenizer, tmp_path):
    source = save_random_vlm(tmp_path / "96.pth", tokenizer, dim=96, n_heads=6, n_kv_heads=3)
    source.with_suffix(".json").unlink()
    text = json.loads((export("--demo", source=source) / "config.json").read_text())["text_config"]
    assert (text["num_attention_heads"], text["num_key_value_heads"]) == (6, 3)


def test_a_folder_of_earlier_days_loads(export, chat, weights, pictures, tmp_path):
    """As of commit 9d9f35b: fewer fields, code of other names, no chat template, no mean and deviation of pixels."""
    folder = export(*CODE)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for field in ("drop_class_token", "head_dim", "image_chars", "projector", "qk_norm"):
        del config[field]
    names = {"AutoConfig": "LMConfig.LMConfig", "AutoModelForCausalLM": "hub.MiniMindVForConditionalGeneration"}
    config["auto_map"] = {**names, "AutoProcessor": "hub.MiniMindVProcessor"}
    (folder / "config.json").write_text(json.dumps(config))
    processor = {"processor_class": "MiniMindVProcessor", "auto_map": {"AutoProcessor": "hub.MiniMindVProcessor"}}
    (folder / "processor_config.json").write_text(json.dumps({**processor, "image_size": 64, "image_tokens": 5}))
    for file in (*folder.glob("*.py"), folder / "chat_template.jinja"):
        file.unlink()

    expected = "".join(chat.stream("颜色？", pictures[:1], max_new_tokens=20, temperature=0))
    other = Chat(folder, "no clip", "no tokenizer")
    assert "".join(other.stream("颜色？", pictures[:1], max_new_tokens=20, temperature=0)) == expected
    code, _, err = run_python("-m", "model.export", "--reverse", folder, tmp_path / "back.pth")
    assert code == 0 and (tmp_path / "back.pth").read_bytes() == weights.read_bytes(), err


def test_a_folder_without_vision_says_how_to_give_it_some(export, chat, pictures):
    folder = export("--format", "code")
    model = MiniMindVForConditionalGeneration.from_pretrained(folder)
    inputs = MiniMindVProcessor.from_pretrained(folder)(images=[Image.open(pictures[0])], text="颜色？")
    with pytest.raises(ValueError, match=r"set model.vision_encoder = CLIPVisionModel.from_pretrained"):
        model.generate(**inputs, max_new_tokens=2)
    model.vision_encoder = chat.encoder.model
    answer = model.generate(**inputs, max_new_tokens=5, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert answer.tolist() == list(chat.stream("颜色？", pictures[:1], max_new_tokens=5, temperature=0).tokens())


@pytest.mark.parametrize("flags", [[], ["--format", "code"], CODE])
def test_back_to_a_pth_bit_for_bit(export, weights, tmp_path, flags):
    folder = export(*flags)
    back = tmp_path / "back.pth"
    code, out, err = run_python("-m", "model.export", "--reverse", folder, back)
    assert code == 0 and out == f"wrote {back}\n", err
    assert back.read_bytes() == weights.read_bytes()
    assert json.loads(back.with_suffix(".json").read_text()) == json.loads(weights.with_suffix(".json").read_text())


def test_files_of_others_keep_their_numbers_and_their_bias(export, tokenizer, tmp_path):
    sizes = dict(dim=64, n_layers=1, vocab_size=len(tokenizer), vision_width=48)
    source = formula_file(tmp_path / "published.pth", dtype=torch.float16, use_moe=True, **sizes)
    folder = export(source=source)
    run_python("-m", "model.export", "--reverse", folder, tmp_path / "back.pth")
    before, after = (torch.load(path, weights_only=True) for path in (source, tmp_path / "back.pth"))
    assert list(before) == list(after) and "vision_proj.vision_proj.0.bias" in after
    assert all(after[name].dtype == torch.float16 and torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("flags", [[], CODE])
def test_chat_and_page_take_the_folder_and_run_no_code_of_it(export, chat, pictures, tmp_path, monkeypatch, flags):
    folder = export(*flags)
    for file in folder.glob("*.py"):
        file.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n" + file.read_text(encoding="utf-8"), encoding="utf-8")
    wanted = "".join(chat.stream("颜色？", pictures[:1], max_new_tokens=20, temperature=0))
    other = Chat(folder, "no clip", "no tokenizer")
    assert "".join(other.stream("颜色？", pictures[:1], max_new_tokens=20, temperature=0)) == wanted
    monkeypatch.chdir(ROOT)
    client = create_app("--weights", str(folder), "--device", "cpu", "--temperature", "0").test_client()
    body = {"messages": question("颜色？", data_url(pictures[0])), "max_tokens": 20}
    reply = client.post("/v1/chat/completions", json=body).get_json()
    assert reply["model"] == folder.name and reply["choices"][0]["message"]["content"] == wanted
    assert not (tmp_path / "ran").exists()


def test_what_can_t_be_exported_is_said_in_one_line(export, weights, tiny_clip, tokenizer, tmp_path):
    paths = ["--vision_path", tiny_clip, "--tokenizer_path", "model/demo"]
    sizes = dict(dim=64, n_layers=1, vocab_size=len(tokenizer))
    llm = formula_file(tmp_path / "64_llm.pth", projector=False, **sizes)
    wide = formula_file(tmp_path / "wide.pth", vision_width=1024, **sizes)
    (tmp_path / "wide.json").write_text("{}")
    moe = formula_file(tmp_path / "moe.pth", vision_width=48, use_moe=True, **sizes)
    broken = export()
    (broken / "model.safetensors").write_bytes((broken / "model.safetensors").read_bytes()[:-100])
    for arguments, says in (
        ([llm, tmp_path / "new", *paths], "without a vision projector"),
        ([wide, tmp_path / "new", *paths], "vision_width 1024, expected 48"),
        ([tmp_path / "nothing.pth", tmp_path / "new", *paths], "nothing.pth not found"),
        (["--reverse", weights, tmp_path / "new.pth"], "is not a folder"),
        (["--reverse", broken, tmp_path / "new.pth"], "is truncated, or not a file of weights"),
        ([moe, tmp_path / "new", *paths, "--format", "llava"], "moe.pth has experts, which a LLaVA can't express"),
        ([moe, tmp_path / "new", *paths, "--format", "onnx"], "moe.pth has experts, which ONNX Runtime can't run"),
        (
            [weights, tmp_path / "new", "--language_model", "--format", "onnx"],
            "--format is for exporting a whole model",
        ),
        ([weights, llm, *paths], "64_llm.pth would become a folder: to write the .pth file of a folder, add --reverse"),
        ([weights, tmp_path / "wide.json", *paths], "wide.json could not be written (File exists)"),
    ):
        code, _, err = run_python("-m", "model.export", *arguments)
        assert code == 1 and says in err and err.count("\n") == 1, err
    assert not (tmp_path / "new").exists() and not (tmp_path / "new.pth").exists()
