"""Both models as ONNX graphs of a few large operators: on CPUs, ONNX Runtime runs them faster than PyTorch its many small ones.

Optional: `pip install onnxruntime onnx`. A graph is made from a loaded model's own tensors, in a fraction of a second.

    language_graph    embeddings (B, T, D) and a cache  ->  logits (B, vocab_size) of each row's last token, and the cache
    vision_graph      normalised pixels (N, 3, S, S)    ->  features (N, P, V)
    add_projector     features (N, P, V)                ->  image embeddings (N, P, D)

In 8 bits, the product for a single row has a scale for every 32 numbers of a matrix's row (its time goes into reading
matrices), the one for many rows, prompts and pictures, a scale for each row (its time goes into multiplying). Inputs are
rounded to 8 bits too; biases and norms stay in float32.
Shapes: B rows, T tokens, D model width, K key/value heads, L columns of the cache, C width of a head; S, N, P, V as in
vision_utils.py.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from .errors import BadInput

BLOCK = 32  # numbers that share a scale
ACTIVATIONS = {  # of encoders
    "quick_gelu": ("QuickGelu", {"alpha": 1.702}),
    "gelu": ("Gelu", {}),
    "gelu_pytorch_tanh": ("Gelu", {"approximate": "tanh"}),
}
# ONNX Runtime's own operators (domain com.microsoft)
FUSED = {
    "DynamicQuantizeMatMul",
    "FusedMatMul",
    "GroupQueryAttention",
    "MatMulNBits",
    "MultiHeadAttention",
    "QuickGelu",
    "SkipLayerNormalization",
    "SkipSimplifiedLayerNormalization",
}


def has_runtime():
    """Whether onnxruntime and onnx are installed."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
    except ImportError:
        return False
    return True


