"""How the language model sees: a projector takes CLIP's vectors to embeddings, which overwrite the placeholders' own.

Shapes: B batch, T tokens, N images in the batch, P tokens per image, V vision width, D model width.
"""

import torch
from torch import nn

from .LMConfig import LMConfig
from .model import MiniMindLM, rotary_freqs


class VisionProj(nn.Module):
    """A dictionary between two languages: (N, P, V) vectors of CLIP -> (N, P, D) embeddings of the language model.

    One linear layer, or with `projector="mlp"` two, as in minimind-3v; the attributes' names are the published ones.
    """

    def __init__(self, config: LMConfig):
        super().__init__()
        if config.projector == "linear":
            self.vision_proj = nn.Sequential(nn.Linear(config.vision_width, config.dim, bias=config.vision_bias))
        else:
            self.mlp = nn.Sequential(
                nn.LayerNorm(config.vision_width),
                nn.Linear(config.vision_width, config.dim),
                nn.GELU(),
                nn.Linear(config.dim, config.dim),
            )

    def forward(self, image_features):
        (layers,) = self.children()
        return layers(image_features)


class MiniMindVLM(MiniMindLM):
    """`MiniMindLM` with eyes. `image_features` (N, P, V) are in reading order, as their placeholders are."""

    def __init__(self, config: LMConfig):
        super().__init__(config)
        self.vision_proj = VisionProj(config)
        self.post_init()

    def embed(self, input_ids, image_features=None):
        """Embeddings (B, T, D) of the tokens, with each placeholder's P positions overwritten by its projected picture.

        ValueError if the number of pictures differs from the number of placeholders. The check costs a device sync on a
        GPU, so training skips it there: the dataset has already made it.
        """
        embeddings = self.tok_embeddings(input_ids)  # (B, T, D)
        if not self.training and image_features is None and input_ids.shape[1] < self.config.image_tokens:
            return embeddings  # too short for a placeholder, as every step of decoding is

        # every picture needs its placeholder, and every placeholder its picture
        starts = find_placeholders(input_ids, self.config.image_ids)  # (B, T)
        num_images = 0 if image_features is None else len(image_features)
        if not (self.training and input_ids.is_cuda):
            check_count(starts, num_images)
        if not num_images and not self.training:
            return embeddings

        # text-only batch: run the projector on zero pictures, so that it has a (zero) gradient: under DDP, ranks with
        # pictures would otherwise wait for it forever
        if image_features is None:
            image_features = embeddings.new_zeros(0, self.config.image_tokens, self.config.vision_width)

        # one write for all pictures; not masked_scatter: its backward syncs with the GPU
        projected = self.vision_proj(image_features).to(embeddings.dtype)  # (N, P, D)
        positions = placeholder_positions(starts, num_images, self.config.image_tokens)  # (N * P,)
        return embeddings.flatten(0, 1).index_put((positions,), projected.flatten(0, 1)).view_as(embeddings)

    @torch.inference_mode()
    def attention_maps(self, input_ids, image_features, token_ids):
        """How attention was spread over the pictures as each token of an answer was written: (layers, A, N, P).

        input_ids (1, Q): the question; token_ids: the A tokens of its answer. Each value is the share of attention,
        averaged over heads, that the position which predicted the token paid to one vector of one picture. A row sums to
        less than 1: the text gets the rest.
        """
        config = self.config

        # question and answer in one sequence of T tokens; the last one predicts nothing that was written
        written = torch.tensor([token_ids[:-1]], dtype=torch.long, device=input_ids.device)
        x = torch.cat([self.embed(input_ids, image_features), self.tok_embeddings(written)], dim=1)  # (1, T, D)
        position_ids = torch.arange(x.shape[1], device=x.device)
        freqs = rotary_freqs(position_ids[None], config.head_dim, config.rope_theta)

        # rows: the positions that predicted the answer, from the last of the question on; columns: the pictures' positions
        first = input_ids.shape[1] - 1
        future = position_ids > position_ids[first:, None]  # (A, T)
        starts = find_placeholders(input_ids, config.image_ids)
        on_image = placeholder_positions(starts, len(image_features), config.image_tokens)  # (N * P,)

        # scores of these rows only, never T x T; the layer itself does not return them
        maps = []
        for layer in self.layers:
            q, k, _ = layer.attention.project(layer.attention_norm(x), freqs)
            k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)  # (1, H, T, C)
            scores = q[0, :, first:] @ k[0].mT / config.head_dim**0.5  # (H, A, T)
            shares = scores.float().masked_fill(future, -torch.inf).softmax(dim=-1).mean(dim=0)  # (A, T)
            maps.append(shares[:, on_image].unflatten(1, (-1, config.image_tokens)))  # (A, N, P)
            x, _ = layer(x, freqs, mask=None, past_key_values=None, token_mask=None)
        return torch.stack(maps)

    def prepare_inputs_for_generation(self, input_ids, past_key_values=None, image_features=None, **kwargs):
        """For transformers' `generate`: pictures are passed with the prompt only; later steps find them in the cache."""
        inputs = super().prepare_inputs_for_generation(input_ids, past_key_values=past_key_values, **kwargs)
        if past_key_values is None or past_key_values.get_seq_length() == 0:
            inputs["image_features"] = image_features
        return inputs

    def _expand_inputs_for_generation(self, expand_size=1, input_ids=None, image_features=None, **kwargs):
        """For `generate` with several answers or beams a question: all its pictures in order, once for each of them."""
        inputs = super()._expand_inputs_for_generation(expand_size, input_ids=input_ids, **kwargs)
        if image_features is not None:
            starts = find_placeholders(input_ids, self.config.image_ids)
            check_count(starts, len(image_features))
            questions = image_features.split(starts.sum(dim=1).tolist())
            image_features = torch.cat([pictures.repeat(expand_size, 1, 1) for pictures in questions])
        inputs[1]["image_features"] = image_features
        return inputs


