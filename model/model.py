"""The MiniMind language model: RMSNorm, rotary embedding, grouped-query attention with a KV cache, SwiGLU, experts.

Shapes: B batch, T new tokens, S all tokens (cached and new), D model width, H heads, K key/value heads,
C width of a head, E routed experts.

A "device sync", here and in other files, is the CPU waiting for the GPU: to read a value, or a size that depends on values.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .LMConfig import LMConfig


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, computed in float32 (Zhang & Sennrich 2019)."""

    def __init__(self, dim, eps):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).type_as(x)


def rotary_freqs(position_ids, head_dim, theta):
    """position_ids (B, T) -> complex numbers of magnitude 1 (B, 1, T, C/2): multiplying by them rotates pair k of a head.

    Computed per call: no buffer to restore after loading, no maximum length.
    """
    exponents = torch.arange(0, head_dim, 2, device=position_ids.device, dtype=torch.float32) / head_dim
    angles = position_ids[:, None, :, None].float() * theta**-exponents
    return torch.complex(angles.cos(), angles.sin())


def apply_rotary(x, freqs):
    """Rotates each pair (2k, 2k+1) of the last dimension of x (B, heads, T, C), read as a complex number (Su et al. 2021).

    The result is float32.
    """
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))  # (B, heads, T, C/2)
    return torch.view_as_real(pairs * freqs).flatten(-2)


