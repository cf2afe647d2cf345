"""The model as it writes: a cache of keys and values, a step a token, and on a GPU that step as one captured graph.

Shapes: B answers written at once, T new tokens, S tokens in the cache, K key/value heads, C width of a head.
"""

import torch
import torch.nn.functional as F

from .LMConfig import LMConfig


class KVCache:
    """Keys and values of a batch of conversations, in memory reserved once; a caller of `update` gets views, never copies.

    The three methods are those of transformers' caches that the model calls. With `column` set, a tensor (1,), new keys and
    values (B, K, 1, C) go to that column, and all columns are returned: for a captured graph, whose shapes never change.
    """

    def __init__(self, config: LMConfig, batch, length, device, dtype):
        shape = (config.n_layers, 2, batch, config.n_kv_heads, length, config.head_dim)
        self.memory = torch.empty(shape, device=device, dtype=dtype)
        self.filled = [0] * config.n_layers
        self.column = None

    def update(self, k, v, layer_idx):
        """Appends keys and values (B, K, T, C) of one layer; returns all of them so far, (B, K, S, C) each."""
        keys, values = self.memory[layer_idx]
        if self.column is not None:
            return keys.index_copy_(2, self.column, k), values.index_copy_(2, self.column, v)
        begin, end = self.filled[layer_idx], self.filled[layer_idx] + k.shape[2]
        keys[:, :, begin:end], values[:, :, begin:end] = k, v
        self.filled[layer_idx] = end
        return keys[:, :, :end], values[:, :, :end]

    def get_seq_length(self):
        return self.filled[0]

    def get_mask_sizes(self, query_length, layer_idx):
        return self.filled[layer_idx] + query_length, 0


class Decoder:
    """A model and the cache of a batch of answers: `prompt` reads the questions, then each `step` one more token of each."""

    def __init__(self, model, batch, length):
        self.model, self.config = model, model.config
        weights = model.tok_embeddings.weight
        self.cache = KVCache(self.config, batch, length, weights.device, weights.dtype)

    def prompt(self, input_ids, image_features=None, attention_mask=None):
        """input_ids (B, T), with padding on the left where attention_mask (B, T) is 0 -> scores of the next token (B, vocab)."""
        self.cache.filled = [0] * self.config.n_layers
        self.attention_mask = attention_mask
        return self.forward(input_ids, image_features=image_features, logits_to_keep=1)

    def step(self, token):
        """token (B, 1) -> scores of the next token (B, vocab)."""
        if self.attention_mask is not None:
            self.attention_mask = F.pad(self.attention_mask, (0, 1), value=1)
        return self.forward(token)

    def forward(self, input_ids, **options):
        options = {"attention_mask": self.attention_mask, **options}
        return self.model(input_ids, past_key_values=self.cache, **options).logits[:, -1]


class GraphDecoder(Decoder):
    """On a GPU: a step as one captured CUDA graph, instead of a few hundred kernels that the host starts one by one.

    A graph has fixed shapes and reads fixed memory: attention goes over all `length` columns of the cache under a mask, and
    where a step stands is kept on the device and moved on by the graph itself. On a CPU the same step runs without a graph,
    which is slower than `Decoder` and only good for comparing the two.
    """

    def __init__(self, model, batch, length):
        super().__init__(model, batch, length)
        self.cache.memory.zero_()  # columns under the mask are multiplied by 0, and NaN would stay NaN
        device = self.cache.memory.device
        self.token, self.position_ids = (torch.zeros(batch, 1, dtype=torch.long, device=device) for _ in range(2))
        self.column = torch.zeros(1, dtype=torch.long, device=device)  # of the cache, where the next token goes
        self.visible = torch.zeros(batch, 1, 1, length, dtype=torch.bool, device=device)
        self.replay = self.capture() if device.type == "cuda" else self.one_step

    @torch.inference_mode()
    def capture(self):
        """Runs a step once, so that kernels are chosen before anything is recorded, and records another."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.one_step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            self.one_step()
        return graph.replay

    def one_step(self):
        """Reads `token`, writes `logits`, and moves everything else on by one token."""
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
        self.visible.zero_()
        self.visible[:, 0, 0, :length] = mask.bool()
        self.position_ids.copy_(mask.sum(dim=1, keepdim=True))
        self.column.fill_(length)
        return super().prompt(input_ids, image_features, attention_mask)

    def step(self, token):
        self.token.copy_(token)
        self.replay()
        return self.logits
