"""`glmlora import`: a GGUF file as a model directory, with the numbers that the file has.

F32, F16 and BF16 stay as they are, and linear layers that are all Q4_0 become int4 in groups of 32
columns, which are the same numbers. Others (Q8_0, K-quants) become float16, the nearest to each.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from .. import _core, families
from ..families import Family, recognition
from ..files import gguf
from ..files.checkpoint import save_sharded
from ..files.owner import owned
from ..files.tensor import Source, Tensor, short_repr
from ..files.write import check_new_directory, check_room, write_json
from ..model.configuration import OWN_ROPE_MODE, ChatGLMConfig
from ..model.parameters import DTYPE_NAMES, embedding_of, layers_of
from ..model.quantization import SCALE
from ..progress import bar
from ..tell import warn
from ..tokenization.gguf_vocabulary import PREFIX, GGUFVocabulary
from .gguf_export import FAMILY

_GROUP = 32  # columns of a block of Q4_0
_BESIDE = 64 << 20  # bytes for a tokenizer and other small files
_PIECE = 1 << 22  # values that are converted at a time


def import_gguf(
    file: str | os.PathLike[str], output: str | os.PathLike[str], family: str | None = None
) -> ChatGLMConfig:
    """Write the model of a GGUF file, and its tokenizer, into a new directory. Returns its config.

    family: the name or alias of one, where the file's own words are not to be believed. `output` is
    there with all of its files at the end, or is left as it was. Raises ImportError without the
    gguf package, FileExistsError where something is in `output`, ValueError naming the file and the
    key or tensor for a model that this release does not know, OSError naming a file.
    """
    target = Path(output)
    check_new_directory(target)
    metadata, tensors = gguf.read_gguf(file)
    try:
        vocabulary = GGUFVocabulary(metadata)
        own = _family(metadata, tensors, vocabulary, family)
        config = _config(metadata, tensors, vocabulary, own)
        weights = _sources(config, tensors)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    total = sum(source.nbytes for source in weights)
    check_room(target, total + _BESIDE)
    with tempfile.TemporaryDirectory() as small:
        if vocabulary.byte_pairs is None:
            warn(f"{file}: has no tokenizer, and so has {target}")
        else:
            _write_tokenizer(file, vocabulary, Path(small), own)
        _write(target, config, weights, total, Path(small))
    return config


def _write_tokenizer(
    file: str | os.PathLike[str], vocabulary: GGUFVocabulary, directory: Path, family: Family
) -> None:
    try:
        vocabulary.write(directory, family)
    except ValueError as error:
        raise ValueError(
            f"{file}: its tokenizer would be none of {family.title}: {error}"
        ) from None


def _write(
    target: Path, config: ChatGLMConfig, weights: list[Source], total: int, small: Path
) -> None:
    """Write a model directory with the files in `small`, all of it or nothing."""
    was_there = target.exists()
    shown: dict[str, Any] = {"desc": "Importing", "unit": "B", "unit_scale": True}

    def beside(new: Path) -> None:
        for file in small.iterdir():
            shutil.copyfile(file, new / file.name)
        write_json(new / "config.json", config.file_fields(new, target))

    try:
        with bar(total=total, disable=total < 1 << 28, **shown) as progress:
            target.mkdir(parents=True, exist_ok=True)
            with owned(target, shared=True):
                counted = [_counted(source, progress) for source in weights]
                save_sharded(target, counted, beside=beside)
    except BaseException:
        if not was_there:
            with suppress(OSError):
                target.rmdir()
        raise


def _counted(source: Source, progress: Any) -> Source:
    def get() -> Any:
        value = source.get()
        progress.update(source.nbytes)
        return value

    return source._replace(get=get)


# What the model is


class _Keys:
    """The keys of an architecture; ValueError naming one that is missing, or of another kind."""

    def __init__(self, metadata: Mapping[str, Any], arch: str):
        self.metadata, self.arch = metadata, arch

    def get(self, name: str, kind: type, default: Any = None) -> Any:
        key = f"{self.arch}.{name}"
        value = self.metadata.get(key, default)
        if type(value) is not kind:
            raise ValueError(f"{key}: expected {kind.__name__}, got {short_repr(value)}")
        return value


def _family(
    metadata: Mapping[str, Any],
    tensors: Mapping[str, Any],
    vocabulary: GGUFVocabulary,
    given: str | None,
) -> Family:
    """The family that was asked for, or the file says; else the one that its layout, tokens,
    template and name speak for. ValueError for an architecture of none.
    """
    arch = metadata.get("general.architecture")
    known = [f for f in families.all_families().values() if f.gguf_arch == arch]
    if not known or arch is None:
        all_of = sorted({f.gguf_arch for f in families.all_families().values() if f.gguf_arch})
        raise ValueError(
            f"general.architecture: expected one of {' '.join(all_of)}, got {short_repr(arch)}"
        )
    kind = metadata.get("general.type", "model")
    if kind != "model":
        raise ValueError(f"general.type: expected model, got {short_repr(kind)}")
    if metadata.get("split.count", 0) not in (0, 1):
        raise ValueError(
            "split.count: is one of several files: join them with llama-gguf-split --merge"
        )
    split = "blk.0.attn_q.weight" in tensors
    fit = [f for f in known if ("query" in f.tensor_names) == split]
    if vocabulary.byte_pairs is not None:
        fit = [f for f in fit if f.byte_pairs == vocabulary.byte_pairs]
    said = given or metadata.get(FAMILY)
    if said is not None:
        family = families.of(str(said))
        if family not in fit:
            what = " or ".join(f.name for f in fit) or "none"
            raise ValueError(f"family: the tensors and tokens are of {what}, not {family.name}")
        return family
    if not fit:
        raise ValueError(f"{PREFIX}model: no family with these tensors has such a tokenizer")
    layouts = {f.model_type for f in fit}
    fields = {
        "model_type": layouts.pop(),
        "_name_or_path": str(metadata.get("general.name") or ""),
        "tie_word_embeddings": "output.weight" not in tensors,
    }
    found = families.of(recognition.find(fields, None, vocabulary.config))
    return found if found in fit else fit[0]


def _config(
    metadata: Mapping[str, Any],
    tensors: Mapping[str, gguf.GGUFTensor],
    vocabulary: GGUFVocabulary,
    family: Family,
) -> ChatGLMConfig:
    assert family.gguf_arch is not None
    keys = _Keys(metadata, family.gguf_arch)
    heads, hidden = keys.get("attention.head_count", int), keys.get("embedding_length", int)
    width = keys.get("attention.key_length", int, hidden // max(heads, 1))
    scaling = metadata.get(f"{keys.arch}.rope.scaling.type", "none")
    if scaling not in ("none", "linear"):
        raise ValueError(f"{keys.arch}.rope.scaling.type: {short_repr(scaling)} is not supported")
    divided = keys.get("rope.scaling.factor", float, 1.0) if scaling == "linear" else 1.0
    turned = keys.get("rope.dimension_count", int, width // 2)
    base = keys.get("rope.freq_base", float, 10000.0)
    try:
        rope = family.rope_fields(base, divided, turned, width)
    except ValueError as error:
        raise ValueError(f"{keys.arch}.rope: {error}") from None
    rope = {name: _shortest(value) for name, value in rope.items()}
    if "token_embd.weight" not in tensors:
        raise ValueError("tensor token_embd.weight: is missing")
    layers = keys.get("block_count", int)
    if layers > len(tensors):  # before anything of that many is made
        raise ValueError(f"{keys.arch}.block_count: {layers} of {len(tensors)} tensors")
    # Published files with byte pairs list every end; the others leave those of turns to the family.
    ends = vocabulary.ends if family.byte_pairs else vocabulary.ends[:1]
    fields: dict[str, Any] = {
        "model_type": family.model_type,
        "architectures": [family.architecture],
        "_name_or_path": str(metadata.get("general.name") or ""),
        "num_layers": layers,
        "hidden_size": hidden,
        "ffn_hidden_size": keys.get("feed_forward_length", int),
        "num_attention_heads": heads,
        "multi_query_attention": True,
        "multi_query_group_num": keys.get("attention.head_count_kv", int, heads),
        "kv_channels": width,
        "seq_length": keys.get("context_length", int),
        "layernorm_epsilon": _shortest(keys.get("attention.layer_norm_rms_epsilon", float)),
        "padded_vocab_size": tensors["token_embd.weight"].shape[0],
        "add_qkv_bias": any(f"blk.0.{name}.bias" in tensors for name in ("attn_qkv", "attn_q")),
        "tie_word_embeddings": family.ties_head and "output.weight" not in tensors,
        **rope,
    }
    if ends:
        fields["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    if type(pad := metadata.get(PREFIX + "pad_token_id")) is int:
        fields["pad_token_id"] = pad
    mode = "base" if divided == 1 else "interpolate"
    if rope.get("rope_ratio", 1) != 1 and family.rope_mode(rope["rope_ratio"]) != mode:
        fields[OWN_ROPE_MODE] = mode
    config = ChatGLMConfig(family=family.name, **fields)
    stored = tensors["token_embd.weight"].kind
    config.torch_dtype = DTYPE_NAMES[stored if stored in gguf.FLOATS else "F16"]
    return config


def _shortest(value: float) -> float | int:
    """The shortest decimal number that float32 holds as this one, whole where it is."""
    short = float(str(np.float32(value)))
    return int(short) if short.is_integer() and short < 1 << 53 else short


# Its tensors


def _sources(config: ChatGLMConfig, tensors: Mapping[str, gguf.GGUFTensor]) -> list[Source]:
    """What is written of a file; `config` gets the bits of its integers. ValueError naming a tensor
    that is missing, has another shape, or belongs to another model.
    """
    arch = families.of(config.family).gguf_arch
    find = gguf.tensor_name(str(arch), config.num_layers)
    names = config.tensor_names
    shapes: dict[str, tuple[int, ...]]
    shapes = _core.Model(config.arch(), "plan", names=names).shapes()
    given: dict[str, gguf.GGUFTensor] = {}
    left = dict(tensors)
    for own, shape in shapes.items():
        there = find(own)
        if there is None or there not in left:
            raise ValueError(f"tensor {there or own}: is missing")
        given[own] = left.pop(there)
        if given[own].shape != tuple(shape):
            raise ValueError(f"tensor {there}: shape {given[own].shape}, expected {tuple(shape)}")
    if left:
        raise ValueError(
            f"tensor {short_repr(next(iter(left)))}: is none of a model of family {config.family}"
        )
    start = layers_of(config)
    linears = {n for n, s in shapes.items() if n.startswith(start) and len(s) == 2}
    whole = given[embedding_of(config)].kind
    if all(given[own].kind == "Q4_0" for own in linears):
        config.quantization_bit, config.quantization_group_size = 4, _GROUP
    else:
        linears = set()
    found: list[Source] = []
    for own, tensor in given.items():
        shape = tensor.shape
        if own in linears:
            rows, columns = shape
            found.append(Source(own, "I8", (rows, columns // 2), partial(_integers, tensor)))
            scales = (rows, columns // _GROUP)
            found.append(Source(own + SCALE, "F16", scales, partial(_scales, tensor)))
        elif len(shape) == 1:
            vector = _vector(own, tensor, whole if whole in gguf.FLOATS else "F16")
            found.append(Source(own, vector.dtype, shape, partial(_same, vector)))
        elif tensor.kind in gguf.FLOATS:
            found.append(Source(own, tensor.kind, shape, tensor.stored))
        else:
            tensor.float_rows(0, 1)  # whether the type is read
            found.append(Source(own, "F16", shape, partial(_half, own, tensor)))
    return found


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _vector(own: str, tensor: gguf.GGUFTensor, kind: str) -> Tensor:
    """A vector, which such files have in F32, in the type of the matrices if that holds it."""
    if tensor.kind not in gguf.FLOATS:
        raise ValueError(f"tensor {own}: a vector of type {tensor.kind} is not read")
    stored = tensor.stored()
    wide = stored.numpy().astype(np.float32)
    narrow = Tensor(_core.convert(wide, "F32", kind), kind)
    return narrow if np.array_equal(narrow.numpy().astype(np.float32), wide) else stored


def _half(own: str, tensor: gguf.GGUFTensor) -> np.ndarray:
    """The values of a matrix, float16."""
    out = np.empty(tensor.shape, np.float16)
    step = max(1, _PIECE // tensor.shape[1])
    for begin in range(0, len(out), step):
        end = min(begin + step, len(out))
        out[begin:end] = _core.convert(tensor.float_rows(begin, end), "F32", "F16")
    if not np.isfinite(out).all():
        raise ValueError(f"tensor {own}: has a value that is not finite or too large for float16")
    return out


def _blocks(tensor: gguf.GGUFTensor) -> np.ndarray:
    """(rows, blocks, 18 bytes) of a matrix in Q4_0."""
    rows = Tensor(tensor.rows()).numpy()
    return rows.reshape(len(rows), -1, 18)


def _integers(tensor: gguf.GGUFTensor) -> np.ndarray:
    """Two columns in a byte, the even one in the high half, from Q4_0's, whose byte j has columns j
    and j + 16 of a block, from 0 on.
    """
    packed = _blocks(tensor)[:, :, 2:]
    columns = np.concatenate([packed & 15, packed >> 4], axis=-1) ^ 8
    return (columns[:, :, ::2] << 4 | columns[:, :, 1::2]).reshape(len(packed), -1).view(np.int8)


def _scales(tensor: gguf.GGUFTensor) -> np.ndarray:
    return np.ascontiguousarray(_blocks(tensor)[:, :, :2]).view(np.float16)[:, :, 0]