class Attention(nn.Module):
    """Causal self-attention in which H query heads share K key/value heads (Ainslie et al. 2023)."""

    def __init__(self, config: LMConfig, layer_idx):
        super().__init__()
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.dropout = config.dropout
        self.wq = nn.Linear(config.dim, config.n_heads * self.head_dim, bias=False)
        self.wk = nn.Linear(config.dim, config.n_kv_heads * self.head_dim, bias=False)
        self.wv = nn.Linear(config.dim, config.n_kv_heads * self.head_dim, bias=False)
        self.wo = nn.Linear(config.n_heads * self.head_dim, config.dim, bias=False)
        self.q_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()

    def project(self, x, freqs):
        """x (B, T, D) -> queries (B, H, T, C), keys and values (B, K, T, C); queries and keys rotated by position."""
        q, k, v = (w(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        # attention's backward in bfloat16 is up to 4x slower on CPUs, so train it in float32
        dtype = torch.float32 if self.training and x.device.type == "cpu" else v.dtype
        q = apply_rotary(self.q_norm(q), freqs)
        k = apply_rotary(self.k_norm(k), freqs)
        return q.to(dtype), k.to(dtype), v.to(dtype)

    def forward(self, x, freqs, mask, past_key_values):
        """x (B, T, D) -> (B, T, D). mask (B, 1, T, S): True where a query may attend; None for plain causal attention."""
        q, k, v = self.project(x, freqs)

        # with a cache, the new keys and values are appended, and queries attend to all of them
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)  # (B, K, S, C)

        # only the flash backend takes grouped keys; others would fall back to a kernel that materialises all T x S scores
        if q.is_cuda and (mask is not None or q.dtype != torch.bfloat16):
            group = q.shape[1] // k.shape[1]
            k = k.repeat_interleave(group, dim=1)  # (B, H, S, C)
            v = v.repeat_interleave(group, dim=1)

        # a single new token attends to everything before it: there is nothing to mask
        is_causal = mask is None and (past_key_values is None or q.shape[2] > 1)
        with torch.autocast(q.device.type, enabled=False):  # autocast would cast q, k, v back to bfloat16
            y = F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=mask,
                dropout_p=self.dropout if self.training else 0.0,
                is_causal=is_causal,
                enable_gqa=q.shape[1] != k.shape[1],
            )  # (B, H, T, C)

        # heads side by side again, mixed by the output matrix
        y = self.wo(y.transpose(1, 2).flatten(2))  # (B, T, D)
        return F.dropout(y, self.dropout, self.training)


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x) (Shazeer 2020)."""

    def __init__(self, config: LMConfig):
        super().__init__()
        self.dropout = config.dropout
        self.w1 = nn.Linear(config.dim, config.hidden_dim, bias=False)  # gate
        self.w2 = nn.Linear(config.hidden_dim, config.dim, bias=False)  # down
        self.w3 = nn.Linear(config.dim, config.hidden_dim, bias=False)  # up

    def forward(self, x):
        return F.dropout(self.w2(F.silu(self.w1(x)) * self.w3(x)), self.dropout, self.training)


class ExpertGate(nn.Module):
    """Chooses the experts of each token: softmax over E scores, the best k, their weights rescaled to sum 1."""

    def __init__(self, config: LMConfig):
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.dim))

    def forward(self, x):
        """x (B, T, D) -> weights (B, T, k), expert numbers (B, T, k), all scores (B, T, E); the scores in float32."""
        with torch.autocast(x.device.type, enabled=False):  # routing must not depend on rounding
            scores = F.linear(x.float(), self.weight.float()).softmax(dim=-1)
        weights, experts = scores.topk(self.top_k, dim=-1)
        return weights / weights.sum(dim=-1, keepdim=True), experts, scores


class MoEFeedForward(nn.Module):
    """Mixture of experts: each token passes through the k feed-forwards that the gate chose and through the shared one."""

    def __init__(self, config: LMConfig):
        super().__init__()
        self.alpha = config.aux_loss_alpha
        self.gate = ExpertGate(config)
        self.experts = nn.ModuleList(FeedForward(config) for _ in range(config.n_routed_experts))
        # one or none: the published tensor names have no number for a second
        self.shared_experts = FeedForward(config) if config.n_shared_experts else None

    def forward(self, x):
        """x (B, T, D) -> (output (B, T, D), chosen experts (B, T, k), scores (B, T, E))."""
        weights, chosen, scores = self.gate(x)
        tokens = x.flatten(0, 1)  # (B*T, D)
        routed = self.grouped_experts if self.training and can_use_grouped_mm(tokens) else self.loop_experts
        y = routed(tokens, weights.flatten(0, 1).type_as(x), chosen.flatten(0, 1))
        if self.shared_experts is not None:
            y = y + self.shared_experts(tokens)
        return y.view_as(x), chosen, scores

    def loop_experts(self, tokens, weights, chosen):
        """tokens (B*T, D), weights and chosen (B*T, k) -> weighted sum of the chosen experts (B*T, D), one after the other.

        An expert that no token chose costs nothing, but to find out takes a device sync.
        """
        y = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            rows, slot = torch.where(chosen == number)
            y = y.index_add(0, rows, (expert(tokens[rows]) * weights[rows, slot, None]).type_as(y))
        return y

    def grouped_experts(self, tokens, weights, chosen):
        """Same result as `loop_experts`, in three grouped matmuls over tokens sorted by expert, without a device sync."""
        dtype = matmul_dtype(tokens)

        # sort the choices by expert; expert e gets the rows from ends[e - 1] to ends[e]
        numbers, order = chosen.flatten().sort(stable=True)  # (B*T*k,)
        ends = torch.searchsorted(
            numbers, torch.arange(len(self.experts), device=tokens.device), right=True
        ).int()  # (E,)
        rows = order // chosen.shape[1]  # the token that each choice belongs to

        # SwiGLU as in `FeedForward`, for all experts at once
        w1, w2, w3 = (
            torch.stack([getattr(expert, name).weight.to(dtype) for expert in self.experts]).mT  # (E, in, out)
            for name in ("w1", "w2", "w3")
        )
        x = tokens[rows].to(dtype)  # (B*T*k, D)
        x = F.silu(F.grouped_mm(x, w1, offs=ends)) * F.grouped_mm(x, w3, offs=ends)
        x = F.dropout(F.grouped_mm(x, w2, offs=ends), self.experts[0].dropout, self.training)

        # weigh the results and add them up where their tokens are
        return torch.zeros_like(tokens).index_add(0, rows, (x * weights.flatten()[order, None]).type_as(tokens))

    def balance_loss(self, chosen, scores, token_mask):
        """How unevenly each sequence uses the experts, times alpha: (B,); alpha itself when the use is perfectly even.

        For every sequence, the sum over experts of (share of choices * E) * (mean score), counting the tokens of
        `token_mask` (B, T) only (DeepSeekMoE's sequence-wise balance loss, as in the published code).
        """
        mask = token_mask[..., None].float()  # (B, T, 1)
        count = mask.sum(dim=1).clamp_min(1)  # (B, 1)
        picked = F.one_hot(chosen, scores.shape[-1]).sum(dim=2) * mask  # (B, T, E)
        share = picked.sum(dim=1) / (count * chosen.shape[-1]) * scores.shape[-1]  # (B, E)
        return (share * (scores * mask).sum(dim=1) / count).sum(dim=-1) * self.alpha


def matmul_dtype(x):
    """The dtype in which a matmul of x runs: autocast's if it is on, else that of x."""
    return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype


def can_use_grouped_mm(x):
    """Whether `F.grouped_mm` is available and fast for x; elsewhere it is missing, or loops with a sync per expert."""
    bfloat16 = matmul_dtype(x) == torch.bfloat16
    if x.is_cuda:
        return bfloat16 and hasattr(F, "grouped_mm") and torch.cuda.get_device_properties(x.device).major >= 9
    return hasattr(F, "grouped_mm") and (bfloat16 or not torch.compiler.is_compiling())


class Block(nn.Module):
    """One pre-norm transformer layer."""

    def __init__(self, config: LMConfig, layer_idx):
        super().__init__()
        self.attention = Attention(config, layer_idx)
        self.feed_forward = MoEFeedForward(config) if config.use_moe else FeedForward(config)
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)

    def forward(self, x, freqs, mask, past_key_values, token_mask):
        """x (B, T, D) -> (x (B, T, D), balance loss (B,) or None); without a token_mask, that loss is not computed."""
        x = x + self.attention(self.attention_norm(x), freqs, mask, past_key_values)
        if not isinstance(self.feed_forward, MoEFeedForward):
            return x + self.feed_forward(self.ffn_norm(x)), None
        y, chosen, scores = self.feed_forward(self.ffn_norm(x))
        loss = None if token_mask is None else self.feed_forward.balance_loss(chosen, scores, token_mask)
        return x + y, loss


