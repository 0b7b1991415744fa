"""`glmlora export`: a model, or an adapter, as a GGUF file for llama.cpp and what is built on it.

Weights are read, merged, quantized and written one after the other, a few MiB at a time: the memory
holds no more than one matrix that an adapter changes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from .. import _core, families
from ..families.recognition import own_part
from ..families.vocabulary import vocabulary_file
from ..files import gguf
from ..files.hub import model_directory
from ..files.tensor import Tensor
from ..files.write import check_room
from ..model.adapter import Adapter, merged
from ..model.adapter_config import LoraConfig
from ..model.auto import AutoModel
from ..model.configuration import ChatGLMConfig
from ..model.parameters import PEFT_PREFIX, weight_of
from ..model.peft import PeftModel
from ..model.quantization import QuantizedTensor
from ..names import did_you_mean
from ..progress import bar
from ..tell import warn
from ..tokenization.gguf_vocabulary import PREFIX, gguf_fields
from ..tokenization.tokenizer import AutoTokenizer

# A form: the types of linear layers, and of embeddings and output layer, which suffer most.
FORMS = {"f16": ("F16", "F16"), "q8_0": ("Q8_0", "Q8_0"), "q4_0": ("Q4_0", "Q8_0")}
_FILE_TYPES = {"f16": 1, "q8_0": 7, "q4_0": 2}  # enum llama_ftype
FAMILY = "glmlora.family"  # this package's own key
_SQUARE = ("chatglm",)  # architectures whose attention yields as many numbers as it takes
_PIECE = 1 << 22  # values that are converted at a time
_BESIDE = 64 << 20  # bytes for the header with its vocabulary


def export(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    form: str | None = None,
    adapter: str | os.PathLike[str] | None = None,
    adapter_only: bool = False,
    family: str | None = None,
) -> int:
    """Write a model directory as a GGUF file, with its tokenizer and chat template. Returns the
    bytes of the tensors.

    form: "f16", "q8_0" or "q4_0", the type of linear layers; embeddings and output layer are Q8_0
    where those are Q4_0, vectors are F32. adapter: a LoRA adapter's directory, merged as
    `merge_and_unload` does; with adapter_only it alone is written, in F32, as llama.cpp's
    `--lora` takes it, and form is None. family: see ChatGLMConfig.

    Raises ImportError without the gguf package, FileExistsError where `output` is there, ValueError
    for a model that llama.cpp has no architecture for, a weight that the form cannot hold, and what
    an adapter file of llama.cpp cannot hold, OSError naming a file.
    """
    gguf.package()
    _check_form(form, adapter, adapter_only)
    directory, target = model_directory(model), Path(output)
    if os.path.lexists(target):
        raise FileExistsError(f"{target} exists, expected a new file")
    if not target.absolute().parent.is_dir():
        raise FileNotFoundError(f"{target.parent}: no such directory")
    config = ChatGLMConfig.from_pretrained(directory, family=family)
    check_config(directory, config)
    opened = AutoModel.from_pretrained(
        directory, family=family, device="cpu", compute_dtype="float32"
    )
    if opened.has_prefix:
        raise ValueError(f"{directory}: has a P-Tuning prefix, which a GGUF file cannot hold")
    tuned = None
    if adapter is not None:
        if not (Path(adapter) / "adapter_config.json").exists():
            raise ValueError(f"{adapter}: has no adapter_config.json: expected a LoRA adapter")
        peft = PeftModel.from_pretrained(opened, adapter)
        state = peft.adapter_state(peft.active_adapter)
        tuned = peft._adapters[peft.active_adapter]
    arch = families.of(opened.config.family).gguf_arch
    assert arch is not None
    name = gguf.tensor_name(arch, config.num_layers)
    if adapter_only:
        assert tuned is not None
        tensors, alpha = _adapter_sources(str(adapter), tuned, state, name)
        metadata = {
            "general.type": "adapter",
            "general.name": own_part(os.fspath(Path(str(adapter)).absolute())),
            "adapter.type": "lora",
            "adapter.lora.alpha": alpha,
        }
    else:
        assert form is not None
        metadata = model_fields(opened.config, form, directory)
        metadata |= _tokenizer_fields(directory, opened.config)
        if tuned is not None:
            opened.core.remove_lora()
        tensors = _model_sources(opened, tuned, form, name)
    total = sum(gguf.nbytes(source.kind, source.shape) for source in tensors)
    check_room(target, total + _BESIDE)
    shown: dict[str, Any] = {"desc": "Exporting", "unit": "B", "unit_scale": True}
    with bar(total=total, disable=total < 1 << 28, **shown) as progress:
        return gguf.write_gguf(target, arch, metadata, tensors, progress.update)


def _check_form(form: str | None, adapter: Any, adapter_only: bool) -> None:
    if adapter_only and adapter is None:
        raise ValueError("adapter_only: expected an adapter, got none")
    if adapter_only and form is not None:
        raise ValueError(f"form: an adapter alone is written in float32, got {form!r}")
    if not adapter_only and form not in FORMS:
        near = did_you_mean(str(form), FORMS)
        raise ValueError(f"form: expected one of {' '.join(FORMS)}, got {form!r}{near}")


def check_config(where: Any, config: ChatGLMConfig) -> None:
    """ValueError, that begins with `where`, for a model that llama.cpp cannot compute."""
    family = families.of(config.family)
    if family.gguf_arch is None:
        has = [f.title for f in families.all_families().values() if f.gguf_arch]
        raise ValueError(
            f"{where}: llama.cpp has no architecture for {family.title}, only for {', '.join(has)}"
        )
    width = config.num_attention_heads * config.kv_channels
    if family.gguf_arch in _SQUARE and width != config.hidden_size:
        raise ValueError(
            f"{where}: num_attention_heads {config.num_attention_heads} of kv_channels "
            f"{config.kv_channels} are {width}: llama.cpp's {family.gguf_arch!r} expects "
            f"hidden_size, {config.hidden_size}"
        )


def model_fields(config: ChatGLMConfig, form: str, directory: Path) -> dict[str, Any]:
    """The keys of a model, without its tokenizer."""
    numbers, family = config.arch(), families.of(config.family)
    own = own_part(str(config.get("_name_or_path") or "")) or directory.absolute().name
    fields: dict[str, Any] = {
        "vocab_size": numbers["vocab"],
        "context_length": numbers["max_positions"],
        "embedding_length": numbers["hidden"],
        "block_count": numbers["layers"],
        "feed_forward_length": numbers["ffn"],
        "attention.head_count": numbers["heads"],
        "attention.head_count_kv": numbers["kv_heads"],
        "attention.key_length": numbers["head_dim"],
        "attention.value_length": numbers["head_dim"],
        "attention.layer_norm_rms_epsilon": float(numbers["eps"]),
        "rope.dimension_count": numbers["rotary_dim"],
        "rope.freq_base": float(numbers["rope_base"]),
    }
    if numbers["rope_divisor"] != 1:
        fields["rope.scaling.type"] = "linear"
        fields["rope.scaling.factor"] = float(numbers["rope_divisor"])
    return {
        "general.type": "model",
        "general.name": own,
        "general.file_type": _FILE_TYPES[form],
        "general.quantization_version": 2,
        FAMILY: family.name,
        **{f"{family.gguf_arch}.{key}": value for key, value in fields.items()},
    }


def _tokenizer_fields(directory: Path, config: ChatGLMConfig) -> dict[str, Any]:
    family = families.of(config.family)
    if vocabulary_file(directory) is None:
        warn(f"{directory}: has no tokenizer: llama.cpp will have ids and no texts")
        return {PREFIX + "model": "none"}
    tokenizer = AutoTokenizer.from_pretrained(directory, family=config.family)
    if len(tokenizer) > config.padded_vocab_size:
        raise ValueError(
            f"{directory}: the tokenizer has {len(tokenizer)} ids, the model "
            f"{config.padded_vocab_size}"
        )
    return gguf_fields(tokenizer, family, config.padded_vocab_size)


# A model's tensors


def _model_sources(
    model: Any, adapter: Adapter | None, form: str, name: Any
) -> list[gguf.GGUFSource]:
    changed: dict[str, str] = {}  # weight, or bias: the linear that the adapter changes
    for module in adapter.targets if adapter else ():
        changed[weight_of(model.config, module)] = module
        if adapter is not None and adapter.config.lora_bias:
            changed[f"{module}.bias"] = module
    linears, found = model._linear_shapes(), []
    for own in model.base_names():
        there, shape = name(own), tuple(model.core.shape(own))
        if there is None:
            raise ValueError(f"tensor {own}: has no name in a GGUF file")
        kind = FORMS[form][own not in linears] if len(shape) == 2 else "F32"
        if kind[0] == "Q" and shape[1] % 32:
            kind = "F16"
        pieces = partial(_pieces, model, adapter, own, changed.get(own), kind)
        found.append(gguf.GGUFSource(there, kind, shape, pieces))
    return found


def _pieces(
    model: Any, adapter: Adapter | None, own: str, module: str | None, kind: str
) -> Iterator[np.ndarray]:
    """The bytes of a weight, some rows at a time."""
    if module is not None and adapter is not None:
        tensor = merged(model, adapter, module)[own]
    else:
        tensor = model._tensor(own)
    rows = tensor.shape[0]
    step = max(1, _PIECE // tensor.shape[1]) if len(tensor.shape) == 2 else rows
    for begin in range(0, rows, step):
        part = _some_rows(tensor, begin, min(begin + step, rows))
        try:
            yield _in_kind(part, kind)
        except ValueError as error:
            raise ValueError(f"tensor {own}: {error}") from None
    if isinstance(tensor, Tensor):
        _core.drop_pages(tensor.data)


def _some_rows(tensor: Tensor | QuantizedTensor, begin: int, end: int) -> Tensor | QuantizedTensor:
    if isinstance(tensor, Tensor):
        return Tensor(tensor.data[begin:end], tensor.dtype)
    bits = 8 if tensor.dtype == "I8" else 4
    integers, scale = (Tensor(t.data[begin:end], t.dtype) for t in (tensor.integers, tensor.scale))
    return QuantizedTensor(integers, scale, bits, tensor.group)


def _in_kind(part: Tensor | QuantizedTensor, kind: str) -> np.ndarray:
    if isinstance(part, QuantizedTensor):
        if kind == "Q4_0" and part.dtype == "I4" and part.group == 32:
            return _as_q4_0(part)
        return gguf.quantized(part.numpy(), kind)
    if kind == part.dtype:
        return part.data
    wide = part.data if part.dtype == "F32" else _core.convert(part.data, part.dtype, "F32")
    return wide if kind == "F32" else gguf.quantized(wide, kind)


def _as_q4_0(part: QuantizedTensor) -> np.ndarray:
    """int4 in groups of 32 as the same numbers in Q4_0: integers from -8 on, column j of a block in
    the low half of byte j, column j + 16 in the high one.
    """
    scale = part.scale.numpy()
    integers = part.integers.numpy().view(np.uint8)
    from_0 = np.stack([integers >> 4, integers & 15], axis=-1).reshape(*scale.shape, 32) ^ 8
    blocks = np.empty((*scale.shape, 18), np.uint8)
    blocks[..., :2] = scale[..., None].view(np.uint8)
    blocks[..., 2:] = from_0[..., :16] | from_0[..., 16:] << 4
    return blocks


# An adapter's


def _adapter_sources(
    where: str, adapter: Adapter, state: Mapping[str, np.ndarray], name: Any
) -> tuple[list[gguf.GGUFSource], float]:
    """A and B of each linear, and alpha, by which llama.cpp scales them: alpha / rank of each.
    ValueError for what else an adapter may have.
    """
    config = adapter.config
    _check_adapter(where, config, adapter)
    ranks = [rank * scale for rank, scale in adapter.targets.values()]
    alpha, found = float(np.float32(ranks[0])), []
    for module, (rank, scale) in adapter.targets.items():
        there = name(module)
        if there is None:
            raise ValueError(f"{where}: {module} has no name in a GGUF file")
        for part, letter in (("A", "a"), ("B", "b")):
            array = np.ascontiguousarray(state[f"{PEFT_PREFIX}{module}.lora_{part}.weight"])
            if part == "B" and rank * scale != ranks[0]:
                array = array * np.float32(rank * scale / ranks[0])
            full = f"{there}.weight.lora_{letter}"
            found.append(gguf.GGUFSource(full, "F32", array.shape, partial(_whole, array)))
    return found, alpha


def _check_adapter(where: str, config: LoraConfig, adapter: Adapter) -> None:
    for what, there in (
        ("use_dora", config.use_dora),
        ("lora_bias", config.lora_bias),
        ("modules_to_save", adapter.saved),
        (f"init_lora_weights {config.init_lora_weights!r}", adapter.beneath),
    ):
        if there:
            raise ValueError(
                f"{where}: {what}: an adapter file of llama.cpp has A and B alone; export the "
                "model with the adapter merged into it"
            )


def _whole(array: np.ndarray) -> Iterator[np.ndarray]:
    yield array.astype(np.float32, copy=False)
