"""A GGUF file of the chatglm architecture with random weights, for llama_peer.py.

    python benchmarks/peers/make_gguf.py DIRECTORY OUT.gguf F16|Q8_0|Q4_0

DIRECTORY/config.json, a ChatGLM2 one, gives the shapes. Every matrix is of the type asked for,
norms and biases are F32. Values are cut from one random block at different places, as in six_b.py.
The vocabulary has ids and no texts: the peer is given ids.
"""

import json
import struct
import sys
from pathlib import Path

import numpy as np

ALIGNMENT = 32
F32 = 0  # enum ggml_type
TYPES = {"F16": 1, "Q4_0": 2, "Q8_0": 8}
FILE_TYPES = {"F16": 1, "Q4_0": 2, "Q8_0": 7}  # enum llama_ftype
BLOCK = 32  # weights that share a scale
PIECE = 1 << 22  # weights encoded at a time


def encode(values, kind):
    """Bytes of float32 values (n), n a multiple of 32, as ggml's quantize_row_* reference writes
    them: block after block a float16 scale and then the integers."""
    if kind == "F16":
        return values.astype(np.float16).view(np.uint8)
    blocks = values.reshape(-1, BLOCK)
    rows = np.arange(len(blocks))
    if kind == "Q8_0":  # scale = max|x| / 127; 32 int8
        scale = np.abs(blocks).max(1) / 127
        integers = np.rint(blocks * reciprocal(scale)).astype(np.int8).view(np.uint8)
    else:  # Q4_0: scale = x / -8 of the largest |x|; 16 bytes, element j low, j + 16 high
        scale = blocks[rows, np.abs(blocks).argmax(1)] / -8
        four = np.minimum((blocks * reciprocal(scale) + 8.5).astype(np.uint8), 15)
        integers = four[:, :16] | four[:, 16:] << 4
    out = np.empty((len(blocks), 2 + integers.shape[1]), np.uint8)
    out[:, :2] = scale.astype(np.float16)[:, None].view(np.uint8)
    out[:, 2:] = integers
    return out.reshape(-1)


def reciprocal(scale):
    return np.divide(1, scale, out=np.zeros_like(scale), where=scale != 0)[:, None]


def nbytes(n, kind):
    return n * {"F32": 128, "F16": 64, "Q8_0": 34, "Q4_0": 18}[kind] // BLOCK


def shapes(c):
    """(name, shape as NumPy has it) of every tensor, in the order of the file."""
    C, F, V = c["hidden_size"], c["ffn_hidden_size"], c["padded_vocab_size"]  # noqa: N806
    AO = c["num_attention_heads"] * c["kv_channels"]  # noqa: N806
    QKV = AO + 2 * c["multi_query_group_num"] * c["kv_channels"]  # noqa: N806
    yield "token_embd.weight", (V, C)
    yield "output_norm.weight", (C,)
    yield "output.weight", (V, C)
    for i in range(c["num_layers"]):
        yield f"blk.{i}.attn_norm.weight", (C,)
        yield f"blk.{i}.attn_qkv.weight", (QKV, C)
        yield f"blk.{i}.attn_qkv.bias", (QKV,)
        yield f"blk.{i}.attn_output.weight", (C, AO)
        yield f"blk.{i}.ffn_norm.weight", (C,)
        yield f"blk.{i}.ffn_up.weight", (2 * F, C)
        yield f"blk.{i}.ffn_down.weight", (C, F)


def string(text):
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def metadata(c, kind):
    """The header's (key, value); ints are uint32."""
    pairs = {
        "general.architecture": "chatglm",
        "general.file_type": FILE_TYPES[kind],
        "general.alignment": ALIGNMENT,
        "chatglm.vocab_size": c["padded_vocab_size"],
        "chatglm.context_length": c["seq_length"],
        "chatglm.embedding_length": c["hidden_size"],
        "chatglm.feed_forward_length": c["ffn_hidden_size"],
        "chatglm.block_count": c["num_layers"],
        "chatglm.attention.head_count": c["num_attention_heads"],
        "chatglm.attention.head_count_kv": c["multi_query_group_num"],
        "chatglm.attention.layer_norm_rms_epsilon": c["layernorm_epsilon"],
        "chatglm.rope.dimension_count": c["kv_channels"] // 2,
        "chatglm.rope.freq_base": 10000.0,
        "tokenizer.ggml.model": "none",
    }
    packed = b""
    for key, value in pairs.items():
        packed += string(key)
        if isinstance(value, str):
            packed += struct.pack("<I", 8) + string(value)
        elif isinstance(value, float):
            packed += struct.pack("<If", 6, value)
        else:
            packed += struct.pack("<II", 4, value)
    return len(pairs), packed


def make(config, path, kind):
    """Write the file."""
    tensors = list(shapes(config))
    n_pairs, packed = metadata(config, kind)
    header = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), n_pairs) + packed
    offset = 0
    for name, shape in tensors:
        of = kind if len(shape) == 2 else "F32"
        header += string(name) + struct.pack("<I", len(shape))
        header += struct.pack(f"<{len(shape)}Q", *shape[::-1])
        header += struct.pack("<IQ", TYPES.get(of, F32), offset)
        offset += -(-nbytes(int(np.prod(shape)), of) // ALIGNMENT) * ALIGNMENT
    values = np.random.default_rng(0).normal(0, 0.02, PIECE + 10000 * BLOCK).astype(np.float32)
    block = encode(values, kind)
    with open(path, "wb") as f:
        f.write(header + bytes(-len(header) % ALIGNMENT))
        for place, (name, shape) in enumerate(tensors):
            if len(shape) == 1:
                data = np.full(shape, 0.0 if name.endswith("bias") else 1.0, np.float32)
                f.write(data.tobytes() + bytes(-data.nbytes % ALIGNMENT))
                continue
            total = nbytes(shape[0] * shape[1], kind)
            start, piece = nbytes(131 * place % 9973 * BLOCK, kind), nbytes(PIECE, kind)
            for done in range(0, total, piece):
                f.write(block[start : start + min(piece, total - done)])
            f.write(bytes(-total % ALIGNMENT))


def main():
    if len(sys.argv) != 4 or sys.argv[3] not in TYPES:
        sys.exit(__doc__)
    make(json.loads((Path(sys.argv[1]) / "config.json").read_text()), *sys.argv[2:])


if __name__ == "__main__":
    main()