class MiniMindLM(PreTrainedModel, GenerationMixin):
    """The language model. Its state dict has exactly the published keys; `output` and `tok_embeddings` are one tensor,
    unless `tie_word_embeddings` is off."""

    config_class = LMConfig
    _tied_weights_keys = {"output.weight": "tok_embeddings.weight"}
    _supports_sdpa = True

    def __init__(self, config: LMConfig):
        super().__init__(config)
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.tok_embeddings

    def set_input_embeddings(self, value):
        self.tok_embeddings = value

    def get_output_embeddings(self):
        return self.output

    def set_output_embeddings(self, value):
        self.output = value

    @staticmethod
    def create_masks_for_generate(attention_mask, **kwargs):
        """transformers' `generate` calls this for caches of fixed size; here `forward` makes the mask, for every cache."""
        return attention_mask

    @torch.no_grad()
    def _init_weights(self, module):
        """Normal with std 0.02; the two matrices that write to the residual stream are scaled down by depth (GPT-2).

        transformers' `init` functions skip tensors that were loaded from a file.
        """
        from transformers import initialization as init

        if isinstance(module, (nn.Linear, nn.Embedding, ExpertGate)):
            init.normal_(module.weight, std=0.02)
            if getattr(module, "bias", None) is not None:
                init.zeros_(module.bias)
        elif isinstance(module, (RMSNorm, nn.LayerNorm)):
            init.ones_(module.weight)
            if isinstance(module, nn.LayerNorm):
                init.zeros_(module.bias)
        elif isinstance(module, (Attention, FeedForward)):
            out = module.wo if isinstance(module, Attention) else module.w2
            init.normal_(out.weight, std=0.02 / (2 * self.config.n_layers) ** 0.5)

    def embed(self, input_ids, image_features=None):
        """input_ids (B, T) -> input of the first layer (B, T, D). The only part of `forward` that the vision model overrides."""
        if image_features is not None:
            raise ValueError("MiniMindLM reads text only; use MiniMindVLM for image_features")
        return self.tok_embeddings(input_ids)

    def forward(
        self,
        input_ids,
        image_features=None,
        labels=None,
        attention_mask=None,
        past_key_values=None,
        use_cache=False,
        position_ids=None,
        logits_to_keep=0,
        num_items_in_batch=None,
        label_positions=None,
        **kwargs,
    ):
        """Predicts the next token at every position.

        input_ids (B, T): token ids; with a cache, only the new ones.
        image_features (N, P, V): for `MiniMindVLM`, the batch's pictures in reading order.
        labels (B, T): aligned with input_ids, shifted here; -100 is ignored.
        attention_mask (B, S): 1 for real tokens, 0 for padding; S counts cached tokens too. Padding on the right needs no
            mask. Or a finished mask (B, 1, T, S), True where a query may attend; it needs position_ids with it.
        past_key_values: a transformers cache, filled in place; `use_cache=True` makes a new one if none is given.
        logits_to_keep: how many of the last positions get logits; 0 for all.
        num_items_in_batch: the divisor of the summed loss; by default the number of labels that are not -100.
        label_positions (L,): flat positions b * T + t whose next token has a label other than -100. Computed here if
            omitted, at the cost of a device sync.

        Returns `loss`, `logits`, `past_key_values`. `loss` is the mean cross-entropy plus, while training experts, their
        balance loss. While training with labels, `logits` holds only the rows that have a label (L, vocab_size), in
        reading order; otherwise it is (B, T, vocab_size).
        """
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        start = past_key_values.get_seq_length() if past_key_values is not None else 0  # tokens in the cache

        # the position of each token, and what it may attend to: the same for all layers
        if position_ids is None:
            position_ids = create_position_ids(attention_mask, start, input_ids)
        freqs = rotary_freqs(position_ids, self.config.head_dim, self.config.rope_theta)  # (B, 1, T, C/2)
        mask = create_causal_mask(attention_mask, start, input_ids, past_key_values)  # (B, 1, T, S) or None

        # experts are balanced over real tokens: a byte-level tokenizer never produces the id of padding, <unk>, from text
        wants_balance = self.config.use_moe and self.training and labels is not None
        token_mask = input_ids != self.config.pad_token_id if wants_balance else None  # (B, T)

        # from embeddings, text and pictures alike, through all layers
        x = F.dropout(self.embed(input_ids, image_features), self.config.dropout, self.training)  # (B, T, D)
        balance = 0.0  # (B,)
        for layer in self.layers:
            x, layer_balance = layer(x, freqs, mask, past_key_values, token_mask)
            if layer_balance is not None:
                balance = balance + layer_balance
        x = self.norm(x)

        # answering, or measuring: logits at every position that was asked for
        if labels is None or not self.training:
            logits = self.output(x[:, -logits_to_keep:])  # (B, T or logits_to_keep, vocab_size)
            loss = None
            if labels is not None:
                loss = mean_loss(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), num_items_in_batch)
            return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)

        # training: logits only where a label needs them, as most of a batch is questions, pictures and padding
        if label_positions is None:
            label_positions = positions_before_labels(labels)
        logits = self.output(x.flatten(0, 1).index_select(0, label_positions))  # (L, vocab_size)
        loss = mean_loss(logits, labels.flatten()[label_positions + 1], num_items_in_batch)
        if wants_balance:
            # weight each sequence by its number of labels, so that the loss does not depend on how the batch is split
            divisor = len(label_positions) if num_items_in_batch is None else num_items_in_batch
            loss = loss + (balance * (labels[:, 1:] != -100).sum(dim=1)).sum() / divisor
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)