class Graph:
    """A graph as it grows: its operators, the tensors they read, its inputs and outputs.

    int8: matrices in 8 bits. many_rows: choose the product that is fast for many rows, not the one for a single row.
    """

    def __init__(self, int8, many_rows):
        self.int8, self.many_rows = int8, many_rows
        self.nodes, self.tensors = [], {}
        self.inputs, self.outputs = [], []

    def tensor(self, name, value):
        value = value.detach().contiguous()
        # in 8 bits nothing of the file that the model was loaded from should stay in memory
        self.tensors[name] = (value.clone() if self.int8 else value).numpy()
        return name

    def add(self, operator, inputs, *outputs, **attributes):
        """An operator; returns the name of its first output."""
        from onnx.helper import make_node

        domain = "com.microsoft" if operator in FUSED else ""
        self.nodes.append(make_node(operator, inputs, outputs, domain=domain, **attributes))
        return outputs[0]

    def linear(self, name, x, weight, bias=None):
        """x (..., in) times a matrix (out, in)."""
        weight = weight.detach().float()
        bias = "" if bias is None else self.tensor(f"{name}.bias", bias.float())
        if self.int8 and self.many_rows:
            # of them 7 bits: CPUs without VNNI add two products of them and inputs in 16 bits, which 8 would overflow
            numbers, scales = quantize(weight, weight.shape[1], most=63)
            zero = self.tensor(f"{name}.zero", torch.zeros(len(weight), dtype=torch.int8))
            inputs = [self.tensor(f"{name}.int8", numbers[:, 0].T), self.tensor(f"{name}.scales", scales), zero]
            return self.add("DynamicQuantizeMatMul", [x, *inputs, bias], name)
        if self.int8:
            numbers, scales = quantize(weight, BLOCK)
            numbers = numbers.view(torch.uint8) ^ 128  # stored unsigned, with 128 for zero
            inputs = [x, self.tensor(f"{name}.int8", numbers), self.tensor(f"{name}.scales", scales), "", "", bias]
            sizes = {"N": weight.shape[0], "K": weight.shape[1], "bits": 8, "block_size": BLOCK}
            return self.add("MatMulNBits", inputs, name, **sizes, accuracy_level=4)
        product = f"{name}.product" if bias else name
        self.add("FusedMatMul", [x, self.tensor(f"{name}.weight", weight)], product, transB=1)
        return self.add("Add", [product, bias], name) if bias else name

    def norm(self, name, norm, eps, x, branch=None):
        """The norm of x, or of x + branch; returns the names of both, (the norm, what it was taken of).

        norm: an RMSNorm, or a LayerNorm, which has a bias.
        """
        parts = [self.tensor(f"{name}.weight", norm.weight.float())]
        kind = "SimplifiedLayerNormalization"
        if getattr(norm, "bias", None) is not None:
            parts.append(self.tensor(f"{name}.bias", norm.bias.float()))
            kind = "LayerNormalization"
        if branch is None:
            return self.add(kind, [x, *parts], name, epsilon=eps), x
        self.add(f"Skip{kind}", [x, branch, *parts], name, "", "", f"{name}.sum", epsilon=eps)
        return name, f"{name}.sum"

    def declare(self, name, shape, kind="FLOAT"):
        """An entry of `inputs` or `outputs`; a text in its shape is a dimension of any size."""
        import onnx

        return onnx.helper.make_tensor_value_info(name, getattr(onnx.TensorProto, kind), shape)

    def to_onnx(self, with_tensors):
        """The finished `onnx.ModelProto`; without its tensors, it says that they come from elsewhere."""
        import onnx

        graph = onnx.helper.make_graph(self.nodes, "minimind-v", self.inputs, self.outputs)
        for name, value in self.tensors.items():
            # sizes and positions are part of the graph
            if with_tensors or value.dtype == np.int64:
                graph.initializer.append(onnx.numpy_helper.from_array(value, name))
                continue
            kind = onnx.helper.np_dtype_to_tensor_dtype(value.dtype)
            tensor = graph.initializer.add(name=name, data_type=kind, dims=value.shape)
            tensor.data_location = onnx.TensorProto.EXTERNAL
            tensor.external_data.add(key="location", value="memory")
        opsets = [onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid("com.microsoft", 1)]
        return onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)

    def save(self, file):
        """Writes the graph to `file`, and its tensors to a file beside it, with `.data` after its name."""
        import onnx

        data = file.with_name(f"{file.name}.data")
        data.unlink(missing_ok=True)  # onnx would append to it
        onnx.save_model(self.to_onnx(with_tensors=True), file, save_as_external_data=True, location=data.name)
        data.chmod(file.stat().st_mode)  # onnx lets nobody else read it

    def session(self):
        """An ONNX Runtime session of this graph, on as many threads as PyTorch has."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3  # errors only
        options.add_session_config_entry("session.force_spinning_stop", "1")  # between runs, leave the cores to PyTorch

        # the session reads the tensors where they are, for as long as it lives
        names = [name for name, value in self.tensors.items() if value.dtype != np.int64]
        values = [onnxruntime.OrtValue.ortvalue_from_numpy(self.tensors[name]) for name in names]
        options.add_external_initializers(names, values)
        graph = self.to_onnx(with_tensors=False).SerializeToString()
        try:
            session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # noqa: BLE001  its own kinds, which it does not export
            text = str(error).splitlines()[0][:200]
            raise BadInput(
                f"ONNX Runtime {onnxruntime.__version__} can't run this model ({text}): pip install -U onnxruntime onnx"
            ) from None
        session.tensors = self.tensors
        return session


def quantize(weight, block, most=127):
    """A matrix (out, in) as 8-bit numbers (out, blocks, block), up to `most`, and the scale of each block (out * blocks,)."""
    blocks = F.pad(weight, (0, -weight.shape[1] % block)).unflatten(1, (-1, block))
    scales = (torch.linalg.vector_norm(blocks, torch.inf, dim=-1) / most).clamp_min(1e-12)
    return (blocks / scales[..., None]).round_().to(torch.int8), scales.flatten()


def not_a_graph(config):
    """What a language model has that its graph can't express; None if it has nothing of the kind."""
    if config.use_moe:
        return "experts"
    if config.head_dim % 16:  # as the operator for attention wants it
        return f"heads of width {config.head_dim}, which is no multiple of 16"
    return None


