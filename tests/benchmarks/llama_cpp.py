"""A language model of ours in llama.cpp: its weights as a GGUF file, and answers that llama.cpp times itself.

Needs the packages in requirements.txt here. llama.cpp's architecture `llama` computes what a dense MiniMind does: its rotary
embedding turns neighbours as ours does, and the package `gguf` knows our tensors' names, which are those of Meta's Llama.
"""

import gguf
import torch
import xllamacpp
from gguf import GGMLQuantizationType

# what matrices are kept in; vectors are float32 in all of them
TYPES = {
    "float32": GGMLQuantizationType.F32,
    "float16": GGMLQuantizationType.F16,
    "Q8_0": GGMLQuantizationType.Q8_0,
    "Q4_0": GGMLQuantizationType.Q4_0,
}
DIGITS = 4  # of a token's text


def write_gguf(file, model, type_name):
    """Writes a dense `MiniMindLM`, or the language model of a `MiniMindVLM`; type_name: one of `TYPES`.

    Its vocabulary is made up: a token's text is its id in hexadecimal digits, so that an answer's text tells its ids.
    """
    config = model.config
    writer = gguf.GGUFWriter(file, "llama")

    # sizes
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.dim)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.hidden_dim)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)

    # a byte-level BPE needs a merge, even one that no text meets
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"{i:0{DIGITS}x}" for i in range(config.vocab_size)])
    writer.add_token_merges(["0 0"])
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)

    # tensors; without an output matrix, llama.cpp uses the embeddings
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.n_layers)
    for name, tensor in model.state_dict().items():
        if name.startswith("vision_proj.") or (name == "output.weight" and config.tie_word_embeddings):
            continue
        kind = TYPES[type_name] if tensor.ndim == 2 else GGMLQuantizationType.F32
        values = gguf.quants.quantize(tensor.float().numpy(), kind)
        writer.add_tensor(names.get_name(name, try_suffixes=[".weight"]), values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def serve(file, model, type_name):
    """Writes the file and opens it: llama.cpp's server, in this process, with as many threads as PyTorch has.

    "float32" is float32 throughout, as our own model; the others have llama.cpp's defaults, a cache in float16 among them.
    """
    write_gguf(file, model, type_name)
    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.n_ctx = model.config.max_seq_len
    params.n_parallel = 1
    params.cpuparams.n_threads = torch.get_num_threads()
    params.verbosity = -1  # errors only
    if type_name == "float32":
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return xllamacpp.Server(params)


def answer(server, ids, tokens):
    """Greedy tokens after a prompt of these ids: (token ids, tokens/s after the first, seconds to the first)."""
    options = {"n_predict": tokens, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
    response = server.handle_completions({"prompt": ids, **options})
    text, timings = response["choices"][0]["text"], response["timings"]
    written = [int(text[begin : begin + DIGITS], 16) for begin in range(0, len(text), DIGITS)]
    return written, timings["predicted_per_second"], timings["prompt_ms"] / 1000