def positions_before_labels(labels):
    """labels (B, T) -> (L,) flat positions b * T + t, in reading order, whose next token has a label other than -100."""
    return F.pad(labels[:, 1:] != -100, (0, 1)).flatten().nonzero()[:, 0]


def mean_loss(logits, targets, num_items):
    """Cross-entropy of logits (L, vocab_size) against targets (L,): the sum over `num_items`, or by default the mean."""
    if num_items is None:
        return F.cross_entropy(logits.float(), targets, ignore_index=-100)
    return F.cross_entropy(logits.float(), targets, ignore_index=-100, reduction="sum") / num_items


def create_position_ids(attention_mask, start, input_ids):
    """(B or 1, T) position of each new token in its own sequence, not counting padding on the left."""
    length = input_ids.shape[1]
    if attention_mask is None:
        return torch.arange(length, device=input_ids.device)[None] + start
    return (attention_mask.long().cumsum(dim=-1) - 1).clamp_min(0)[:, -length:]


def create_causal_mask(attention_mask, start, input_ids, past_key_values):
    """(B or 1, 1, T, S) bool, True where a query (row) may attend to a key (column); None if plain causal attention does.

    start: number of tokens in the cache.
    """
    if attention_mask is not None and attention_mask.ndim == 4:
        return attention_mask  # finished already

    # S: as many columns as the cache will return keys; a cache of fixed size always returns all of its own
    length = input_ids.shape[1]
    width = length
    if past_key_values is not None:
        width = past_key_values.get_mask_sizes(length, 0)[0]
    if attention_mask is None and width == start + length and (start == 0 or length == 1):
        return None

    # a query attends to itself and to what came before
    queries = torch.arange(length, device=input_ids.device)[:, None] + start  # (T, 1)
    keys = torch.arange(width, device=input_ids.device)[None]  # (1, S)
    causal = keys <= queries  # (T, S)
    if attention_mask is None:
        return causal[None, None]

    # padding is hidden from all but itself: a fully masked row would give NaN
    real = F.pad(attention_mask.bool(), (0, width - attention_mask.shape[1]), value=False)[:, None]  # (B, 1, S)
    return (causal & (real | (keys == queries)))[:, None]
