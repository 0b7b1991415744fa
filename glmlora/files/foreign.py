"""What a file or folder is that this package does not read, and what to get instead."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

INSTEAD = "get the model's own weights, in safetensors or pytorch_model.bin form"
UNQUANTIZED = (
    "this package reads float weights and its publisher's own int4 and int8 files; get the "
    "unquantized model (float16 or bfloat16), which load_in_4bit=True, load_in_8bit=True or "
    "model.quantize(4) makes small here"
)

_FIRST_BYTES = (
    (b"GGUF", "a GGUF file of llama.cpp"),
    (b"ggml", "a GGML file"),
    (b"lmgg", "a GGML file"),
    (b"tjgg", "a GGML file"),
    (b"\x89HDF", "an HDF5 file (Keras, TensorFlow)"),
    (b"\x1f\x8b", "packed by gzip"),
    (b"7z\xbc\xaf", "packed by 7-Zip"),
    (b"Rar!", "packed by RAR"),
    (b"\xfd7zXZ", "packed by xz"),
    (b"\x93NUMPY", "a NumPy array"),
)
_FILES = (  # a pattern of names, what such files are, what to do
    (r"adapter_model\.(safetensors|bin)", "an adapter (LoRA)", "load its base model, then "
     "PeftModel.from_pretrained(base, directory)"),
    (r".+\.gguf", "GGUF weights of llama.cpp", INSTEAD),
    (r".*ggml.*\.bin", "GGML weights", INSTEAD),
    (r"(pytorch_model|model)-\d+-of-\d+\.(bin|safetensors)", "shards without their index",
     "download the .index.json file that belongs to them"),
    (r"(pytorch_model|model)\..+\.(bin|safetensors)", "weights of a variant",
     "rename them to the usual name, without the variant's"),
    (r"openvino_model\..+", "OpenVINO weights", INSTEAD),
    (r".+\.onnx", "ONNX weights", INSTEAD),
    (r".+\.pdparams", "PaddlePaddle weights", INSTEAD),
    (r".+\.msgpack", "Flax weights", INSTEAD),
    (r".+\.h5", "TensorFlow weights", INSTEAD),
    (r".+\.(npz|npy)", "NumPy arrays", INSTEAD),
    (r".+\.(pth|pt|ckpt)", "weights of a training program", "a file of torch.save with the names "
     "and tensors of the whole model may be renamed to pytorch_model.bin; otherwise " + INSTEAD),
    (r".+\.(safetensors|bin)", "weights under another name",
     "a file with the whole model's tensors is named model.safetensors or pytorch_model.bin"),
)  # fmt: skip
_TENSORS = (  # a pattern of tensor names, the method whose files have them
    (r"\.(qweight|qzeros|g_idx)$", "gptq or awq"),
    (r"\.weight\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..+)$",
     "bitsandbytes, 4 bits"),
    (r"\.(SCB|weight_format)$", "bitsandbytes, 8 bits"),
    (r"\.weight_(packed|zero_point|shape|global_scale)$", "compressed-tensors"),
    (r"\.(weight_scale_inv|input_scale|activation_scale)$", "fp8"),
    (r"\.(W_q|W_q_stored.*)$", "hqq"),
    (r"\.(codes|codebooks)$", "aqlm"),
    (r"\.weight\._(data|scale|qtype)$", "quanto"),
    (r"\.weight_scales$", "eetq"),
    (r"\._packed_params.*$", "torch's own int8"),
    (r"\.(scales|biases)$", "gptq, awq or mlx"),
)  # fmt: skip


def file_kind(head: bytes) -> str | None:
    """What a file is by its first bytes, where it is surely no weight file that is read."""
    for magic, kind in _FIRST_BYTES:
        if head.startswith(magic):
            return kind
    if head.lstrip()[:5].lower() in (b"<!doc", b"<html", b"<?xml"):
        return "a web page, as a failed download leaves it"
    return None


def not_weights(head: bytes) -> str | None:
    """The end of an error message about such a file."""
    kind = file_kind(head)
    return f"is {kind}, which is not read: {INSTEAD}" if kind else None


def folder_kind(directory: Path) -> str:
    """The end of an error message about a folder without weights: what else is there."""
    names = sorted(p.name for p in directory.iterdir())
    for pattern, kind, advice in _FILES:
        for name in names:
            if re.fullmatch(pattern, name):
                return f"; {name} is there, {kind}: {advice}"
    return ""


def refuse_quantization(fields: Mapping[str, Any]) -> None:
    """ValueError for a config.json that says by which method the weights were quantized."""
    for key in ("quantization_config", "compression_config", "quantization"):
        value = fields.get(key)
        if not value:
            continue
        given = value if isinstance(value, Mapping) else {}
        method = given.get("quant_method") or {"quantization": "mlx"}.get(key)
        wide = {f"load_in_{n}bit": given.get(f"load_in_{n}bit") for n in (4, 8)}
        if method is None and given and "bits" not in given and not any(wide.values()):
            if any(name in given for name in wide):
                continue  # bitsandbytes' own, and nothing is quantized
        if method is None:
            method = "bitsandbytes" if any(wide.values()) else "another program"
        bits = next((given[n] for n in ("bits", "w_bit", "nbits") if n in given), None)
        bits = bits or next((n for n in (4, 8) if wide[f"load_in_{n}bit"]), None)
        width = f", {bits} bits" if isinstance(bits, int) else ""
        raise ValueError(
            f"{key}: the weights are quantized by {str(method)[:40]}{width}, which is not read: "
            f"{UNQUANTIZED}"
        )


def refuse_quantized_names(names: Iterable[str]) -> None:
    """ValueError where a tensor has a name that only methods of quantization give."""
    names = list(names)
    for pattern, method in _TENSORS:
        for name in names:
            if re.search(pattern, name):
                raise ValueError(
                    f"tensor {name}: the weights are quantized by {method}, which is not read: "
                    f"{UNQUANTIZED}"
                )
