"""A trained model that answers: load it, stream an answer, see where it looked, or answer many questions in batches.

Shapes: N images, P tokens per image, V vision width, T tokens, S pixels on a side.
"""

import contextlib
import os
import threading
from pathlib import Path

import torch
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from .checkpoint import load_parts
from .conversation import as_conversation, encode_conversations, pad_left
from .decoder import Decoder, GraphDecoder, OnnxDecoder
from .errors import BadInput
from .generate import SETTINGS, Answer
from .images import read_frames, read_pixels
from .onnx_graphs import has_runtime, language_graph, not_a_graph, vision_graph
from .vision_utils import has_vision

ROOM_FOR_WORDS = 32  # tokens of a short question and its answer


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
        **fallback,
    ):
        """weights: a .pth file, or a transformers folder, whose own tokenizer and CLIP, if present, take precedence.

        int8: store the matrices of the language model and of CLIP in 8 bits (CPU only).
        max_frames: how many frames of a video are used; fewer if the context doesn't hold them. `max_pictures`: how many
            pictures it does hold, with a short question and its answer.
        fallback: LMConfig fields for weights that come without a config of their own. BadInput says what is missing.
        `summary` says what was loaded, and warns if something is doubtful.
        """
        weights = Path(weights)
        if (weights / "tokenizer.json").exists():
            tokenizer_path = weights
        if has_vision(weights):
            vision_path = weights
        parts = load_parts(weights, vision_path, tokenizer_path, device, dtype, fallback=fallback)
        self.name = weights.name.removesuffix(".pth")
        self.tokenizer = parts.tokenizer
        self.encoder = parts.encoder
        self.summary = parts.summary
        self.model = parts.model.to(device=device, dtype=dtype).eval()
        self.parameters = sum(parameter.numel() for parameter in self.model.parameters())
        self.config = self.model.config
        self.device = torch.device(device)
        self.dtype = dtype

        # how many pictures fit into the context, each with its line break, beside the frame of a prompt and some words
        counted = [as_conversation("", number, self.config) for number in (1, 2)]
        one, two = (len(ids) for ids, _ in encode_conversations(self.tokenizer, counted, self.config))
        self.max_pictures = max(1, 1 + (self.config.max_seq_len - ROOM_FOR_WORDS - one) // (two - one))
        self.max_frames = max(1, min(max_frames, self.max_pictures))

        # on a CPU, ONNX Runtime takes the place of PyTorch if it is installed
        self.sessions = None  # for prompts and for steps
        if int8 and self.device.type != "cpu":
            raise BadInput(f"--quantize int8 is for CPUs, and the model is on {device}: use --device cpu")
        if int8 and not has_runtime():
            raise BadInput("--quantize int8 needs ONNX Runtime: pip install onnxruntime onnx")
        on_cpu = self.device.type == "cpu" and dtype == torch.float32 and not not_a_graph(self.config)
        if int8 or (on_cpu and has_runtime()):
            one_row = language_graph(self.model, int8).session()
            many_rows = language_graph(self.model, int8, many_rows=True).session() if int8 else one_row
            self.sessions = many_rows, one_row
        elif on_cpu:
            self.summary += "\nanswers come faster on a CPU after: pip install onnxruntime onnx"
        if int8:
            self.encoder.session = vision_graph(self.encoder.model, int8).session()
            self.encoder.model = None

        # on a GPU a step is one captured graph, which one answer at a time can use
        self.graph = None
        self.graph_lock = threading.Lock()
        if self.device.type == "cuda":
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:2:16:8")  # 8 MB a stream, not 32
            self.graph = GraphDecoder(self.model, 1, self.config.max_seq_len)

    def encode_prompt(self, turns):
        """Token ids (1, T) of a conversation that ends with a question. BadInput if no answer would fit behind it."""
        ids = encode_conversations(self.tokenizer, [turns], self.config)[0][0]
        if len(ids) >= self.config.max_seq_len:
            raise BadInput(f"the question has {len(ids)} tokens, the model reads at most {self.config.max_seq_len}")
        return torch.from_numpy(ids)[None].to(self.device)

    def load_frames(self, files):
        """Files of pictures and videos as one list of pixels: each picture, and up to `max_frames` frames of each video."""
        return [pixels for file in files for pixels in read_frames(file, self.encoder.preprocess, self.max_frames)]

    def stack_pixels(self, images):
        """Picture files, or pixels from `to_pixels`, as one uint8 tensor (N, 3, S, S)."""
        preprocess = self.encoder.preprocess
        return torch.stack([image if torch.is_tensor(image) else read_pixels(image, preprocess) for image in images])

    def encode_images(self, images):
        """Picture files or pixels -> features (N, P, V), in one forward; None for no pictures."""
        return self.encoder(self.stack_pixels(images)).to(self.dtype) if len(images) else None

    def stream(
        self,
        text,
        images=(),
        max_new_tokens=SETTINGS["max_new_tokens"].default,
        temperature=SETTINGS["temperature"].default,
        top_k=SETTINGS["top_k"].default,
        top_p=SETTINGS["top_p"].default,
        repetition_penalty=SETTINGS["repetition_penalty"].default,
        seed=SETTINGS["seed"].default,
        stop=(),
        stop_event=None,
    ):
        """Returns an `Answer`; the model runs while it is iterated.

        text: the question, or a conversation of (role, text) turns that ends with one and has an `<image>` for each image.
        images: picture files, or pixels (3, S, S) from `to_pixels`.
        temperature 0 (or below 0.01) takes the likeliest token; top_k 0 and top_p 1 leave every token in play.
        seed: the same seed gives the same answer; None draws another each time.
        stop: texts before which the answer ends. stop_event: ends it once its `is_set()` is true.
        BadInput if images and `<image>` differ in number, if a picture can't be read, or if the question is too long.
        """
        turns = as_conversation(text, len(images), self.config) if isinstance(text, str) else text
        sampled = temperature >= 0.01

        # each of these changes the scores of the next token before it is chosen
        logits_processors = LogitsProcessorList()
        if repetition_penalty != 1:
            logits_processors.append(RepetitionPenaltyLogitsProcessor(repetition_penalty))
        if sampled:
            logits_processors.append(TemperatureLogitsWarper(float(temperature)))
            if top_k:
                logits_processors.append(TopKLogitsWarper(top_k))
            if top_p < 1:
                logits_processors.append(TopPLogitsWarper(top_p))

        # an answer has random numbers of its own, so that answers in other threads don't change it
        generator = None
        if sampled:
            generator = torch.Generator(self.device)
            generator.seed() if seed is None else generator.manual_seed(seed)

        # pictures are read now, so that a bad one is refused before the answer begins; CLIP runs when its turn comes
        pixels = self.stack_pixels(images) if len(images) else ()
        input_ids = self.encode_prompt(turns)
        return Answer(self, input_ids, pixels, max_new_tokens, logits_processors, generator, stop, stop_event)

    def warm_up(self):
        """One short answer about a blank picture, so that the first client doesn't wait longer than the second."""
        size = self.encoder.preprocess.size
        blank = torch.zeros(3, size, size, dtype=torch.uint8)
        list(self.stream("?", [blank], max_new_tokens=2))

    @contextlib.contextmanager
    def decoder(self, length):
        """A decoder for one answer; `length` is its tokens with the question's. On a GPU the captured one, unless in use."""
        if self.graph is None or not self.graph_lock.acquire(blocking=False):
            yield self.new_decoder(1, length)
            return
        try:
            yield self.graph
        finally:
            self.graph_lock.release()

    def new_decoder(self, batch, length):
        """A decoder for a batch of answers of at most `length` tokens with their questions."""
        if self.sessions is None:
            return Decoder(self.model, batch, length)
        many_rows, one_row = self.sessions
        return OnnxDecoder(self.model, batch, length, many_rows, one_row if batch == 1 else many_rows)

    def attention(self, turns, images, token_ids):
        """Where the model looked: `MiniMindVLM.attention_maps` of an answer's token ids; turns, images: as in `stream`."""
        return self.model.attention_maps(self.encode_prompt(turns), self.encode_images(images), token_ids)

    @torch.inference_mode()
    def answer_all(self, prompts, features, batch_size=64, max_new_tokens=48):
        """Greedy answers to many questions at once.

        prompts: lists of token ids; features: for each, its pictures (n, P, V). Returns a list of texts, in order.
        """
        answers = [None] * len(prompts)
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # similar lengths, little padding
        longest = self.config.max_seq_len
        graph = None
        if self.device.type == "cuda":
            graph = GraphDecoder(self.model, batch_size, longest + max_new_tokens)
        for batch in (order[begin : begin + batch_size] for begin in range(0, len(order), batch_size)):
            # a captured graph has a fixed batch size: repeat the last question to fill it
            rows = batch + batch[-1:] * (batch_size - len(batch)) if graph else batch
            input_ids, mask = pad_left([prompts[i] for i in rows])  # (B, T)
            decoder = graph or self.new_decoder(len(rows), input_ids.shape[1] + max_new_tokens)

            # the questions with their pictures, then a token of each answer a step, until all have ended
            images = torch.cat([features[i] for i in rows])  # (N, P, V)
            scores = decoder.prompt(input_ids.to(self.device), images, mask.to(self.device))  # (B, vocab_size)
            tokens = [scores.argmax(dim=-1, keepdim=True)]
            ended = tokens[0] == self.config.eos_token_id  # (B, 1)
            while len(tokens) < max_new_tokens and not ended.all():
                scores = decoder.step(tokens[-1])
                tokens.append(scores.argmax(dim=-1, keepdim=True))
                ended |= tokens[-1] == self.config.eos_token_id

            # an answer ends at its own </s>, or where its own question and it fill the context
            for i, ids in zip(batch, torch.cat(tokens, dim=1).tolist(), strict=False):
                ids = ids[: longest - len(prompts[i])]
                if self.config.eos_token_id in ids:
                    ids = ids[: ids.index(self.config.eos_token_id)]
                answers[i] = self.tokenizer.decode(ids, skip_special_tokens=True)
        return answers
