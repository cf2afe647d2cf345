"""How an answer is drawn: what may be set, and the text as it is written."""

import time
from typing import NamedTuple

import torch

from .errors import BadInput


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


class Answer:
    """An answer as it is written: iterating yields pieces of text, whole characters each.

    prompt_tokens: length of the question. token_ids: the answer so far, without `</s>`.
    finish_reason: None until the end, then "stop" (`</s>`, or a stop text), "length" (max_new_tokens), "context" (the
    model can read no more) or "cancelled" (stop_event).
    first_token_seconds: from the beginning of the iteration to the first token, CLIP included. tokens_per_second: of all
    later ones, `</s>` counted; None until there are some.
    """

    def __init__(self, chat, input_ids, pixels, max_new_tokens, logits_processors, generator, stop, stop_event):
        self.chat, self.pixels = chat, pixels
        self.prompt_tokens = input_ids.shape[1]
        room = chat.config.max_seq_len - self.prompt_tokens
        self.limit = min(max_new_tokens, room)
        self.at_limit = "context" if room < max_new_tokens else "length"
        self.logits_processors = logits_processors
        self.generator = generator
        self.stop = stop
        self.stop_event = stop_event
        self.ids = torch.empty(1, self.prompt_tokens + self.limit, dtype=torch.long, device=chat.device)
        self.ids[:, : self.prompt_tokens] = input_ids
        self.token_ids = []
        self.finish_reason = self.first_token_seconds = self.tokens_per_second = None

    def __iter__(self):
        return until_stop(self.stop, self.characters(), self.end) if self.stop else self.characters()

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
        with self.chat.decoder(self.ids.shape[1]) as decoder:
            yield from self.decode_tokens(decoder)

    def decode_tokens(self, decoder):
        chat, length, begun = self.chat, self.prompt_tokens, time.perf_counter()
        while length < self.ids.shape[1]:
            if self.stop_event is not None and self.stop_event.is_set():
                self.finish_reason = "cancelled"
                return
            if length == self.prompt_tokens:
                logits = decoder.prompt(self.ids[:, :length], chat.see(self.pixels))
            else:
                logits = decoder.step(self.ids[:, length - 1 : length])
            self.ids[:, length] = self.sample(self.logits_processors(self.ids[:, :length], logits.float()))
            length += 1
            token = self.ids[0, length - 1].item()
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

    def sample(self, scores):
        """The next token (1,) from scores (1, vocab_size): drawn, or the likeliest where there is no generator."""
        if self.generator is None:
            return scores.argmax(dim=-1)
        return torch.multinomial(scores.softmax(dim=-1), 1, generator=self.generator)[0]


def until_stop(stops, pieces, found):
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
