"""How fast a random model of a published size decodes: `Chat.stream` against other manners, and in 8 bits.

    python tests/benchmarks/bench_decode.py                          # 512+8, on the GPU if there is one
    python tests/benchmarks/bench_decode.py --dim 768 --n_layers 16 --device cpu
    python tests/benchmarks/bench_decode.py --device cpu --beside llama.cpp   # pip install -r tests/benchmarks/requirements.txt

In a temporary folder it makes a random ViT-B/32, a tokenizer of 6,400 tokens and random weights. Every manner writes 128
tokens, greedily, after the same question about one picture; of five runs the fastest counts. The last line is JSON: its roof
is the tokens/s at which every weight is read once a token, as fast as this machine copies, its peak the memory of loading and
streaming alone, on a GPU without what CUDA itself takes.

    no cache      a forward over everything for every token
    plain loop    as one writes it first: a forward per token, its cache made anew by `cat` for every token
    generate      transformers' own, with its default cache
    stream        Chat.stream, the picture's way through CLIP included in the time to the first token; on a CPU by ONNX
                  Runtime where it is installed, and once more by PyTorch
    stream int8   the same with --quantize int8, for which ONNX Runtime is needed
    ... of 8      eight such questions at once, tokens of all of them counted
    ... of 64     64 of them at once, 24 tokens each, as in scoring; the time for reading the questions counts, too

--beside llama.cpp writes the same weights as GGUF files and has llama.cpp answer, with as many threads, in turns with
`Chat.stream`. Both get the same token ids: a question of the same length without a picture, as llama.cpp has no CLIP here.
In these rows "same tokens" are those of "stream, text", and llama.cpp's figures are those that it reports itself.
"""

import argparse
import contextlib
import importlib.util
import json
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from made_up import make_files, make_model, peak_memory, roofs  # puts the repository on the path

from model.chat import Chat
from model.checkpoint import load_tokenizer, save_weights
from model.conversation import as_conversation, tokenizer_fields
from model.errors import BadInput, run_script
from model.LMConfig import LMConfig

TOKENS = 128
QUESTION = "bado nu kipa?"
TEXT_QUESTION = "." * 50 + "\n" + QUESTION  # as many tokens as with a picture's 50: this tokenizer joins no dots


class CatCache:
    """The cache as one writes it first: the whole of it is copied for every token."""

    def __init__(self, layers):
        self.keys, self.values = [None] * layers, [None] * layers

    def update(self, k, v, layer_idx):
        if self.keys[layer_idx] is not None:
            k, v = torch.cat([self.keys[layer_idx], k], dim=2), torch.cat([self.values[layer_idx], v], dim=2)
        self.keys[layer_idx], self.values[layer_idx] = k, v
        return k, v

    def get_seq_length(self):
        return 0 if self.keys[0] is None else self.keys[0].shape[2]

    def get_mask_sizes(self, query_length, layer_idx):
        return self.get_seq_length() + query_length, 0


@torch.inference_mode()
def no_cache(chat, input_ids, features):
    first, begun = input_ids.shape[1], time.perf_counter()
    while input_ids.shape[1] < first + TOKENS:
        logits = chat.model(input_ids, features, logits_to_keep=1).logits[:, -1]
        input_ids = torch.cat([input_ids, logits.argmax(dim=-1, keepdim=True)], dim=1)
    return input_ids[0, first:].tolist(), TOKENS / (time.perf_counter() - begun), None


@torch.inference_mode()
def plain_loop(chat, input_ids, features):
    cache = CatCache(chat.config.n_layers)
    logits = chat.model(input_ids, features, past_key_values=cache, logits_to_keep=1).logits[:, -1]
    ids, begun = [], time.perf_counter()
    while True:
        new = logits.argmax(dim=-1, keepdim=True)
        ids.append(new.item())
        if len(ids) == TOKENS:
            return ids, (TOKENS - 1) / (time.perf_counter() - begun), None
        logits = chat.model(new, past_key_values=cache).logits[:, -1]


def generate(chat, input_ids, features, tokens=TOKENS):
    options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
    begun = time.perf_counter()
    output = chat.model.generate(input_ids, image_features=features, **options)
    seconds = time.perf_counter() - begun
    return output[0, input_ids.shape[1] :].tolist(), len(input_ids) * tokens / seconds, None


@contextlib.contextmanager
def no_end(chat):
    """Meanwhile no token ends an answer."""
    chat.config.eos_token_id, eos = -1, chat.config.eos_token_id
    yield
    chat.config.eos_token_id = eos


def stream(chat, pixels, tokens=TOKENS, question=QUESTION):
    images = [] if pixels is None else [pixels]
    answer = chat.stream(question, images, max_new_tokens=tokens, temperature=0)
    with no_end(chat):
        list(answer.tokens())
    return answer.token_ids, answer.tokens_per_second, answer.first_token_seconds


def score_64(chat, input_ids, features, tokens=24):
    begun = time.perf_counter()
    with no_end(chat):
        chat.answer_all(input_ids.tolist() * 64, [features] * 64, batch_size=64, max_new_tokens=tokens)
    return None, 64 * tokens / (time.perf_counter() - begun), None


