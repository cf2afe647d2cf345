"""Decoding: a cache of keys and values, a forward per token: on a GPU one captured CUDA graph, on a CPU by ONNX Runtime.

Shapes: B answers written at once, T new tokens, S tokens in the cache, K key/value heads, C width of a head.
"""

import torch
import torch.nn.functional as F

from .LMConfig import LMConfig
from .model import rotary_freqs


class KVCache:
    """Keys and values of a batch of conversations, in memory allocated once; `update` returns views, never copies.

    It has the three methods of transformers' caches that the model calls. For a captured graph, whose shapes never change, set
    `column`, a tensor (1,): new keys and values (B, K, 1, C) are written to that column, and all columns are returned.
    """

    def __init__(self, config: LMConfig, batch, length, device, dtype):
        shape = (config.n_layers, 2, batch, config.n_kv_heads, length, config.head_dim)
        self.memory = torch.empty(shape, device=device, dtype=dtype)
        self.filled = [0] * config.n_layers  # S, layer by layer
        self.column = None

    def update(self, k, v, layer_idx):
        """Appends keys and values (B, K, T, C) of one layer; returns all of them so far, (B, K, S, C) each."""
        keys, values = self.memory[layer_idx]
        if self.column is not None:
            return keys.index_copy_(2, self.column, k), values.index_copy_(2, self.column, v)
        begin = self.filled[layer_idx]
        end = begin + k.shape[2]
        keys[:, :, begin:end] = k
        values[:, :, begin:end] = v
        self.filled[layer_idx] = end
        return keys[:, :, :end], values[:, :, :end]

    def get_seq_length(self):
        return self.filled[0]

    def get_mask_sizes(self, query_length, layer_idx):
        return self.filled[layer_idx] + query_length, 0


class Decoder:
    """A model and the cache of a batch of answers: `prompt` reads the questions, `step` one more token of each answer."""

    def __init__(self, model, batch, length):
        self.model = model
        self.config = model.config
        weights = model.tok_embeddings.weight
        self.cache = KVCache(self.config, batch, length, weights.device, weights.dtype)

    def prompt(self, input_ids, image_features=None, attention_mask=None):
        """input_ids (B, T), left padding 0 in attention_mask (B, T) -> logits of the next token (B, vocab_size)."""
        self.cache.filled = [0] * self.config.n_layers
        self.attention_mask = attention_mask
        return self.forward(input_ids, image_features=image_features, logits_to_keep=1)

    def step(self, token):
        """token (B, 1) -> logits of the next token (B, vocab_size)."""
        if self.attention_mask is not None:
            self.attention_mask = F.pad(self.attention_mask, (0, 1), value=1)
        return self.forward(token)

    def forward(self, input_ids, **options):
        options = {"attention_mask": self.attention_mask, **options}
        return self.model(input_ids, past_key_values=self.cache, **options).logits[:, -1]


class GraphDecoder(Decoder):
    """On a GPU: a step as one captured CUDA graph, instead of a few hundred kernels that the host launches one by one.

    A graph has fixed shapes and reads fixed memory. So attention goes over all `length` columns of the cache, under a mask,
    and the current position is kept on the device, where the graph itself increments it. On a CPU the same step runs without
    a graph; that is slower than `Decoder`, and exists only to compare the two.
    """

    def __init__(self, model, batch, length):
        super().__init__(model, batch, length)
        # masked columns are multiplied by 0, but NaN left in uninitialised memory would stay NaN
        self.cache.memory.zero_()

        # the inputs of the graph: it reads them from these addresses at every replay
        device = self.cache.memory.device
        self.token = torch.zeros(batch, 1, dtype=torch.long, device=device)
        self.position_ids = torch.zeros(batch, 1, dtype=torch.long, device=device)
        self.column = torch.zeros(1, dtype=torch.long, device=device)  # of the cache, for the next token
        self.visible = torch.zeros(batch, 1, 1, length, dtype=torch.bool, device=device)  # the attention mask

        self.replay = self.capture() if device.type == "cuda" else self.one_step

    @torch.inference_mode()
    def capture(self):
        """Runs one step to warm up, captures another, and returns the function that replays it."""
        # a first run outside the graph chooses kernels and allocates workspaces, which is not allowed during capture
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.one_step()

        # only this thread's calls are captured and checked, so that other threads may continue to use the GPU
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            self.one_step()
        return graph.replay

    def one_step(self):
        """Reads `token`, writes `logits`, and advances mask, column and position by one token."""
        self.visible.index_fill_(3, self.column, True)
        self.cache.column = self.column
        options = {"attention_mask": self.visible, "position_ids": self.position_ids}
        self.logits = self.model(self.token, past_key_values=self.cache, **options).logits[:, -1]
        self.cache.column = None
        self.column += 1
        self.position_ids += 1

    def prompt(self, input_ids, image_features=None, attention_mask=None):
        length = input_ids.shape[1]
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask

        # the state of the first step: the prompt is visible except its padding, which has no positions but takes columns
        self.visible.zero_()
        self.visible[:, 0, 0, :length] = mask.bool()
        self.position_ids.copy_(mask.sum(dim=1, keepdim=True))
        self.column.fill_(length)

        # the prompt itself has a new length each time, so it runs without a graph
        return super().prompt(input_ids, image_features, attention_mask)

    def step(self, token):
        self.token.copy_(token)
        self.replay()
        return self.logits


