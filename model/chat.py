"""A trained model that answers: load it, stream one answer, or answer many questions in batches and count the right ones."""

import json
import random
import threading
from collections import defaultdict
from pathlib import Path

import torch
from transformers import TextIteratorStreamer

from model.checkpoint import load_tokenizer, load_vlm, read_notes, tokenizer_fields, tokenizer_hash
from model.dataset import encode_prompt, parse_record, read_records, split_at_images
from model.LMConfig import BadInput, LMConfig
from model.vision_utils import load_vision, read_pixels


class Chat:
    """Model, tokenizer and CLIP, ready to answer. Nothing of a request is kept."""

    def __init__(self, weights, vision_path, tokenizer_path, device, dtype, **sizes):
        """sizes: LMConfig fields for weights that come without notes of their own. BadInput says what is missing."""
        notes = read_notes(weights)
        self.tokenizer = load_tokenizer(tokenizer_path)
        self.encoder = load_vision(vision_path, device, dtype)
        if notes.get("tokenizer", tokenizer_hash(self.tokenizer)) != tokenizer_hash(self.tokenizer):
            raise BadInput(f"{weights} was trained with another tokenizer than the one in {tokenizer_path}")
        config = LMConfig(**{**sizes, **notes.get("config", {}), **tokenizer_fields(self.tokenizer)})
        config.vision_width, config.image_tokens = self.encoder.vision_width, self.encoder.image_tokens
        self.model = load_vlm(weights, config).to(device=device, dtype=dtype).eval()
        self.device = device

    def prompt(self, text, images):
        """Token ids (1, T) of a question about some images; images that no `<image>` mentions are put in front."""
        wanted = len(split_at_images(text, self.model.config)) - 1
        if not wanted and images:
            text, wanted = "<image>\n" * len(images) + text, len(images)
        if wanted != len(images):
            raise BadInput(f"{len(images)} images were given, but the question has {wanted} <image>")
        ids = encode_prompt(self.tokenizer, text, self.model.config)
        if len(ids) >= self.model.config.max_seq_len:
            raise BadInput(
                f"the question has {len(ids)} tokens, the model reads at most {self.model.config.max_seq_len}"
            )
        return torch.tensor([ids], device=self.device)

    def see(self, paths):
        """Picture files -> features (N, P, V)."""
        return self.encoder(torch.stack([read_pixels(path, self.encoder.image_size) for path in paths])).to(
            self.model.dtype
        )

    def stream(self, text, paths, max_new_tokens=128, temperature=0.0, top_k=8):
        """Yields the answer to a question about picture files, piece by piece. Temperature 0 takes the likeliest token."""
        input_ids, features = self.prompt(text, paths), self.see(paths) if paths else None
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        sampling = (
            {"do_sample": True, "temperature": temperature, "top_k": top_k} if temperature else {"do_sample": False}
        )
        room = self.model.config.max_seq_len - input_ids.shape[1]
        options = {"max_new_tokens": min(max_new_tokens, room), "streamer": streamer, **sampling}
        worker = threading.Thread(
            target=self.model.generate, args=(input_ids,), kwargs={"image_features": features, **options}, daemon=True
        )
        worker.start()
        yield from streamer
        worker.join()

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


def score(chat, data_path, images_path, seed=0):
    """Exact match on a labelled file: {kind: (questions, right with its own picture, right with another record's)}.

    Each record's first question is asked, and its answer compared to the letter; `kind` groups records, "all" sums them up.
    The second figure tells how far one gets by guessing from the question alone.
    """
    records = read_records(data_path)
    kinds, questions, wanted, names = [], [], [], []
    for number, record in enumerate(records):
        turns, images = parse_record(record, f"{data_path}, record {number}", chat.model.config)
        kinds.append(record.get("kind", "question"))
        questions.append(encode_prompt(chat.tokenizer, turns[0][1], chat.model.config))
        wanted.append(turns[1][1])
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
    return {kind: (count, own / count, others / count) for kind, (count, own, others) in table.items()}


def read_questions(folder):
    """`questions.json` of a folder of evaluation pictures: a list of ([picture files], question)."""
    file = Path(folder) / "questions.json"
    if not file.exists():
        raise BadInput(f"{file} not found: it lists the questions to ask, as [[picture, ...], question] pairs")
    return [
        ([file.parent / name for name in names], question)
        for names, question in json.loads(file.read_text(encoding="utf-8"))
    ]