def language_graph(model, int8=False, many_rows=False):
    """The graph of a MiniMindLM's layers and output.

    Inputs: `embeddings` (B, T, D), padded on the right; `lengths` (B,): tokens of each row, cached and new, minus 1, as the
    operator for attention wants it; `longest`: tokens of the longest row; `last` (B,): the position b * T + t of each row's
    last token; `cos` and `sin` of the rotary embedding (positions, C/2); `keys.N` and `values.N` (B, K, L, C): the cache of
    layer N. Outputs: `logits` (B, vocab_size), and `new_keys.N`, `new_values.N`: the cache with the new tokens behind each
    row's own. Bind old and new to the same memory, and nothing is copied. BadInput says what can't be a graph.
    """
    config = model.config
    reason = not_a_graph(config)
    if reason:
        raise BadInput(f"ONNX Runtime can't run this model: it has {reason}")
    graph = Graph(int8, many_rows)
    attention = {"num_heads": config.n_heads, "kv_num_heads": config.n_kv_heads}
    attention |= {"do_rotary": 1, "rotary_interleaved": 1}
    cache = []

    x, branch = "embeddings", None  # the next layer reads x + branch
    for number, layer in enumerate(model.layers):
        own = layer.attention
        normed, x = graph.norm(f"{number}.attention_norm", layer.attention_norm, config.norm_eps, x, branch)
        if config.qk_norm:
            q, k = (
                norm_of_heads(
                    graph, f"{number}.{name}", getattr(own, f"{name}_norm"), config, normed, getattr(own, f"w{name}")
                )
                for name in "qk"
            )
            qkv = [q, k, graph.linear(f"{number}.v", normed, own.wv.weight)]
        else:
            together = torch.cat([own.wq.weight, own.wk.weight, own.wv.weight])
            qkv = [graph.linear(f"{number}.qkv", normed, together), "", ""]
        caches = [f"{kind}.{number}" for kind in ("keys", "values")]
        cache += caches
        inputs = [*qkv, *caches, "lengths", "longest", "cos", "sin"]
        graph.add("GroupQueryAttention", inputs, f"{number}.heads", *(f"new_{name}" for name in caches), **attention)
        branch = graph.linear(f"{number}.wo", f"{number}.heads", own.wo.weight)

        # SwiGLU; QuickGelu with alpha 1 is silu
        normed, x = graph.norm(f"{number}.ffn_norm", layer.ffn_norm, config.norm_eps, x, branch)
        gate, up = (
            graph.linear(f"{number}.{name}", normed, getattr(layer.feed_forward, name).weight) for name in ("w1", "w3")
        )
        hidden = graph.add("Mul", [graph.add("QuickGelu", [gate], f"{number}.silu", alpha=1.0), up], f"{number}.hidden")
        product = uneven_rows if int8 and many_rows else Graph.linear
        branch = product(graph, f"{number}.w2", hidden, layer.feed_forward.w2.weight)

    # logits of each row's last token only
    normed, _ = graph.norm("norm", model.norm, config.norm_eps, x, branch)
    flat = graph.add("Reshape", [normed, graph.tensor("rows", torch.tensor([-1, config.dim]))], "flat")
    graph.linear("logits", graph.add("Gather", [flat, "last"], "last_of_each", axis=0), model.output.weight)

    shape = ["B", config.n_kv_heads, "L", config.head_dim]
    graph.inputs = [
        graph.declare("embeddings", ["B", "T", config.dim]),
        graph.declare("lengths", ["B"], "INT32"),
        graph.declare("longest", [], "INT32"),
        graph.declare("last", ["B"], "INT64"),
        *(graph.declare(name, ["positions", config.head_dim // 2]) for name in ("cos", "sin")),
        *(graph.declare(name, shape) for name in cache),
    ]
    logits = graph.declare("logits", ["B", config.vocab_size])
    graph.outputs = [logits, *(graph.declare(f"new_{name}", shape) for name in cache)]
    return graph


def norm_of_heads(graph, name, norm, config, x, linear):
    """Queries or keys with a norm of their own, head by head: (B, T, heads * C)."""
    heads = graph.linear(f"{name}.flat", x, linear.weight)
    apart = graph.tensor(f"{name}.apart", torch.tensor([0, 0, -1, config.head_dim]))
    heads = graph.add("Reshape", [heads, apart], f"{name}.heads")
    normed, _ = graph.norm(f"{name}.norm", norm, config.norm_eps, heads)
    return graph.add("Reshape", [normed, graph.tensor(f"{name}.together", torch.tensor([0, 0, -1]))], name)


def uneven_rows(graph, name, x, weight):
    """`Graph.linear` for rows (..., in) of very different size.

    All rows of an input are rounded to 8 bits on one scale, so that small ones would become zero beside a large one: each
    row is divided by its largest number first.
    """
    sizes = graph.add("Abs", [x], f"{name}.sizes")
    axis = graph.tensor(f"{name}.axis", torch.tensor([-1]))
    largest = graph.add("ReduceMax", [sizes, axis], f"{name}.largest", keepdims=1)
    largest = graph.add("Max", [largest, graph.tensor(f"{name}.least", torch.tensor(1e-12))], f"{name}.divisor")
    even = graph.linear(f"{name}.product", graph.add("Div", [x, largest], f"{name}.even"), weight)
    return graph.add("Mul", [even, largest], name)


def vision_graph(model, int8=False):
    """The graph of a CLIP or SigLIP: input `pixels` (N, 3, S, S), normalised, output `features` (N, P, V).

    As `VisionEncoder` takes them: of a CLIP before its last norm, of a SigLIP after it. BadInput if its activation is unknown.
    """
    config = model.config
    vision = getattr(model, "vision_model", model)
    has_class_token = config.model_type == "clip_vision_model"
    if config.hidden_act not in ACTIVATIONS:
        raise BadInput(f"an encoder with the activation {config.hidden_act} can't be made an ONNX graph")
    graph = Graph(int8, many_rows=True)
    eps, width, side = config.layer_norm_eps, config.hidden_size, config.patch_size

    # patches as rows; the class token is a row of zeros before them, and its vector comes with its position
    patches = vision.embeddings.patch_embedding
    inputs = ["pixels", graph.tensor("patches.weight", patches.weight.float())]
    if patches.bias is not None:
        inputs.append(graph.tensor("patches.bias", patches.bias.float()))
    x = graph.add("Conv", inputs, "grid", kernel_shape=[side, side], strides=[side, side])
    x = graph.add("Reshape", [x, graph.tensor("columns", torch.tensor([0, width, -1]))], "patches")
    x = graph.add("Transpose", [x], "patches.rows", perm=[0, 2, 1])
    positions = vision.embeddings.position_embedding.weight.float()
    if has_class_token:
        positions = torch.cat([positions[:1] + vision.embeddings.class_embedding.float(), positions[1:]])
        x = graph.add("Pad", [x, graph.tensor("row", torch.tensor([0, 1, 0, 0, 0, 0]))], "patches.padded")
    x, branch = graph.add("Add", [x, graph.tensor("positions", positions)], "embeddings"), None
    if has_class_token:
        x, _ = graph.norm("pre_layrnorm", vision.pre_layrnorm, eps, x)

    for number, layer in enumerate(vision.encoder.layers):
        normed, x = graph.norm(f"{number}.norm1", layer.layer_norm1, eps, x, branch)
        own, heads = layer.self_attn, f"{number}.heads"
        projections = [(f"{number}.{kind}", getattr(own, f"{kind}_proj")) for kind in "qkv"]
        qkv = [graph.linear(name, normed, linear.weight, linear.bias) for name, linear in projections]
        graph.add("MultiHeadAttention", qkv, heads, num_heads=config.num_attention_heads)
        branch = graph.linear(f"{number}.out", heads, own.out_proj.weight, own.out_proj.bias)

        normed, x = graph.norm(f"{number}.norm2", layer.layer_norm2, eps, x, branch)
        hidden = graph.linear(f"{number}.fc1", normed, layer.mlp.fc1.weight, layer.mlp.fc1.bias)
        activation, options = ACTIVATIONS[config.hidden_act]
        hidden = graph.add(activation, [hidden], f"{number}.activation", **options)
        branch = graph.linear(f"{number}.fc2", hidden, layer.mlp.fc2.weight, layer.mlp.fc2.bias)

    if has_class_token:
        graph.add("Add", [x, branch], "features")
    else:
        graph.norm("features", vision.post_layernorm, eps, x, branch)
    graph.inputs = [graph.declare("pixels", ["N", 3, config.image_size, config.image_size])]
    graph.outputs = [graph.declare("features", ["N", "P", width])]
    return graph


def add_projector(graph, encoder, projector):
    """Continues a `vision_graph`: the vectors that `encoder` keeps, projected: output `image_embeddings` (N, P, D)."""
    x = "features"
    if encoder.first:
        ends = [
            graph.tensor(name, torch.tensor([value])) for name, value in (("first", 1), ("end", 2**31), ("axis", 1))
        ]
        x = graph.add("Slice", [x, *ends], "patches_only")
    (layers,) = projector.children()
    for number, layer in enumerate(layers):
        name = f"projector.{number}"
        if isinstance(layer, nn.Linear):
            x = graph.linear(name, x, layer.weight, layer.bias)
        elif isinstance(layer, nn.LayerNorm):
            x, _ = graph.norm(name, layer, layer.eps, x)
        else:
            x = graph.add("Gelu", [x], name)
    x = graph.add("Identity", [x], "image_embeddings")
    graph.outputs = [graph.declare(x, ["N", "P", layers[-1].out_features])]
    return graph
