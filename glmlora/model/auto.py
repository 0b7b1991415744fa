"""`AutoModel.from_pretrained(directory)`: from a model directory to a model."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import families
from ..files.checkpoint import load_checkpoint
from ..files.hub import check_keywords, model_directory
from ..files.small import GENERATION
from ..files.write import read_json
from ..generation.config import GenerationConfig
from . import configuration
from . import device as devices
from .configuration import DEFAULTS, ChatGLMConfig, ConfigKeywords, is_key
from .modeling import ChatGLMForConditionalGeneration
from .parameters import parse_dtype
from .quantization import GROUP_SIZE, is_quantized
from .saving import Opened
from .template import read_template

if TYPE_CHECKING:
    from typing_extensions import Unpack

# Keywords of transformers that ask for nothing with these values; None: with any.
NEUTRAL: dict[str, tuple[Any, ...] | None] = {
    # weights are mapped, so that nothing has to be made, offloaded or shared out
    **dict.fromkeys(("empty_init", "low_cpu_mem_usage", "_fast_init", "weights_only")),
    **dict.fromkeys(("offload_folder", "offload_state_dict", "offload_buffers", "offload_index")),
    "use_flash_attention_2": None,  # attention is exact, and never holds its weights as a whole
    "attn_implementation": (
        *("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"),
    ),
    "use_cache": None,  # there always is one
    "ignore_mismatched_sizes": (False,),
    "output_loading_info": (False,),
    **dict.fromkeys(("from_tf", "from_flax", "use_kernels", "allow_all_kernels"), (False,)),
    "torch_compile": (False,),
    **configuration.NEUTRAL,
}
_WHOLE = "a model is on one device here: device_map or device names it"
REASONS = {
    "quantization_config": "is not supported; load_in_8bit=True or load_in_4bit=True quantize on "
    "loading, in this package's own int8 and int4",
    "ignore_mismatched_sizes": "every weight must fit; load_state_dict(.., strict=False) takes a "
    "part of them",
    "attn_implementation": "expected one of transformers' names; they all mean the same here",
    "output_loading_info": "missing and surplus tensors are an error here",
    "variant": "weights of a variant are not looked for; rename the files to the usual names",
    "state_dict": "pass it to model.load_state_dict",
    "key_mapping": "rename tensors and pass them to model.load_state_dict",
    "adapter_kwargs": "open the adapter with PeftModel.from_pretrained",
    **dict.fromkeys(("max_memory", "tp_plan", "tp_size", "device_mesh"), _WHOLE),
    **dict.fromkeys(("distributed_config", "parallel_config"), _WHOLE),
    **configuration.REASONS,
}


class LoadKeywords(ConfigKeywords, total=False):
    """Keywords of AutoModel.from_pretrained beside those that it works with: NEUTRAL's."""

    empty_init: bool
    low_cpu_mem_usage: bool | None
    weights_only: bool
    offload_folder: str | os.PathLike[str] | None
    offload_state_dict: bool | None
    offload_buffers: bool | None
    offload_index: Any
    use_flash_attention_2: bool
    attn_implementation: str | None
    ignore_mismatched_sizes: bool
    output_loading_info: bool
    from_tf: bool
    from_flax: bool
    use_kernels: bool
    allow_all_kernels: bool
    torch_compile: bool
    quantization_config: None


