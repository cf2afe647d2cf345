"""How an answer is sampled: the settings a user may change, and the text as it is written."""

import time
from typing import NamedTuple

import torch

from .errors import BadInput


class Setting(NamedTuple):
    """A sampling setting that users may change: type, range, default, help."""

    kind: type
    least: float
    most: float
    default: float | None
    help: str

    def read(self, name, value):
        """A number, or the text of one, as this setting's value; BadInput if it is not a number or out of range."""
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
    "max_new_tokens": Setting(int, 1, 100_000, 256, "longest answer in tokens, without the question"),
    "temperature": Setting(float, 0, 2, 0.5, "0 always takes the most likely token; higher values vary more"),
    "top_k": Setting(int, 0, 100_000, 8, "draw only from the k most likely tokens; 0 for all"),
    "top_p": Setting(float, 0, 1, 1.0, "draw only from the most likely tokens that together have this probability"),
    "repetition_penalty": Setting(float, 0.1, 10, 1.0, "above 1, tokens that already occurred become less likely"),
    "seed": Setting(int, 0, 2**63 - 1, None, "the same seed gives the same answer (default: a new one each time)"),
}


class Answer:
    """An answer as it is written: iterating yields pieces of text, each of whole characters.

    prompt_tokens: length of the question. token_ids: the answer so far, without `</s>`.
    finish_reason: None until the end, then "stop" (`</s>`, or a stop text), "length" (max_new_tokens), "context" (the
    context is full) or "cancelled" (stop_event).
    first_token_seconds: from the start of the iteration to the first token, CLIP included. tokens_per_second: speed of all
    later tokens, `</s>` counted; None until there are some.
    """

    def __init__(self, chat, input_ids, pixels, max_new_tokens, logits_processors, generator, stop, stop_event):
        self.chat, self.pixels = chat, pixels
        self.prompt_tokens = input_ids.shape[1]

        # the answer ends at max_new_tokens, or where the context ends
        room = chat.config.max_seq_len - self.prompt_tokens
        self.limit = min(max_new_tokens, room)
        self.at_limit = "context" if room < max_new_tokens else "length"

        self.logits_processors = logits_processors
        self.generator = generator
        self.stop = stop
        self.stop_event = stop_event

        # question and answer on the device, (1, T), filled token by token
        self.ids = torch.empty(1, self.prompt_tokens + self.limit, dtype=torch.long, device=chat.device)
        self.ids[:, : self.prompt_tokens] = input_ids

        # what is known at the end
        self.token_ids = []
        self.finish_reason = None
        self.first_token_seconds = None
        self.tokens_per_second = None

    def __iter__(self):
        return until_stop(self.stop, self.characters(), self.end) if self.stop else self.characters()

    def end(self):
        self.finish_reason = "stop"

    def characters(self):
        """Pieces of text; characters that span several tokens are held back until complete."""
        pending = []  # tokens decoded together, from the last complete character on
        shown = 0  # how many characters of them were yielded
        for token in self.tokens():
            pending.append(token)
            text = self.decode(pending)

            # incomplete bytes decode to a replacement character at the end: later tokens may still complete it
            complete = text.removesuffix("\ufffd")
            if len(complete) > shown:
                yield complete[shown:]
            shown = len(complete)
            if complete == text:
                pending = []
                shown = 0

        # the answer ended within a character: show that it did
        if pending:
            yield self.decode(pending)[shown:]

    def decode(self, ids):
        return self.chat.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    @torch.inference_mode()
    def tokens(self):
        """Token ids one by one, until `finish_reason` is set."""
        with self.chat.decoder(self.ids.shape[1]) as decoder:
            yield from self.generate_tokens(decoder)

    def generate_tokens(self, decoder):
        """Token ids one by one: the question is read, then each token is sampled and read in turn."""
        chat = self.chat
        started = time.perf_counter()
        length = self.prompt_tokens  # of question and answer so far
        while length < self.ids.shape[1]:
            # a client that has gone, or a user who has seen enough
            if self.stop_event is not None and self.stop_event.is_set():
                self.finish_reason = "cancelled"
                return

            # the whole question first, with its pictures, then one token at a time; CLIP runs only here, so that an answer
            # that still waits in a queue costs no compute
            if length == self.prompt_tokens:
                logits = decoder.prompt(self.ids[:, :length], chat.encode_images(self.pixels))  # (1, vocab_size)
            else:
                logits = decoder.step(self.ids[:, length - 1 : length])

            # adjust the logits, sample, and bring the token to the host: the one device sync of a step
            self.ids[:, length] = self.sample(self.logits_processors(self.ids[:, :length], logits.float()))
            length += 1
            token = self.ids[0, length - 1].item()

            # the time to the first token includes CLIP and the question; the speed is that of all later ones
            seconds = time.perf_counter() - started
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
        """The next token (1,) from scores (1, vocab_size): sampled, or the argmax without a generator."""
        if self.generator is None:
            return scores.argmax(dim=-1)
        return torch.multinomial(scores.softmax(dim=-1), 1, generator=self.generator)[0]


def until_stop(stops, pieces, found):
    """Pieces up to the first stop text, calling `found()` there; what may be the beginning of one is held back."""
    text = ""  # not yielded yet
    for piece in pieces:
        text += piece

        # the earliest stop text ends the answer before it
        found_at = [text.find(stop) for stop in stops if stop in text]
        if found_at:
            pieces.close()
            found()
            text = text[: min(found_at)]
            break

        # hold back the longest end of the text that some stop text begins with
        held = max(n for stop in stops for n in range(min(len(stop), len(text) + 1)) if text.endswith(stop[:n]))
        if len(text) > held:
            yield text[: len(text) - held]
            text = text[len(text) - held :]
    if text:
        yield text
