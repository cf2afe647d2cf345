"""Every size, token id and switch of MiniMind-V, in one class."""

from transformers import PretrainedConfig

from .errors import BadInput


class LMConfig(PretrainedConfig):
    """Configuration of `MiniMindLM` and `MiniMindVLM`; the defaults are the published 512+8 model (27M parameters).

    dim, n_layers, n_heads, n_kv_heads: width D, depth, attention heads H and key/value heads K of the language model.
    head_dim: width C of a head; None means dim / n_heads.
    qk_norm: whether queries and keys pass through an RMSNorm each (Qwen3, MiniMind-3).
    vocab_size: number of token ids; `pad_token_id` 0, `bos_token_id` 1 and `eos_token_id` 2 as in the published tokenizer.
    hidden_dim: width of the SwiGLU feed-forward; None means int(2 * 4 * dim / 3) rounded up to `multiple_of`.
    max_seq_len: the longest prompt plus answer, in tokens, images included.
    rope_theta: base of the rotary embedding's frequencies.
    dropout: applied to embeddings, attention and feed-forward outputs while training.
    vision_width, image_tokens: width V and number P of the vectors one picture becomes (768 and 50 for CLIP ViT-B/32).
    drop_class_token: whether the first vector of a CLIP is left out, as in MiniMind2-V.
    projector: "linear", or "mlp" (LayerNorm, Linear, GELU, Linear) as in minimind-3v.
    vision_bias: whether the linear projector has a bias (the published weights have one; weights trained here don't).
    image_special_token, image_ids: the placeholder of one image as text and as token ids, both `image_tokens` long.
        Its first half repeats the first of `image_chars`, its second half the other; `image_char_ids` are their ids.
    use_moe: replaces each feed-forward by `n_routed_experts` experts; a gate sends each token to `num_experts_per_tok` of
        them. `n_shared_experts` is a switch, 1 or 0 (a bool in the published code): one more expert that every token uses.
        `aux_loss_alpha` weighs the loss that spreads tokens over the experts.
    """

    model_type = "minimind-v"
    attribute_map = {
        "hidden_size": "dim",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_kv_heads",
        "max_position_embeddings": "max_seq_len",
    }

    def __init__(
        self,
        dim=512,
        n_layers=8,
        n_heads=16,
        n_kv_heads=8,
        head_dim=None,
        qk_norm=False,
        vocab_size=6400,
        hidden_dim=None,
        multiple_of=64,
        norm_eps=1e-5,
        max_seq_len=512,
        rope_theta=10000.0,
        dropout=0.0,
        vision_width=768,
        image_tokens=50,
        drop_class_token=False,
        projector="linear",
        vision_bias=False,
        image_chars=("<", ">"),
        image_char_ids=(30, 32),
        use_moe=False,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_shared_experts=1,
        aux_loss_alpha=0.01,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=True,
        **kwargs,
    ):
        if (dim % n_heads and not head_dim) or n_heads % n_kv_heads:
            raise BadInput(
                f"dim {dim}, n_heads {n_heads}, n_kv_heads {n_kv_heads}: dim must be a multiple of n_heads, "
                "and n_heads of n_kv_heads"
            )
        if n_shared_experts not in (0, 1):
            raise BadInput(f"n_shared_experts is {n_shared_experts}: use 1 for a shared expert or 0 for none")
        self.dim = dim
        self.n_layers = n_layers
        self.n_heads = n_heads
        self.n_kv_heads = n_kv_heads
        self.head_dim = head_dim or dim // n_heads
        self.qk_norm = qk_norm
        self.vocab_size = vocab_size
        self.multiple_of = multiple_of
        self.hidden_dim = hidden_dim or -(-int(2 * 4 * dim / 3) // multiple_of) * multiple_of
        self.norm_eps = norm_eps
        self.max_seq_len = max_seq_len
        self.rope_theta = rope_theta
        self.dropout = dropout
        self.vision_width = vision_width
        self.image_tokens = image_tokens
        self.drop_class_token = drop_class_token
        self.projector = projector
        self.vision_bias = vision_bias
        self.image_chars = list(image_chars)
        self.image_char_ids = list(image_char_ids)
        self.use_moe = use_moe
        self.n_routed_experts = n_routed_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.n_shared_experts = n_shared_experts
        self.aux_loss_alpha = aux_loss_alpha
        super().__init__(
            pad_token_id=pad_token_id,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            tie_word_embeddings=tie_word_embeddings,
            **kwargs,
        )

    def _placeholder(self, left, right):
        """A list of `image_tokens` items: the first half `left`, the rest `right`."""
        half = self.image_tokens // 2
        return [left] * half + [right] * (self.image_tokens - half)

    @property
    def image_special_token(self):
        return "".join(self._placeholder(*self.image_chars))

    @property
    def image_ids(self):
        return self._placeholder(*self.image_char_ids)
