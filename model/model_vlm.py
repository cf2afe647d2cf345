"""How the language model sees: one linear map from CLIP's vectors into its embedding space, written over the placeholder.

Shapes: B batch, T tokens, N images in the batch, P tokens per image, V vision width, D model width.
"""

import torch
from torch import nn

from .LMConfig import LMConfig
from .model import MiniMindLM, rotary_freqs


class VisionProj(nn.Module):
    """A dictionary between two languages: (N, P, V) vectors of CLIP -> (N, P, D) embeddings of the language model."""

    def __init__(self, config: LMConfig):
        super().__init__()
        self.vision_proj = nn.Sequential(nn.Linear(config.vision_width, config.dim, bias=config.vision_bias))

    def forward(self, image_features):
        return self.vision_proj(image_features)


class MiniMindVLM(MiniMindLM):
    """`MiniMindLM` with eyes. `image_features` (N, P, V) stand in the order in which the placeholders are read."""

    def __init__(self, config: LMConfig):
        super().__init__(config)
        self.vision_proj = VisionProj(config)
        self.post_init()

    def embed(self, input_ids, image_features=None):
        """Embeddings (B, T, D) of the tokens, with each placeholder's P positions overwritten by its projected picture.

        Raises ValueError when the number of pictures differs from the number of placeholders. The comparison would make the
        host wait for a GPU, and cut the graph of `--compile` in two: while training there, it is left to the dataset, which
        has made it already.
        """
        embeddings = self.tok_embeddings(input_ids)
        if not self.training and image_features is None and input_ids.shape[1] < self.config.image_tokens:
            return embeddings  # as in every step of decoding: too short for a placeholder
        starts = find_placeholders(input_ids, self.config.image_ids)  # (B, T)
        images = 0 if image_features is None else len(image_features)
        skip_check = self.training and (input_ids.is_cuda or torch.compiler.is_compiling())
        if not skip_check and starts.sum() != images:
            raise ValueError(f"{images} images were given, but the text has {int(starts.sum())} image placeholders")
        if not images and not self.training:
            return embeddings
        if image_features is None:
            # a batch of text alone: with no picture the projector still has a gradient, of zeros, which is what other
            # processes, whose batches have pictures, wait for
            image_features = embeddings.new_zeros(0, self.config.image_tokens, self.config.vision_width)
        projected = self.vision_proj(image_features).to(embeddings.dtype)  # (N, P, D)
        positions = placeholder_positions(starts, images, self.config.image_tokens)
        # not masked_scatter, for whose gradient the host waits for a GPU
        return embeddings.flatten(0, 1).index_put((positions,), projected.flatten(0, 1)).view_as(embeddings)

    @torch.inference_mode()
    def attention_maps(self, input_ids, image_features, token_ids):
        """How attention was spread over the pictures as each token of an answer was written: (layers, A, N, P).

        input_ids (1, T): the question; token_ids: the A tokens of its answer. Each value is the share of attention,
        averaged over heads, that the position which predicted the token paid to one vector of one picture; a row sums to
        less than 1, as the text before it gets the rest. Only these A rows are ever computed, not T x T.
        """
        config = self.config
        first = input_ids.shape[1] - 1  # the last position of the question predicts the first token of the answer
        written = torch.tensor([token_ids[:-1]], dtype=torch.long, device=input_ids.device)
        x = torch.cat([self.embed(input_ids, image_features), self.tok_embeddings(written)], dim=1)
        positions = torch.arange(x.shape[1], device=x.device)
        freqs = rotary_freqs(positions[None], config.head_dim, config.rope_theta)
        future = positions > positions[first:, None]  # (A, T)
        starts = find_placeholders(input_ids, config.image_ids)
        on_image = placeholder_positions(starts, len(image_features), config.image_tokens)
        maps = []
        for layer in self.layers:
            q, k, _ = layer.attention.project(layer.attention_norm(x), freqs)
            k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)  # (1, H, T, C)
            scores = q[0, :, first:] @ k[0].mT / config.head_dim**0.5  # (H, A, T)
            shares = scores.float().masked_fill(future, -torch.inf).softmax(dim=-1).mean(dim=0)  # (A, T)
            maps.append(shares[:, on_image].unflatten(1, (-1, config.image_tokens)))
            x, _ = layer(x, freqs, None, None, None)
        return torch.stack(maps)

    def prepare_inputs_for_generation(self, input_ids, past_key_values=None, image_features=None, **kwargs):
        """For transformers' `generate`: the pictures are needed once, with the prompt; later steps find them in the cache."""
        inputs = super().prepare_inputs_for_generation(input_ids, past_key_values=past_key_values, **kwargs)
        if past_key_values is None or past_key_values.get_seq_length() == 0:
            inputs["image_features"] = image_features
        return inputs


def find_placeholders(input_ids, image_ids):
    """(B, T) bool, True where a whole placeholder begins."""
    starts = torch.zeros_like(input_ids, dtype=torch.bool)
    length, size = input_ids.shape[1], len(image_ids)
    if length >= size:
        left, right = input_ids == image_ids[0], input_ids == image_ids[-1]  # numbers: a tensor would have to be sent
        left, right = left.unfold(1, size // 2, 1).all(dim=-1), right.unfold(1, size - size // 2, 1).all(dim=-1)
        starts[:, : length - size + 1] = left[:, : length - size + 1] & right[:, size // 2 :]
    return starts


def placeholder_positions(starts, images, size):
    """(N * P,) flat positions b * T + t, in reading order, of the `size` positions from each of so many starts on.

    Sorted, as the number of images is known, where `nonzero` would make the host wait for a GPU.
    """
    first = starts.flatten().to(torch.uint8).argsort(descending=True, stable=True)[:images]  # (N,)
    return (first[:, None] + torch.arange(size, device=starts.device)).flatten()