class OnnxDecoder(Decoder):
    """On a CPU: by ONNX Runtime, in two sessions of `language_graph`, for prompts and for steps, on the same memory."""

    def __init__(self, model, batch, length, prompts, steps):
        # in place of Decoder's own cache
        self.model = model
        self.config = config = model.config

        # what both graphs read and write at every step
        self.lengths = torch.zeros(batch, dtype=torch.int32)
        self.longest = torch.zeros((), dtype=torch.int32)
        self.logits = torch.empty(batch, config.vocab_size)
        freqs = rotary_freqs(torch.arange(length)[None], config.head_dim, config.rope_theta)[0, 0]  # (length, C/2)
        self.inputs = {"lengths": self.lengths, "longest": self.longest}
        self.inputs |= {"cos": freqs.real.contiguous(), "sin": freqs.imag.contiguous()}
        self.outputs = {"logits": self.logits}

        # keys and values, the old and the new in the same memory
        self.memory = torch.empty(config.n_layers, 2, batch, config.n_kv_heads, length, config.head_dim)
        for number, layer in enumerate(self.memory):
            for kind, values in zip(("keys", "values"), layer, strict=True):
                self.inputs[f"{kind}.{number}"] = self.outputs[f"new_{kind}.{number}"] = values
        self.prompts, self.steps = ((session, self.bind(session)) for session in (prompts, steps))
        # in a step a row has one token, so that its position is the row's number
        self.last_of_one = torch.arange(batch)

    def bind(self, session):
        """What the session reads and writes, bound to these tensors."""
        binding = session.io_binding()
        for name, tensor in self.inputs.items():
            bind_to(binding.bind_input, name, tensor)
        for name, tensor in self.outputs.items():
            bind_to(binding.bind_output, name, tensor)
        return binding

    def prompt(self, input_ids, image_features=None, attention_mask=None):
        embeddings = self.model.embed(input_ids, image_features)  # (B, T, D)
        rows, width = input_ids.shape
        counts = torch.full((rows,), width) if attention_mask is None else attention_mask.sum(dim=1)

        # the graph wants padding on the right
        order = (torch.arange(width) + (width - counts)[:, None]) % width  # (B, T)
        embeddings = embeddings.gather(1, order[..., None].expand_as(embeddings))

        # padding is read like a row's own tokens, so that it has numbers, too; the steps overwrite it in the cache
        self.lengths.fill_(width - 1)
        self.longest.fill_(width)
        logits = self.run(*self.prompts, embeddings, torch.arange(rows) * width + counts - 1)
        self.lengths.copy_(counts - 1)
        return logits

    def step(self, token):
        self.lengths += 1
        self.longest += 1
        return self.run(*self.steps, self.model.tok_embeddings(token), self.last_of_one)

    def run(self, session, binding, embeddings, last):
        """embeddings (B, T, D), last (B,) -> logits (B, vocab_size)."""
        embeddings = embeddings.float()
        bind_to(binding.bind_input, "embeddings", embeddings)
        bind_to(binding.bind_input, "last", last)
        session.run_with_iobinding(binding)
        return self.logits


def bind_to(bind, name, tensor):
    kind = str(tensor.dtype).removeprefix("torch.")
    bind(name, "cpu", 0, kind, tuple(tensor.shape), tensor.data_ptr())
