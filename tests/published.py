"""The published model written a second time, from its description alone: plain functions on a dictionary of tensors.

It shares nothing with `model/` but the names of the tensors, so that each can be tested against the other. Everything is
spelled out: rotation by complex numbers, one matrix of attention per head, each token through its own experts.
"""

import torch


def forward(state, tokens, features, n_heads, n_kv_heads):
    """Logits (B, T, vocab) of token ids (B, T) and image features (N, 50, 768), in reading order, for published weights."""
    state = {name: tensor.double() for name, tensor in state.items()}
    layers = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("layers."))
    x = see(state, tokens, state["tok_embeddings.weight"][tokens], features)
    for i in range(layers):
        layer = {name.removeprefix(f"layers.{i}."): t for name, t in state.items() if name.startswith(f"layers.{i}.")}
        x = x + attention(layer, normal(x, layer["attention_norm.weight"]), n_heads, n_kv_heads)
        h = normal(x, layer["ffn_norm.weight"])
        x = x + (experts(layer, h) if "feed_forward.gate.weight" in layer else swiglu(layer, "feed_forward.", h))
    return normal(x, state["norm.weight"]) @ state["output.weight"].T


def see(state, tokens, x, features):
    """Writes each picture over its 25 `<` (30) and 25 `>` (32), one after the other."""
    if features is None:
        return x
    pictures = iter(features.double() @ state["vision_proj.vision_proj.0.weight"].T)
    placeholder = [30] * 25 + [32] * 25
    x = x.clone()
    for b, row in enumerate(tokens.tolist()):
        for t in range(len(row) - 49):
            if row[t : t + 50] == placeholder:
                x[b, t : t + 50] = next(pictures) + state.get("vision_proj.vision_proj.0.bias", 0.0)
    return x


def normal(x, weight):
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def attention(layer, x, n_heads, n_kv_heads):
    length, width = x.shape[1], layer["attention.wq.weight"].shape[0] // n_heads
    angles = torch.arange(length)[:, None] * 10000.0 ** (-torch.arange(0, width, 2).double() / width)
    turn = torch.polar(torch.ones_like(angles), angles)  # (T, width / 2)
    future = torch.ones(length, length).triu(1).bool()
    q, k, v = (x @ layer[f"attention.{w}.weight"].T for w in ("wq", "wk", "wv"))
    out = []
    for h in range(n_heads):
        g = h // (n_heads // n_kv_heads)
        qh, kh, vh = (
            q[..., h * width :][..., :width],
            k[..., g * width :][..., :width],
            v[..., g * width :][..., :width],
        )
        qh, kh = (
            torch.view_as_real(torch.view_as_complex(t.reshape(*t.shape[:-1], -1, 2)) * turn).flatten(-2)
            for t in (qh, kh)
        )
        scores = (qh @ kh.transpose(1, 2) / width**0.5).masked_fill(future, -torch.inf)
        out.append(scores.softmax(-1) @ vh)
    return torch.cat(out, -1) @ layer["attention.wo.weight"].T


def swiglu(layer, name, x):
    gate = x @ layer[f"{name}w1.weight"].T
    return (gate * gate.sigmoid() * (x @ layer[f"{name}w3.weight"].T)) @ layer[f"{name}w2.weight"].T


def experts(layer, x):
    """The best two of the routed experts, weighted to sum 1, and the shared one."""
    y = swiglu(layer, "feed_forward.shared_experts.", x)
    scores = (x @ layer["feed_forward.gate.weight"].T).softmax(-1)
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            best = scores[b, t].argsort(descending=True)[:2].tolist()
            for e in best:
                share = scores[b, t, e] / scores[b, t, best].sum()
                y[b, t] += share * swiglu(layer, f"feed_forward.experts.{e}.", x[b, t])
    return y
