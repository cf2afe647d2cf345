"""Turns of a conversation in; token ids out, with flags that say which of them are an answer.

Shapes: B batch, T tokens.
"""

import copy
import re
import weakref
from itertools import chain

import jinja2
import numpy as np
import torch

from .errors import BadInput

# the form of prompts of the first MiniMind-V, for tokenizers without a chat template
PUBLISHED_TEMPLATE = """\
{%- for message in messages -%}
{%- if message.role == "user" %}{{ bos_token + "user\\n" + message.content + eos_token + "\\n" + bos_token + "assistant\\n" }}
{%- elif message.role == "assistant" %}{{ message.content + eos_token + "\\n" }}
{%- else %}{{ message.content }}
{%- endif %}
{%- endfor %}"""
FRAMES = weakref.WeakKeyDictionary()  # tokenizer -> {roles: what `frames` found}
PLAIN_BACKENDS = weakref.WeakKeyDictionary()  # tokenizer -> the copy of its backend that `plain_backend` made


def tokenizer_fields(tokenizer, image_chars=("<", ">")):
    """The LMConfig fields that depend on the tokenizer. image_chars: the texts that placeholders of images consist of.

    BadInput if the tokenizer has no token for one of them.
    """
    image_char_ids = tokenizer.convert_tokens_to_ids(list(image_chars))
    for text, token_id in zip(image_chars, image_char_ids, strict=True):
        if token_id is None or token_id == tokenizer.unk_token_id:
            raise BadInput(
                f"the tokenizer in {tokenizer.name_or_path} has no token {text}, which stands for pictures: name the one "
                "that the weights were trained with, with --tokenizer_path"
            )
    return {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "image_char_ids": image_char_ids,
    }


def split_at_images(text, placeholder):
    """Splits at each `<image>` and each literal placeholder; n images give n + 1 pieces of text."""
    return text.replace(placeholder, "<image>").split("<image>")


def frames(tokenizer, roles):
    """What a tokenizer's chat template writes around the contents of turns with these roles: a list of pieces for each gap.

    The first comes before the first content, the last after the last one; if that is a question, it ends where the answer
    begins. A piece is a list with the id of a special token, or text to tokenise. Templates are Jinja programs; they are run
    once for each order of roles, with marks in place of contents.
    BadInput if the template has no place for one of them.
    """
    known = FRAMES.setdefault(tokenizer, {})
    if roles not in known:
        marks = [f"\ue000{i}\ue001" for i in range(len(roles))]  # of Unicode's private use area
        try:
            text = tokenizer.apply_chat_template(
                [{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)],
                chat_template=tokenizer.chat_template or PUBLISHED_TEMPLATE,
                add_generation_prompt=roles[-1] == "user",
                tokenize=False,
            )
        except jinja2.TemplateError as error:
            raise BadInput(f"the tokenizer's chat template refuses turns of {', '.join(roles)} ({error})") from None
        gaps = re.split("\ue000\\d+\ue001", text)
        if re.findall("\ue000\\d+\ue001", text) != marks:
            raise BadInput(f"the tokenizer's chat template leaves out, moves or repeats one of {', '.join(roles)}")

        known[roles] = [split_at_special(tokenizer, gap) for gap in gaps]
    return known[roles]


def split_at_special(tokenizer, text):
    """A text that a chat template wrote as a list of pieces: a list with the id of a special token, or text to tokenise."""
    special = {**tokenizer.get_added_vocab(), tokenizer.eos_token: tokenizer.eos_token_id}
    pattern = "(" + "|".join(map(re.escape, sorted(special, key=len, reverse=True))) + ")"
    return [[special[part]] if part in special else part for part in re.split(pattern, text) if part]


def conversation_pieces(turns, gaps, placeholder, image_ids):
    """A conversation as a list of (piece, is_answer), in the form that the tokenizer's chat template gives it.

    turns: (role, text) pairs; gaps: their `frames`. placeholder, image_ids: the config's `image_special_token` and
    `image_ids`. A piece is text to tokenise, or a list of token ids. Special tokens and pictures are inserted as ids and never
    tokenised from text, so neither neighbouring text nor user input can alter or forge them.
    """
    pieces = [(piece, False) for piece in gaps[0]]
    for (role, text), gap in zip(turns, gaps[1:], strict=True):
        is_answer = role == "assistant"
        first, *rest = split_at_images(text, placeholder)

        # text before a question is tokenised together with it, but not text before an answer, where generation starts
        if not is_answer and pieces and isinstance(pieces[-1][0], str):
            first = pieces.pop()[0] + first

        # the text, with the ids of a picture wherever it was split
        pieces.append((first, is_answer))
        for piece in rest:
            pieces += [(image_ids, False), (piece, is_answer)]

        # what comes between this turn and the next; the model learns to write the </s> of an answer
        for i, piece in enumerate(gap):
            pieces.append((piece, is_answer and i == 0 and not isinstance(piece, str)))
    return [(piece, is_answer) for piece, is_answer in pieces if piece]


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
    """Token ids of each text; special tokens written out in it are tokenised as plain text."""
    backend = plain_backend(tokenizer)  # not tokenizer(texts): transformers' wrapping takes 20 times as long
    return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


def encode_conversations(tokenizer, conversations, config):
    """Lists of (role, text) turns -> for each, (token ids, is_answer flags), two arrays (T,).

    Many at once are much faster than one by one: texts are tokenised in a single call, and arrays made for all of them.
    """
    if not conversations:
        return []

    # each conversation as a list of pieces
    images = config.image_special_token, config.image_ids
    gaps = [frames(tokenizer, tuple(role for role, _ in turns)) for turns in conversations]
    conversations = [conversation_pieces(turns, gap, *images) for turns, gap in zip(conversations, gaps, strict=True)]

    # tokenise each different text once: "user\n", "assistant\n" and many questions come again and again
    pieces = list(chain(*conversations))
    texts = list({piece for piece, _ in pieces if isinstance(piece, str)})
    ids_of = dict(zip(texts, encode(tokenizer, texts), strict=True))

    # the ids of all pieces in one array, and beside each id the flag of its piece
    piece_ids = [ids_of[piece] if isinstance(piece, str) else piece for piece, _ in pieces]
    lengths = np.array([len(ids) for ids in piece_ids])
    all_ids = np.fromiter(chain(*piece_ids), dtype=np.int64, count=lengths.sum())
    all_flags = np.repeat([is_answer for _, is_answer in pieces], lengths)

    # cut both where a conversation ends: after its last piece
    last_pieces = np.cumsum([len(conversation) for conversation in conversations]) - 1
    ends = lengths.cumsum()[last_pieces]
    return list(zip(np.split(all_ids, ends[:-1]), np.split(all_flags, ends[:-1]), strict=True))


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


def as_conversation(text, num_images, config):
    """A question about `num_images` pictures as a conversation of one turn.

    If the text has no `<image>`, one per picture is put in front, each on its own line. BadInput if it has some, but not
    one per picture.
    """
    mentioned = len(split_at_images(text, config.image_special_token)) - 1
    if not mentioned:
        return [("user", "<image>\n" * num_images + text)]
    if mentioned != num_images:
        raise BadInput(f"{num_images} images were given, but the question has {mentioned} <image>")
    return [("user", text)]