def best(run, *inputs, times=5):
    """The fastest of several runs: (token ids, tokens/s, seconds to the first token)."""
    return max((run(*inputs) for _ in range(times)), key=lambda result: result[1])


def beside_llama_cpp(folder, chat, int8_chat):
    """Rows of `Chat.stream` and of llama.cpp after a question without a picture; of five answers, in turns, the fastest."""
    import llama_cpp  # with packages that nothing else here needs

    ids = chat.encode_prompt(as_conversation(TEXT_QUESTION, 0, chat.config))[0].tolist()
    runs = {
        "stream, text": partial(stream, chat, None, question=TEXT_QUESTION),
        "stream int8, text": partial(stream, int8_chat, None, question=TEXT_QUESTION),
    }
    for name in llama_cpp.TYPES:
        server = llama_cpp.serve(folder / f"{name}.gguf", chat.model, name)
        runs[f"llama.cpp {name}"] = partial(llama_cpp.answer, server, ids, TOKENS)
    rounds = [{label: run() for label, run in runs.items()} for _ in range(5)]
    return {label: max((each[label] for each in rounds), key=lambda result: result[1]) for label in runs}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--n_layers", type=int, default=8)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--beside", choices=["llama.cpp"], help="also the same model in another engine")
    args = parser.parse_args()
    if args.beside and (args.device, args.dtype) != ("cpu", "float32"):
        raise BadInput(f"--beside {args.beside} compares float32 and 8 bits on a CPU: use --device cpu --dtype float32")
    if args.beside and not all(map(importlib.util.find_spec, ("gguf", "xllamacpp", "onnxruntime", "onnx"))):
        raise BadInput(f"--beside {args.beside} needs packages: pip install -r tests/benchmarks/requirements.txt")
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_files(folder, 1)
        tokenizer = load_tokenizer(folder / "tokenizer")
        config = LMConfig(dim=args.dim, n_layers=args.n_layers, **tokenizer_fields(tokenizer))
        save_weights(folder / "weights.pth", make_model(config), tokenizer)

        def load(**options):
            chat = Chat(
                folder / "weights.pth",
                folder / "clip",
                folder / "tokenizer",
                args.device,
                getattr(torch, args.dtype),
                **options,
            )
            chat.warm_up()
            return chat

        chat = load()
        pixels = torch.randint(0, 256, (3, 224, 224), dtype=torch.uint8)
        with torch.inference_mode():
            features = chat.encode_images([pixels])
        input_ids = chat.encode_prompt(as_conversation(QUESTION, 1, chat.config))
        rows = {"stream": best(stream, chat, pixels)}
        peak = peak_memory(args.device)
        rows["score of 64"] = best(score_64, chat, input_ids, features, times=3)
        if chat.sessions is not None:
            chat.sessions = None
            rows["stream, PyTorch"] = best(stream, chat, pixels)
            rows["score of 64, PyTorch"] = best(score_64, chat, input_ids, features, times=3)
        for manner in (no_cache, plain_loop, generate):
            rows[manner.__name__.replace("_", " ")] = best(manner, chat, input_ids, features)
        eight = input_ids.expand(8, -1), features.expand(8, -1, -1)
        rows["generate of 8"] = best(generate, chat, *eight)
        read = sum(weights.nbytes for weights in chat.model.parameters()) - chat.model.tok_embeddings.weight.nbytes
        _, copy = roofs(args.device, chat.dtype)
        if "stream, PyTorch" in rows:
            int8_chat = load(int8=True)
            rows["stream int8"] = best(stream, int8_chat, pixels)
            rows["score of 64, int8"] = best(score_64, int8_chat, input_ids, features, times=3)
            del int8_chat
        beside = beside_llama_cpp(folder, load(), load(int8=True)) if args.beside else {}
    rows |= beside
    base_ids, base_rate, _ = rows["plain loop"]
    print(f"{'manner':<22}{'tokens/s':>10}{'ratio':>8}{'first token':>14}{'same tokens':>14}")
    for label, (ids, rate, first) in rows.items():
        expected = beside["stream, text"][0] if label in beside else base_ids
        same = "" if ids is None else f"{sum(a == b for a, b in zip(ids, expected, strict=True)) / TOKENS:.0%}"
        first = f"{first * 1000:.0f} ms" if first else ""
        print(f"{label:<22}{rate:>10.1f}{rate / base_rate:>8.2f}{first:>14}{same:>14}")
    result = {
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "config": f"{args.dim}+{args.n_layers}, {args.dtype}",
        "prompt_tokens": input_ids.shape[1],
        "tokens_per_s": {label: round(rate, 1) for label, (_, rate, _) in rows.items()},
        "roof_tokens_per_s": round(copy / read, 1),
        "first_token_ms": {label: round(first * 1000) for label, (_, _, first) in rows.items() if first},
        "peak_mb": round(peak / 1e6),
    }
    if beside:
        rates = result["tokens_per_s"]
        result["ratio_to_llama_cpp"] = {
            "float32": round(rates["stream, text"] / rates["llama.cpp float32"], 2),
            "8 bits": round(rates["stream int8, text"] / rates["llama.cpp Q8_0"], 2),
        }
    print(json.dumps(result))


if __name__ == "__main__":
    run_script(main)