def check_count(starts, num_images):
    """ValueError if the number of pictures differs from the number of placeholders, where `starts` (B, T) is True."""
    if starts.sum() != num_images:
        raise ValueError(f"{num_images} images were given, but the text has {int(starts.sum())} image placeholders")


def find_placeholders(input_ids, image_ids):
    """input_ids (B, T) -> (B, T) bool, True where a whole placeholder begins: half of it the first id, half the last.

    If both are the same id, a longer run of it is one placeholder after the other.
    """
    starts = torch.zeros_like(input_ids, dtype=torch.bool)
    size, half = len(image_ids), len(image_ids) // 2
    last = input_ids.shape[1] - size  # the last position at which one could begin
    if last >= 0:
        # windows of the one id and of the other; compare with Python ints: a tensor would need a copy to the device
        left = (input_ids == image_ids[0]).unfold(1, half, 1).all(dim=-1)
        right = (input_ids == image_ids[-1]).unfold(1, size - half, 1).all(dim=-1)
        starts[:, : last + 1] = left[:, : last + 1] & right[:, half:]

        # where both are the same id, any position in a run looks like a start, but only every `size`-th is one
        if image_ids[0] == image_ids[-1]:
            positions = torch.arange(input_ids.shape[1], device=input_ids.device)  # (T,)
            before = (
                torch.where(input_ids != image_ids[0], positions, -1).cummax(dim=1).values
            )  # (B, T), the run's left
            starts &= (positions - before - 1) % size == 0
    return starts


def placeholder_positions(starts, num_images, image_tokens):
    """Flat positions b * T + t (N * P,), in reading order, that the pictures are written to.

    starts (B, T): True where a placeholder begins. N is known, so a stable argsort finds the starts; `nonzero` would sync
    with the GPU to learn how many there are.
    """
    first = starts.flatten().to(torch.uint8).argsort(descending=True, stable=True)[:num_images]  # (N,)
    return (first[:, None] + torch.arange(image_tokens, device=starts.device)).flatten()
