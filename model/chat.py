"""A trained model that answers: load it, stream an answer, see where it looked, or answer many questions in batches."""

import argparse
import json
import random
import time
import warnings
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from dataset.records import parse_record, read_records

from .arguments import model_sizes, pick_dtype
from .checkpoint import load_tokenizer, load_vlm, read_notes, tokenizer_warning, weights_name
from .conversation import as_conversation, encode_conversations, tokenizer_fields
from .errors import BadInput
from .images import read_frames, read_pixels
from .LMConfig import LMConfig
from .model import rotary_turns
from .model_vlm import cover, find_placeholders
from .vision_utils import has_vision, load_vision


class Setting(NamedTuple):
    """What a person may choose of how an answer is drawn."""

    kind: type
    least: float
    most: float
    default: float | None
    help: str

    def read(self, name, value):
        """A number, or text that stands for one, as this setting's value; BadInput if it is none or out of range."""
        try:
            number = self.kind(value)
            fraction = isinstance(value, float) and number != value
            if isinstance(value, bool) or fraction or not self.least <= number <= self.most:
                raise ValueError
        except (TypeError, ValueError, OverflowError):
            what = "a whole number" if self.kind is int else "a number"
            raise BadInput(f"{name} should be {what} from {self.least} to {self.most}, not {value!r:.50}") from None
        return number


SETTINGS = {
    "max_new_tokens": Setting(int, 1, 100_000, 256, "longest answer in tokens, the question not counted"),
    "temperature": Setting(float, 0, 2, 0.5, "0 always takes the likeliest token; the higher, the more varied"),
    "top_k": Setting(int, 0, 100_000, 8, "draw only from this many likeliest tokens; 0 for all"),
    "top_p": Setting(float, 0, 1, 1.0, "draw only from the likeliest tokens that together have this probability"),
    "repetition_penalty": Setting(float, 0.1, 10, 1.0, "above 1, tokens that were there before become less likely"),
    "seed": Setting(int, 0, 2**63 - 1, None, "the same seed draws the same answer (default: another each time)"),
}


def add_chat_arguments(parser):
    """The arguments of a program that answers: which weights, and how answers are drawn."""
    parser.add_argument(
        "--weights",
        help="a .pth file or a transformers folder (default: stage 2's, or with --multi stage 3's, in out_dir)",
    )
    parser.add_argument(
        "--max_frames",
        type=int,
        default=8,
        help="frames taken of a clip, as many as the context holds (default %(default)s)",
    )
    parser.add_argument("--quantize", choices=["int8"], help="keep weights in 8 bits (CPU only)")
    for name, setting in SETTINGS.items():
        default = "" if setting.default is None else " (default %(default)s)"
        parser.add_argument(
            f"--{name}", default=setting.default, type=partial(read_flag, name), help=setting.help + default
        )


def read_flag(name, text):
    """A setting's value on the command line."""
    try:
        return SETTINGS[name].read(name, text)
    except BadInput as problem:
        raise argparse.ArgumentTypeError(str(problem)) from None


def settings_of(args):
    """The options of `Chat.stream` that were chosen on the command line."""
    return {name: getattr(args, name) for name in SETTINGS}