class AutoModel:
    """`AutoModel.from_pretrained(directory)` -> ChatGLMForConditionalGeneration."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        config: ChatGLMConfig | None = None,
        *,
        torch_dtype: Any = None,
        dtype: Any = None,
        device: Any = None,
        device_map: Any = None,
        load_in_8bit: bool = False,
        load_in_4bit: bool = False,
        subfolder: str = "",
        use_safetensors: bool | None = None,
        family: str | None = None,
        rope_mode: str | None = None,
        compute_dtype: str | None = None,
        **others: Unpack[LoadKeywords],
    ) -> ChatGLMForConditionalGeneration:
        """Map the checkpoint in a local directory (or in `subfolder` of it) and bind it in place,
        in the type it is stored in.

        config: in place of its config.json, e.g. one with `pre_seq_len` set. torch_dtype or
        dtype: cast to it ("float16", "bfloat16", "float32"; "auto" and None: as stored).
        load_in_8bit, load_in_4bit: as `quantize(8)` and `quantize(4, group_size=32)`. device: as
        `to` takes it, or "auto"; device_map: the same, or a dict whose values are one device.
        use_safetensors: True takes no other files, False only torch's. family, rope_mode: see
        ChatGLMConfig. compute_dtype: of the large products, "float32", "bfloat16" or "int8" (over
        int8 weights); default "auto", see model/device.py; `model.compute_dtype` is the one in use.
        others: keys of config.json to replace (`pre_seq_len=128`), and keywords of transformers
        that mean nothing here: those about downloads and code (NOTHING in files/hub.py), and
        NEUTRAL above.

        Raises OSError for a directory that is not there, ValueError naming file, tensor or field
        for anything wrong in it, and for a keyword of transformers that is not supported, TypeError
        for an unknown keyword.
        """
        if load_in_8bit and load_in_4bit:
            raise ValueError("load_in_8bit, load_in_4bit: expected one of them")
        if device_map is not None and device is None:
            device = _one_device(device_map)
        kind = _dtype(torch_dtype, dtype)
        directory = model_directory(pretrained_model_name_or_path, subfolder)
        known = inspect.signature(cls.from_pretrained).parameters
        given = {} if config is None else config.to_dict()
        keys = {k: v for k, v in others.items() if k not in NEUTRAL and (k in given or is_key(k))}
        rest = {k: v for k, v in others.items() if k not in keys}
        if config is None:
            stored = _stored_keys(directory)
            keys |= {k: v for k, v in rest.items() if k in stored and k not in REASONS}
            rest = {k: v for k, v in rest.items() if k not in keys}
        check_keywords(
            f"{cls.__name__}.from_pretrained", rest, [*known, *DEFAULTS], NEUTRAL, REASONS
        )
        if config is None:
            config = ChatGLMConfig.from_pretrained(directory, family=family, **keys)
        elif not isinstance(config, ChatGLMConfig):
            raise TypeError(f"config: expected a ChatGLMConfig, got {type(config).__name__}")
        else:
            for name, value in keys.items():
                setattr(config, name, value)
        if family is not None:
            config.family = families.of(family).name
        if rope_mode is not None:
            config.rope_mode = rope_mode
        prefer = "bin" if use_safetensors is False else "safetensors"
        tensors = load_checkpoint(directory, prefer, _progress, only=use_safetensors is not None)
        try:
            model = ChatGLMForConditionalGeneration(config, tensors, compute_dtype)
        except ValueError as error:
            raise ValueError(f"{directory}: {error}") from None
        model.name_or_path = os.fspath(Path(pretrained_model_name_or_path, subfolder or ""))
        model.prompt_template = read_template(directory) or "auto"
        file, stored = directory / GENERATION, {}
        if file.exists():
            model.generation_config = GenerationConfig.from_pretrained(directory, config)
            stored = read_json(file, dict)
        model.opened = Opened(directory, stored, model.generation_config)
        bits = 8 if load_in_8bit else 4 if load_in_4bit else 0
        if bits and not is_quantized(config, bits):
            model.quantize(bits, group_size=GROUP_SIZE if bits == 4 else None)
        if kind is not None:
            model._cast(kind)
        place = devices.find(device, model.device)
        return model if place == model.device else model._move(place)


class AutoModelForCausalLM(AutoModel):
    """The same as AutoModel."""


def _stored_keys(directory: Path) -> dict[str, Any]:
    """Keys of its config.json; whether it can be read at all is told by who reads it."""
    try:
        return read_json(directory / "config.json", dict)
    except (OSError, ValueError):
        return {}


def _one_device(device_map: Any) -> Any:
    """The one device of a `device_map`. ValueError for a model shared out over several."""
    if device_map in ("balanced", "balanced_low_0", "sequential"):
        return "auto"
    if not isinstance(device_map, Mapping):
        return device_map
    places = {str(place): place for place in device_map.values()}
    if len(places) > 1:
        raise ValueError(
            f"device_map: names {', '.join(places)}; a model is on one device here, e.g. "
            'device_map="auto"'
        )
    return next(iter(places.values()), None)


def _dtype(torch_dtype: Any, dtype: Any) -> str | None:
    """The file type name of the two names of one argument."""
    kinds = [parse_dtype(torch_dtype), parse_dtype(dtype)]
    if None not in (torch_dtype, dtype) and kinds[0] != kinds[1]:
        raise ValueError(f"torch_dtype is {torch_dtype!r}, dtype is {dtype!r}: expected one")
    return kinds[0] or kinds[1]


def _progress(names: list[str]) -> Iterable[str]:
    from tqdm import tqdm

    return tqdm(names, desc="Loading checkpoint shards")
