"""A folder that answers with ONNX Runtime alone: no PyTorch, no transformers.

python -m model.export out/512_vlm_sft.pth FOLDER --format onnx      # or --format onnx-int8

vision.onnx           normalised pixels (N, 3, S, S)     ->  image embeddings (N, P, D), encoder and projector in one
language_model.onnx   embeddings (1, T, D) and a cache   ->  logits (1, vocab_size) of the last token, and the cache
embeddings.npy        a row of D numbers for each token
ask.py                the program that uses them, greedily: python FOLDER/ask.py PICTURE QUESTION
settings.json         sizes, how pictures become pixels, and the form of a prompt
"""

import numpy as np

from .conversation import encode, frames
from .errors import BadInput
from .files import write_json
from .onnx_graphs import add_projector, has_runtime, language_graph, vision_graph

ASK = '''\
"""Asks the model in this folder about a picture: python ask.py PICTURE QUESTION (pip install onnxruntime numpy pillow tokenizers)"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps
from tokenizers import Tokenizer

MOST_TOKENS = 256  # of an answer
if len(sys.argv) != 3:
    sys.exit("usage: python ask.py PICTURE QUESTION")
folder = Path(__file__).parent
settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
tokenizer.encode_special_tokens = True  # "</s>" in a question is text
embeddings = np.load(folder / "embeddings.npy", mmap_mode="r")  # (vocab_size, D)
vision, language_model = (
    onnxruntime.InferenceSession(folder / name, providers=["CPUExecutionProvider"])
    for name in ("vision.onnx", "language_model.onnx")
)

# the picture, on white where it is transparent, squeezed to a square, as embeddings (P, D)
try:
    picture = ImageOps.exif_transpose(Image.open(sys.argv[1]))
except OSError as error:
    sys.exit(f"{sys.argv[1]} could not be read as a picture: {error}")
if picture.has_transparency_data:
    picture = picture.convert("RGBA")
    picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
picture = picture.convert("RGB")
picture = picture.resize([settings["image_size"]] * 2, settings["resample"])
pixels = (np.asarray(picture, np.float32) / 255 - settings["image_mean"]) / settings["image_std"]
(image_embeddings,) = vision.run(None, {"pixels": pixels.transpose(2, 0, 1)[None].astype(np.float32)})

# the prompt: placeholder and question within the form that the model knows, and the picture over the placeholder
ids = settings["before"] + tokenizer.encode(f"\\n{sys.argv[2]}", add_special_tokens=False).ids + settings["after"]
if len(ids) >= settings["max_seq_len"]:
    sys.exit(f"the question has {len(ids)} tokens, the model reads at most {settings['max_seq_len']}")
x = np.array(embeddings[ids])  # (T, D)
start = settings["picture_at"]
x[start : start + len(image_embeddings[0])] = image_embeddings[0]

# angles of the rotary embedding, and an empty cache of keys and values, whose shapes the graph names
length = min(len(ids) + MOST_TOKENS, settings["max_seq_len"])
angles = np.arange(length)[:, None] * settings["rope_theta"] ** (-np.arange(0, settings["head_dim"], 2) / settings["head_dim"])
inputs = {"cos": np.cos(angles).astype(np.float32), "sin": np.sin(angles).astype(np.float32)}
cache = [one.name for one in language_model.get_inputs() if one.name.startswith(("keys", "values"))]
empty = np.zeros((1, settings["n_kv_heads"], length, settings["head_dim"]), np.float32)
values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(empty.copy()) for name in cache}

# the prompt first, then one token at a time; old and new cache are the same memory
binding = language_model.io_binding()
for name, value in values.items():
    binding.bind_ortvalue_input(name, value)
    binding.bind_ortvalue_output(f"new_{name}", value)
answer, filled = [], 0
while filled + len(x) < length:
    filled += len(x)
    inputs |= {"embeddings": x[None], "last": np.array([len(x) - 1])}
    inputs |= {"lengths": np.array([filled - 1], np.int32), "longest": np.array(filled, np.int32)}  # GroupQueryAttention's
    for name, value in inputs.items():
        binding.bind_cpu_input(name, value)
    binding.bind_output("logits")
    language_model.run_with_iobinding(binding)
    token = int(binding.get_outputs()[-1].numpy().argmax())  # the logits, as they were bound last
    if token == settings["eos_token_id"]:
        break
    answer.append(token)
    x = np.array(embeddings[[token]])
print(tokenizer.decode(answer))
'''


def export_onnx(folder, parts, int8):
    """Writes the graphs, the embeddings, and the program that asks them. BadInput if ONNX isn't installed, or if there are experts."""
    if not has_runtime():
        raise BadInput("--format onnx needs ONNX Runtime: pip install onnxruntime onnx")
    model, encoder, tokenizer = parts.model, parts.encoder, parts.tokenizer
    config, preprocess = model.config, encoder.preprocess
    language = language_graph(model, int8)  # refuses experts before anything is written
    language.save(folder / "language_model.onnx")
    add_projector(vision_graph(encoder.model, int8), encoder, model.vision_proj).save(folder / "vision.onnx")
    np.save(folder / "embeddings.npy", model.tok_embeddings.weight.detach().float().numpy())

    # the ids of a prompt before and after a question, and where the picture begins in them
    before, after = (
        [one for piece in gap for one in (encode(tokenizer, [piece])[0] if isinstance(piece, str) else piece)]
        for gap in frames(tokenizer, ("user",))
    )
    settings = {
        "image_size": preprocess.size,
        "resample": int(preprocess.resample),
        "image_mean": preprocess.mean,
        "image_std": preprocess.std,
        **{
            name: getattr(config, name)
            for name in ("n_kv_heads", "head_dim", "rope_theta", "max_seq_len", "eos_token_id")
        },
        "before": [*before, *config.image_ids],
        "after": after,
        "picture_at": len(before),
    }
    write_json(folder / "settings.json", settings)
    (folder / "ask.py").write_text(ASK, encoding="utf-8")