class Chat:
    """Model, tokenizer and CLIP, ready to answer. Nothing of a request is kept here, so that threads can share it."""

    def __init__(
        self,
        weights,
        vision_path,
        tokenizer_path,
        device="cpu",
        dtype=torch.float32,
        int8=False,
        max_frames=8,
        **sizes,
    ):
        """weights: a .pth file, or a transformers folder, whose own tokenizer and CLIP, if it has them, go before the others.

        int8: store the matrices of the language model and of CLIP in 8 bits (CPU only).
        max_frames: how many frames of a clip are looked at; fewer if the context doesn't hold them.
        sizes: LMConfig fields, for weights that come without a config of their own. BadInput says what is missing.
        `loaded` is a line about what was loaded, and a warning if there is one.
        """
        weights = Path(weights)
        if (weights / "tokenizer.json").exists():
            tokenizer_path = weights
        if has_vision(weights):
            vision_path = weights
        notes = read_notes(weights)
        self.name = weights.name.removesuffix(".pth")
        self.tokenizer = load_tokenizer(tokenizer_path)
        self.encoder = load_vision(vision_path, device, dtype)
        config = LMConfig(**{**sizes, **notes.get("config", {}), **tokenizer_fields(self.tokenizer)})
        config.vision_width, config.image_tokens = self.encoder.vision_width, self.encoder.image_tokens
        model, loaded = load_vlm(weights, config, self.tokenizer)
        self.loaded = "\n".join(filter(None, [loaded, tokenizer_warning(weights, self.tokenizer)]))
        self.model = model.to(device=device, dtype=dtype).eval()
        self.parameters = sum(parameter.numel() for parameter in self.model.parameters())
        self.config, self.device, self.dtype = config, torch.device(device), dtype
        self.max_frames = max(1, min(max_frames, config.max_seq_len // config.image_tokens - 1))  # and room for words
        if int8:
            quantize(self.model, self.device)
            quantize(self.encoder.model, self.device)
        elif self.device.type == "cpu":
            RowLinear.put_into(self.model)

    @classmethod
    def from_arguments(cls, args):
        """The model that the command line asks for. BadInput says which stage to run where its weights are missing."""
        weights = args.weights
        if not weights:
            weights = Path(args.out_dir) / weights_name(args, "vlm_sft_multi" if args.multi else "vlm_sft")
            if args.demo and not weights.exists():
                stages = "python 1-pretrain_vlm.py --demo && python 2-sft_vlm.py --demo"
                more = " && python 2-sft_vlm.py --demo --multi" if args.multi else ""
                raise BadInput(f"{weights} not found: train the demo first, with {stages}{more}")
        dtype, int8 = pick_dtype(args.dtype, args.device), args.quantize == "int8"
        return cls(
            weights,
            args.vision_path,
            args.tokenizer_path,
            args.device,
            dtype,
            int8,
            args.max_frames,
            **model_sizes(args),
        )

    def prompt(self, turns):
        """Token ids (1, T) of a conversation that ends with a question. BadInput if no answer would fit behind it."""
        ids = encode_conversations(self.tokenizer, [turns], self.config)[0][0]
        if len(ids) >= self.config.max_seq_len:
            raise BadInput(f"the question has {len(ids)} tokens, the model reads at most {self.config.max_seq_len}")
        return torch.from_numpy(ids)[None].to(self.device)

    def look(self, files):
        """Files of pictures and clips as one list of pixels: each picture, and up to `max_frames` frames of each clip."""
        return [pixels for file in files for pixels in read_frames(file, self.encoder.image_size, self.max_frames)]

    def pixels(self, images):
        """Picture files, or pixels from `to_pixels`, as one uint8 tensor (N, 3, S, S)."""
        size = self.encoder.image_size
        return torch.stack([image if torch.is_tensor(image) else read_pixels(image, size) for image in images])

    def see(self, images):
        """Picture files or pixels -> features (N, P, V), in one forward; None for no pictures."""
        return self.encoder(self.pixels(images)).to(self.dtype) if len(images) else None

    def stream(
        self,
        text,
        images=(),
        max_new_tokens=256,
        temperature=0.5,
        top_k=8,
        top_p=1.0,
        repetition_penalty=1.0,
        seed=None,
        stop=(),
        stop_event=None,
    ):
        """Begins an answer: an `Answer`, to be iterated.

        text: the question, or a conversation of (role, text) turns that ends with one and has an `<image>` for each image.
        images: picture files, or pixels (3, S, S) from `to_pixels`.
        temperature 0 (or below 0.01) takes the likeliest token; top_k 0 and top_p 1 leave every token in play.
        seed: the same seed gives the same answer; None draws another each time.
        stop: texts before which the answer ends. stop_event: ends it once its `is_set()` is true.
        BadInput if images and `<image>` differ in number, if a picture can't be read, or if the question is too long.
        """
        turns = as_conversation(text, len(images), self.config) if isinstance(text, str) else text
        drawn = temperature >= 0.01
        steps = LogitsProcessorList()
        if repetition_penalty != 1:
            steps.append(RepetitionPenaltyLogitsProcessor(repetition_penalty))
        if drawn:
            steps.append(TemperatureLogitsWarper(float(temperature)))
            if top_k:
                steps.append(TopKLogitsWarper(top_k))
            if top_p < 1:
                steps.append(TopPLogitsWarper(top_p))
        dice = None
        if drawn:
            dice = torch.Generator(self.device)
            dice.seed() if seed is None else dice.manual_seed(seed)
        pixels = self.pixels(images) if len(images) else ()
        return Answer(self, self.prompt(turns), pixels, max_new_tokens, steps, dice, stop, stop_event)

    def warm_up(self):
        """One short answer about a blank picture, so that the first visitor waits no longer than the second."""
        blank = torch.zeros(3, self.encoder.image_size, self.encoder.image_size, dtype=torch.uint8)
        list(self.stream("?", [blank], max_new_tokens=2))

    @torch.inference_mode()
    def attention(self, turns, images, token_ids):
        """How the model spread its attention over the pictures as it wrote each token: (layers, A, N, P).

        turns, images: the question, as in `stream`; token_ids: the A tokens of its answer. Each value is the share of
        attention, averaged over heads, that the position which predicted the token paid to one vector of one picture;
        a row sums to less than 1, as the text before it gets the rest. Only these A rows are ever computed, not T x T.
        """
        input_ids = self.prompt(turns)
        first = input_ids.shape[1] - 1  # the last position of the question predicts the first token of the answer
        written = torch.tensor([token_ids[:-1]], dtype=torch.long, device=self.device)
        x = torch.cat([self.model.embed(input_ids, self.see(images)), self.model.tok_embeddings(written)], dim=1)
        places = torch.arange(x.shape[1], device=self.device)
        rotary = rotary_turns(places[None], self.config.head_dim, self.config.rope_theta)
        future = places > places[first:, None]  # (A, T)
        starts = find_placeholders(input_ids, self.config.image_ids)
        on_image = cover(starts, len(images), self.config.image_tokens)
        maps = []
        for layer in self.model.layers:
            q, k, _ = layer.attention.project(layer.attention_norm(x), rotary)
            k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)  # (1, H, T, C)
            scores = q[0, :, first:] @ k[0].mT / self.config.head_dim**0.5  # (H, A, T)
            shares = scores.float().masked_fill(future, -torch.inf).softmax(dim=-1).mean(dim=0)  # (A, T)
            maps.append(shares[:, on_image].unflatten(1, (-1, self.config.image_tokens)))
            x, _ = layer(x, rotary, None, None, None)
        return torch.stack(maps)

    @torch.inference_mode()
    def answer_all(self, prompts, features, batch_size=64, max_new_tokens=48):
        """Greedy answers to many questions at once.

        prompts: lists of token ids; features: for each, its pictures (n, P, V). Returns a list of texts, in order.
        """
        answers = [None] * len(prompts)
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # like lengths, little padding
        for begin in range(0, len(order), batch_size):
            chosen = order[begin : begin + batch_size]
            width = max(len(prompts[i]) for i in chosen)
            input_ids = torch.tensor([[0] * (width - len(prompts[i])) + prompts[i] for i in chosen], device=self.device)
            mask = torch.tensor(
                [[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in chosen], device=self.device
            )
            output = self.model.generate(
                input_ids,
                attention_mask=mask,
                image_features=torch.cat([features[i] for i in chosen]),
                max_new_tokens=max_new_tokens,
                do_sample=False,
            )
            for i, ids in zip(chosen, output[:, width:].tolist(), strict=True):
                answers[i] = self.tokenizer.decode(ids, skip_special_tokens=True)
        return answers


def quantize(model, device):
    """Puts PyTorch's dynamically quantised layer in place of each linear one: weights in 8 bits, with one scale a row."""
    if device.type != "cpu":
        raise BadInput(f"--quantize int8 is for CPUs, and the model is on {device}: use --device cpu")
    try:
        from torch.ao.quantization import per_channel_dynamic_qconfig, quantize_dynamic
    except ImportError:
        raise BadInput(
            f"PyTorch {torch.__version__} has no torch.ao.quantization any more: install the version of requirements.txt"
        ) from None
    for parameter in model.parameters():  # a single float32 tensor left would keep the file it is mapped from in memory
        parameter.data = parameter.data.clone()
    # it warns that torchao is to take its place one day; that is slower on a CPU now (tests/benchmarks/LOG.md)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantize_dynamic(model, {nn.Linear: per_channel_dynamic_qconfig}, inplace=True)


def by_vector(x, weight):
    """x (1, 1, in) times weight (out, in) -> (1, 1, out), as a matrix times a vector."""
    return torch.mv(weight, x.flatten())[None, None]


def by_slices(x, weight, slices=8):
    """The same by slices of the matrix, all in one batched product."""
    column = x.view(1, -1).t().expand(slices, -1, 1)  # (slices, in, 1), with strides that take the fast way
    return torch.bmm(weight.view(slices, -1, weight.shape[1]), column).view(1, 1, -1)


class RowLinear(nn.Linear):
    """`nn.Linear` that multiplies a single row, as in decoding, in the way that is fastest on this CPU.

    The numbers are the same but for rounding. Which way runs on one core alone, and which reads memory at a third of its
    speed, differs with the CPU's maker and the precision (tests/benchmarks/LOG.md), so all are tried when a model is loaded.
    """

    def forward(self, x):
        return self.way(x, self.weight) if x.numel() == self.in_features else super().forward(x)

    @classmethod
    @torch.inference_mode()
    def put_into(cls, model):
        """Makes the linear layers of a model these, but for those with a bias or an odd width, if that is faster."""
        layers = [module for module in model.modules() if type(module) is nn.Linear]
        layers = [layer for layer in layers if layer.bias is None and layer.out_features % 8 == 0]
        rows = [layer.weight.new_ones(1, 1, layer.in_features) for layer in layers]

        def seconds(way):
            """To multiply all matrices once."""
            begun = time.perf_counter()
            for layer, row in zip(layers, rows, strict=True):
                way(row, layer.weight)
            return time.perf_counter() - begun

        times = {way: min(seconds(way) for _ in range(4)) for way in (F.linear, by_vector, by_slices)}
        fastest = min(times, key=times.get)
        if times[fastest] < 0.8 * times[F.linear]:  # a choice by less would hang on chance, and so would rounding
            for layer in layers:
                layer.__class__, layer.way = cls, fastest


class KVCache:
    """Keys and values of one conversation, in memory reserved once; a caller of `update` gets views, never copies.

    The three methods are those of transformers' caches that the model calls.
    """

    def __init__(self, config: LMConfig, length, device, dtype):
        shape = (config.n_layers, 2, 1, config.n_kv_heads, length, config.head_dim)
        self.memory = torch.empty(shape, device=device, dtype=dtype)
        self.filled = [0] * config.n_layers

    def update(self, k, v, layer_idx):
        """Appends keys and values (1, K, T, C) of one layer; returns all of them so far, (1, K, S, C) each."""
        begin, end = self.filled[layer_idx], self.filled[layer_idx] + k.shape[2]
        keys, values = self.memory[layer_idx]
        keys[:, :, begin:end], values[:, :, begin:end] = k, v
        self.filled[layer_idx] = end
        return keys[:, :, :end], values[:, :, :end]

    def get_seq_length(self):
        return self.filled[0]

    def get_mask_sizes(self, query_length, layer_idx):
        return self.filled[layer_idx] + query_length, 0


class Answer:
    """An answer as it is written: iterating yields pieces of text, whole characters each.

    prompt_tokens: length of the question. token_ids: the answer so far, without `</s>`.
    finish_reason: None until the end, then "stop" (`</s>`, or a stop text), "length" (max_new_tokens), "context" (the
    model can read no more) or "cancelled" (stop_event).
    first_token_seconds: from the beginning of the iteration to the first token, CLIP included. tokens_per_second: of all
    later ones, `</s>` counted; None until there are some.
    """

    def __init__(self, chat, input_ids, pixels, max_new_tokens, steps, dice, stop, stop_event):
        self.chat, self.pixels = chat, pixels
        self.prompt_tokens = input_ids.shape[1]
        room = chat.config.max_seq_len - self.prompt_tokens
        self.limit = min(max_new_tokens, room)
        self.at_limit = "context" if room < max_new_tokens else "length"
        self.steps, self.dice, self.stop, self.stop_event = steps, dice, stop, stop_event
        self.ids = torch.empty(1, self.prompt_tokens + self.limit, dtype=torch.long, device=chat.device)
        self.ids[:, : self.prompt_tokens] = input_ids
        self.token_ids = []
        self.finish_reason = self.first_token_seconds = self.tokens_per_second = None

    def __iter__(self):
        return before(self.stop, self.characters(), self.end) if self.stop else self.characters()

    def end(self):
        self.finish_reason = "stop"

    def characters(self):
        """Pieces of text; the bytes of a character that several tokens make are held back until it is whole."""
        pending, shown = [], 0
        for token in self.tokens():
            pending.append(token)
            text = self.decode(pending)
            whole = text.removesuffix("\ufffd")  # what this stands for may still become a character
            if len(whole) > shown:
                yield whole[shown:]
            pending, shown = ([], 0) if whole == text else (pending, len(whole))
        if pending:
            yield self.decode(pending)[shown:]

    def decode(self, ids):
        return self.chat.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    @torch.inference_mode()
    def tokens(self):
        """Token ids one by one, until one of the ends."""
        chat, length, begun = self.chat, self.prompt_tokens, time.perf_counter()
        cache = KVCache(chat.config, self.ids.shape[1], chat.device, chat.dtype)
        new, features = self.ids[:, :length], chat.see(self.pixels)
        while length < self.ids.shape[1]:
            if self.stop_event is not None and self.stop_event.is_set():
                self.finish_reason = "cancelled"
                return
            logits = chat.model(new, features, past_key_values=cache, logits_to_keep=1).logits[:, -1]
            self.ids[:, length] = self.choose(self.steps(self.ids[:, :length], logits.float()))
            new, features = self.ids[:, length : length + 1], None
            length += 1
            token = new.item()
            seconds = time.perf_counter() - begun
            if self.first_token_seconds is None:
                self.first_token_seconds = seconds
            else:
                self.tokens_per_second = (length - self.prompt_tokens - 1) / (seconds - self.first_token_seconds)
            if token == chat.config.eos_token_id:
                self.finish_reason = "stop"
                return
            self.token_ids.append(token)
            yield token
        self.finish_reason = self.at_limit

    def choose(self, scores):
        """The next token (1,) from scores (1, vocab_size): drawn, or the likeliest where there are no dice."""
        if self.dice is None:
            return scores.argmax(dim=-1)
        return torch.multinomial(scores.softmax(dim=-1), 1, generator=self.dice)[0]


def before(stops, pieces, found):
    """Pieces up to the first stop text, calling `found()` there; what may be the beginning of one is held back."""
    text = ""
    for piece in pieces:
        text += piece
        places = [place for place in (text.find(stop) for stop in stops) if place >= 0]
        if places:
            pieces.close()
            found()
            text = text[: min(places)]
            break
        held = max(n for stop in stops for n in range(min(len(stop), len(text) + 1)) if text.endswith(stop[:n]))
        if len(text) > held:
            yield text[: len(text) - held]
            text = text[len(text) - held :]
    if text:
        yield text


def score(chat, data_path, images_path, seed=0):
    """Exact match on a labelled file: {kind: (questions, right with its own picture, right with another record's)}.

    Each record's first question is asked, after its system turn if it has one, and its answer compared to the letter; `kind`
    groups records, "all" sums them up. The last figure tells how far one gets by guessing from the question alone; None if
    all records have the same picture.
    """
    records = read_records(data_path)
    kinds, questions, wanted, names = [], [], [], []
    for number, record in enumerate(records):
        turns, images = parse_record(record, f"{data_path}, record {number}", chat.config.image_special_token)
        kinds.append(record.get("kind", "question"))
        asked = 2 if turns[0][0] == "system" else 1
        questions.append(chat.prompt(turns[:asked])[0].tolist())
        wanted.append(turns[asked][1])
        names.append(tuple(images))
    sets = list(dict.fromkeys(names))
    if len({len(one) for one in sets}) > 1 or not sets[0]:
        raise BadInput(f"{data_path}: to score, all records need pictures, and the same number of them")
    seen = {}
    for begin in range(0, len(sets), 32):
        part = sets[begin : begin + 32]
        features = chat.see([Path(images_path) / name for one in part for name in one])
        seen.update(zip(part, features.split(len(sets[0])), strict=True))
    shuffled = sets[:]
    random.Random(seed).shuffle(shuffled)
    other = dict(zip(shuffled, shuffled[1:] + shuffled[:1], strict=True))  # everyone's neighbour: never its own picture
    results = [
        [answer == right for answer, right in zip(chat.answer_all(questions, features), wanted, strict=True)]
        for features in ([seen[one] for one in names], [seen[other[one]] for one in names])
    ]
    table = defaultdict(lambda: [0, 0, 0])
    for kind, own, others in zip(kinds, *results, strict=True):
        for row in (table[kind], table["all"]):
            for column, value in enumerate((1, own, others)):
                row[column] += value
    table["all"] = table.pop("all")  # last
    alone = len(sets) == 1
    return {
        kind: (count, own / count, None if alone else others / count) for kind, (count, own, others) in table.items()
    }


def read_questions(folder):
    """`questions.json` of a folder of evaluation pictures: a list of ([picture files], question)."""
    file = Path(folder) / "questions.json"
    if not file.exists():
        raise BadInput(f"{file} not found: it lists the questions to ask, as [[picture, ...], question] pairs")
    try:
        pairs = json.loads(file.read_text(encoding="utf-8"))
        return [([file.parent / name for name in names], str(question)) for names, question in pairs]
    except (ValueError, TypeError) as error:
        raise BadInput(f"{file} is no JSON list of [[picture, ...], question] pairs ({error}): mend it") from None
