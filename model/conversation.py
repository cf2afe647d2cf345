"""Turns of a conversation in, token ids and flags of what is an answer out."""

import copy
import weakref
from itertools import chain

import numpy as np
import torch

from .errors import BadInput

PLAIN_BACKENDS = weakref.WeakKeyDictionary()  # tokenizer -> the copy of its backend that `plain_backend` made


def tokenizer_fields(tokenizer):
    """The LMConfig fields that a tokenizer decides."""
    return {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "image_char_ids": tokenizer.convert_tokens_to_ids(["<", ">"]),
    }


def split_at_images(text, placeholder):
    """Splits at each `<image>` and each literal placeholder; n images give n + 1 pieces of text."""
    return text.replace(placeholder, "<image>").split("<image>")


def conversation_pieces(turns, placeholder, image_ids, bos, eos):
    """The published prompt form, `<s>user\\n...</s>\\n<s>assistant\\n...</s>\\n`, as a list of (piece, is_answer).

    turns: (role, text) pairs; the rest is the config's `image_special_token`, `image_ids`, and lists of one token. A piece
    is text to be tokenised, or a list of ready token ids: special tokens and images never come from tokenising, so that
    neither what stands beside them nor what a text contains can change them.
    """
    pieces = []
    for role, text in turns:
        answer = role == "assistant"
        first, *rest = split_at_images(text, placeholder)
        if role == "user":
            pieces.append((bos, False))
            first = "user\n" + first
        pieces.append((first, answer))
        for piece in rest:
            pieces += [(image_ids, False), (piece, answer)]
        if role == "user":
            pieces += [(eos, False), ("\n", False), (bos, False), ("assistant\n", False)]
        elif answer:
            pieces += [(eos, True), ("\n", False)]
    return [(piece, answer) for piece, answer in pieces if piece]


def plain_backend(tokenizer):
    """A private copy of the tokenizer's backend for which a written-out `</s>` is plain text; it never pads or truncates.

    A copy, as these options would also change what other users of the tokenizer get. Made once, and again if tokens were
    added since.
    """
    backend = PLAIN_BACKENDS.get(tokenizer)
    if backend is None or backend.get_vocab_size() != len(tokenizer):
        backend = copy.deepcopy(tokenizer.backend_tokenizer)
        backend.encode_special_tokens = True
        backend.no_padding()
        backend.no_truncation()
        PLAIN_BACKENDS[tokenizer] = backend
    return backend


def encode(tokenizer, texts):
    """Token ids of each text; special tokens written out in it are plain characters."""
    backend = plain_backend(tokenizer)  # not tokenizer(texts): transformers' wrapping takes 20 times as long
    return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


def encode_conversations(tokenizer, conversations, config):
    """Lists of (role, text) turns -> for each, (token ids, is_answer flags), two arrays (T,)."""
    if not conversations:
        return []
    marks = config.image_special_token, config.image_ids, [config.bos_token_id], [config.eos_token_id]
    all_pieces = [conversation_pieces(turns, *marks) for turns in conversations]
    texts = list({piece for pieces in all_pieces for piece, _ in pieces if isinstance(piece, str)})  # each once
    ids_of = dict(zip(texts, encode(tokenizer, texts), strict=True))
    pieces = [ids_of[piece] if isinstance(piece, str) else piece for piece, _ in chain(*all_pieces)]
    lengths = np.array([len(piece) for piece in pieces])
    ids = np.fromiter(chain(*pieces), dtype=np.int64, count=lengths.sum())
    flags = np.repeat([answer for _, answer in chain(*all_pieces)], lengths)
    ends = lengths.cumsum()[np.cumsum([len(pieces) for pieces in all_pieces]) - 1][:-1]
    return list(zip(np.split(ids, ends), np.split(flags, ends), strict=True))


def pad_left(prompts):
    """Lists of token ids -> input_ids and attention_mask (B, T): all prompts end in the last column, where answers begin.

    Padding is id 0.
    """
    length = max(len(ids) for ids in prompts)
    input_ids = torch.zeros(len(prompts), length, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    for row, ids in enumerate(prompts):
        start = length - len(ids)
        input_ids[row, start:] = torch.tensor(ids)
        attention_mask[row, start:] = 1
    return input_ids, attention_mask


def as_conversation(text, images, config):
    """A question about some images as a conversation; images that no `<image>` mentions are put in front, one a line.

    BadInput if it mentions another number of them.
    """
    wanted = len(split_at_images(text, config.image_special_token)) - 1
    if not wanted:
        text, wanted = "<image>\n" * images + text, images
    if wanted != images:
        raise BadInput(f"{images} images were given, but the question has {wanted} <image>")
    return [("user", text)]
