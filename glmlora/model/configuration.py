"""`config.json` of a model directory: read, checked, completed with the defaults of the published
code, written again.

A config says what the core needs to know (`arch`); keys this package has no use for are kept and
written back.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import families, tell
from ..families import recognition
from ..families.context import Context
from ..files.foreign import folder_kind, refuse_quantization
from ..files.hub import check_keywords, model_directory
from ..files.small import whole_references
from ..files.tensor import short_repr
from ..files.write import read_json, write_json
from ..generation.config import GenerationConfig
from .keywords import (
    CONFIG_NEUTRAL,
    CONFIG_REASONS,
    SAVE_NEUTRAL,
    SAVE_REASONS,
    ConfigKeywords,
    SaveKeywords,
)
from .quantization import check_form

if TYPE_CHECKING:
    from typing_extensions import Unpack

# What the published configuration class assumes for keys that a file leaves out.
DEFAULTS: dict[str, Any] = {
    "model_type": "chatglm",
    "num_layers": 28,
    "padded_vocab_size": 65024,
    "hidden_size": 4096,
    "ffn_hidden_size": 13696,
    "kv_channels": 128,
    "num_attention_heads": 32,
    "seq_length": 2048,
    "layernorm_epsilon": 1e-5,
    "rmsnorm": True,
    "apply_residual_connection_post_layernorm": False,
    "post_layer_norm": True,
    "add_bias_linear": False,
    "add_qkv_bias": False,
    "multi_query_attention": False,
    "multi_query_group_num": 1,
    "original_rope": True,
    "rope_ratio": 1,
    "quantization_bit": 0,
    "quantization_group_size": None,  # this package's own: columns that share a scale
    "pre_seq_len": None,
    "prefix_projection": False,
    "tie_word_embeddings": False,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "torch_dtype": None,
    "_name_or_path": "",
}
ROPE_MODES = ("base", "interpolate", "half")
PREFIX_DROPOUT = 0.1  # of prefix keys and values in training, as in the published P-Tuning code
_SIZES = (
    "num_layers",
    "padded_vocab_size",
    "hidden_size",
    "ffn_hidden_size",
    "kv_channels",
    "num_attention_heads",
    "seq_length",
    "multi_query_group_num",
)
# Variants of the architecture that the published code can build and no published checkpoint of
# these families uses.
_ONLY = {
    "rmsnorm": True,
    "apply_residual_connection_post_layernorm": False,
    "post_layer_norm": True,
    "add_bias_linear": False,
    "multi_query_attention": True,
    "original_rope": True,
}
_FLAGS = (*_ONLY, "add_qkv_bias", "tie_word_embeddings")
_OTHER_NAMES = {  # what newer programs call a key
    "dtype": "torch_dtype",
    "num_hidden_layers": "num_layers",
    "vocab_size": "padded_vocab_size",
}
_MORE_KEYS = ("prefix_dropout", "use_cache", "name_or_path", "bos_token_id", *_OTHER_NAMES)
# What only this package writes: what users said when they opened the model, and config.json lacks.
OWN_ROPE_MODE = "glmlora_rope_mode"
OWN_KEYS = (recognition.OWN_KEY, OWN_ROPE_MODE)
# What a model that is built does not read again.
_READ_ONCE = {
    *(set(_SIZES) - {"seq_length"}),
    *("layernorm_epsilon", "rope_ratio", "add_qkv_bias", "multi_query_attention", "rmsnorm"),
    *(set(GenerationConfig.__dataclass_fields__) - {"use_cache"}),
}
# Keys that mean nothing here, where they say something.
_UNUSED = {
    "rope_scaling": "positions are scaled by rope_ratio",
    "hidden_dropout": "only adapters and prefixes have dropout",
    "sliding_window": "attention reaches every position",
    "attention_dropout": "only adapters and prefixes have dropout",
}
_MAY_BE_NULL = ("eos_token_id", "pad_token_id")


class ChatGLMConfig:
    """Configuration of a model in the `chatglm` layout, or in a layout of transformers, whose keys
    are there beside this package's words for them.

    Every key of `config.json` is an attribute and may be changed until the model is built
    (`pre_seq_len`, `prefix_projection`). Beside them: `family`, the name of one in
    glmlora/families, and `rope_mode`, what `rope_ratio` means: "base" multiplies the rotary base
    10000, "interpolate" divides positions, "half" is a table rounded to float16, as the oldest
    published code has it.
    """

    family: str
    model_type: str
    num_layers: int
    padded_vocab_size: int
    hidden_size: int
    ffn_hidden_size: int
    kv_channels: int
    num_attention_heads: int
    seq_length: int
    layernorm_epsilon: float
    rmsnorm: bool
    apply_residual_connection_post_layernorm: bool
    post_layer_norm: bool
    add_bias_linear: bool
    add_qkv_bias: bool
    multi_query_attention: bool
    multi_query_group_num: int
    original_rope: bool
    rope_ratio: float
    quantization_bit: int
    quantization_group_size: int | None
    pre_seq_len: int | None
    prefix_projection: bool
    tie_word_embeddings: bool
    eos_token_id: int | list[int] | None
    pad_token_id: int | None
    torch_dtype: str | None
    _is_built = False

    def __init__(self, family: str | None = None, rope_mode: str | None = None, **fields: Any):
        fields = completed(fields)
        rope_mode = fields.pop(OWN_ROPE_MODE, None) if rope_mode is None else rope_mode
        own = family or recognition.find(fields)
        self.__dict__.update({k: v for k, v in fields.items() if k not in OWN_KEYS})
        self.family = own
        self._rope_mode = rope_mode
        self.check()

    def __setattr__(self, name: str, value: Any) -> None:
        if self._is_built and name in _READ_ONCE and value != self.__dict__.get(name):
            own = name in GenerationConfig.__dataclass_fields__
            instead = f"set model.generation_config.{name}" if own else "set it before"
            tell.once(f"config.{name}: no effect on a model that is built; {instead}")
        super().__setattr__(name, value)

    def built(self) -> None:
        """Say that a model has been built: from now on a key that it does not read again is told
        when it is set.
        """
        self.__dict__["_is_built"] = True

    @property
    def rope_mode(self) -> str:
        """How `rope_ratio` is read; where nobody says, as the family reads it."""
        if self._rope_mode is not None:
            return self._rope_mode
        return families.of(self.family).rope_mode(self.rope_ratio)

    @rope_mode.setter
    def rope_mode(self, mode: str | None) -> None:
        self._rope_mode = mode

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        family: str | None = None,
        rope_mode: str | None = None,
        subfolder: str = "",
        **overrides: Unpack[ConfigKeywords],
    ) -> ChatGLMConfig:
        """Read `config.json` of a local directory, or of `subfolder` in it. `overrides` replace its
        keys (`pre_seq_len=128`).

        Keywords of transformers that are about downloads (`trust_remote_code`, `revision`,
        `cache_dir`, `token`, `local_files_only`, ...: NOTHING in files/hub.py) are accepted and
        mean nothing: only local files are read and none is executed. Raises OSError when the
        directory or file is absent, ValueError for a field that is wrong or a model this release
        does not support, TypeError for a keyword that is no key of a config.
        """
        directory = model_directory(pretrained_model_name_or_path, subfolder)
        file = directory / "config.json"
        if not file.exists():
            adapter = (directory / "adapter_config.json").exists()
            what = (
                "; it is an adapter's directory: open its base model, then "
                "PeftModel.from_pretrained(model, directory)"
                if adapter
                else folder_kind(directory)
            )
            raise OSError(
                f"{file}: not found; a model directory holds config.json and the weights{what}"
            )
        fields = read_json(file, dict)
        keys = {k: v for k, v in overrides.items() if k in fields or is_key(k)}
        others = {k: v for k, v in overrides.items() if k not in keys}
        check_keywords(
            f"{cls.__name__}.from_pretrained",
            others,
            ["family", "rope_mode", "subfolder", *fields, *DEFAULTS],
            CONFIG_NEUTRAL,
            CONFIG_REASONS,
        )
        fields.update(keys)
        # Users write what they would say otherwise into the file, under the names of the keywords.
        for name, own in (("family", recognition.OWN_KEY), ("rope_mode", OWN_ROPE_MODE)):
            if name in fields:
                fields[own] = fields.pop(name)
        try:
            for name in fields:
                if name != "self" and not hasattr(cls, name):
                    continue
                raise ValueError(f"{short_repr(name)}: no config has a key of this name")
            if family is None:
                family = recognition.find(fields, directory, tokenizer_fields(directory))
            else:
                family = families.of(family).name
            config = cls(family=family, rope_mode=rope_mode, **fields)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None
        if families.of(family).model_type != DEFAULTS["model_type"]:  # a layout that reads it
            fields.pop("rope_scaling", None)
        for text in _without_effect(fields):
            tell.once(f"{file}: {text}")
        return config

    def check(self) -> None:
        """Raise ValueError naming a field that no supported model can have."""
        families.refuse_others(self.__dict__)
        known = families.all_families()
        if self.family not in known:
            raise ValueError(f"family: expected one of {' '.join(known)}, got {self.family!r}")
        layout = known[self.family].model_type
        if layout != self.model_type:
            raise ValueError(
                f"family: {self.family!r} has model_type {layout!r}, config.json says "
                f"{self.model_type!r}"
            )
        alike = families.of_layout(self.__dict__)
        if known[self.family] not in alike:
            raise ValueError(
                f"family: config.json has the keys of {alike[0].name!r}, got {self.family!r}"
            )
        for name in _SIZES:
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value < 1 << 31:
                raise ValueError(f"{name}: expected a whole number from 1, got {short_repr(value)}")
        for name in _FLAGS:
            value = getattr(self, name)
            if value not in (True, False):
                raise ValueError(f"{name}: expected true or false, got {value!r}")
        for name, only in _ONLY.items():
            value = getattr(self, name)
            if bool(value) != only:
                raise ValueError(
                    f"{name} {value!r} is not supported by this release, only {only!r}"
                )
        refuse_quantization(self.__dict__)
        check_form(self.quantization_bit, self.quantization_group_size)
        if self.get("quantization_embeddings"):
            raise ValueError("quantization_embeddings: only linear layers may be quantized")
        for name in ("layernorm_epsilon", "rope_ratio"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e9:
                raise ValueError(f"{name}: expected a positive number, got {value!r}")
        if self.num_attention_heads % self.multi_query_group_num:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is no multiple of "
                f"multi_query_group_num {self.multi_query_group_num}"
            )
        if self.kv_channels % 4:
            raise ValueError(f"kv_channels: expected a multiple of 4, got {self.kv_channels}")
        length = self.pre_seq_len
        if length is not None and (type(length) is not int or length < 1):
            raise ValueError(f"pre_seq_len: expected a whole number from 1 or null, got {length!r}")
        if not isinstance(self.prefix_projection, bool | int | None):
            raise ValueError(
                f"prefix_projection: expected true or false, got {self.prefix_projection!r}"
            )
        families.of(self.family).check_config(self)
        if self._rope_mode not in (None, *ROPE_MODES):
            raise ValueError(
                f"rope_mode: expected one of {' '.join(ROPE_MODES)}, got {self._rope_mode!r}"
            )
        pad = self.pad_token_id
        if pad is not None and (type(pad) is not int or not -(1 << 31) <= pad < 1 << 31):
            raise ValueError(f"pad_token_id: expected an id or null, got {short_repr(pad)}")
        self.eos_token_ids  # noqa: B018  checks the field

    @property
    def eos_token_ids(self) -> list[int]:
        """`eos_token_id` as a list."""
        ids = self.eos_token_id
        ids = [] if ids is None else list(ids) if isinstance(ids, list | tuple) else [ids]
        for i in ids:
            if type(i) is not int:
                raise ValueError(
                    "eos_token_id: expected a number or a list of numbers, got "
                    f"{self.eos_token_id!r}"
                )
        return ids

    @property
    def prefix_width(self) -> int:
        """Numbers of one prefix row, 2 * layers * groups * head size: the keys and values of every
        layer.
        """
        return 2 * self.num_layers * self.multi_query_group_num * self.kv_channels

    def arch(self) -> dict[str, Any]:
        """What the core must know, under the names of `_core.Model`."""
        self.check()
        return families.of(self.family).arch(self)

    @property
    def context(self) -> Context | None:
        """See `Family.context`."""
        return families.of(self.family).context(self)

    @property
    def tied_head(self) -> bool:
        """Whether the output layer's weight is that of the embeddings."""
        return families.of(self.family).ties_head and bool(self.tie_word_embeddings)

    @property
    def tensor_names(self) -> Mapping[str, str]:
        """The checkpoint's names of the modules, see `Family.tensor_names`."""
        return families.of(self.family).tensor_names

    def to_dict(self) -> dict[str, Any]:
        """The keys of `config.json`: everything read, and defaults that were not."""
        return {
            k: v for k, v in self.__dict__.items() if k not in ("family", "_rope_mode", "_is_built")
        }

    def file_fields(self, *folders: Path) -> dict[str, Any]:
        """What `config.json` in a directory says. folders: where its files are, or are going to be:
        `auto_map` names no code that is in none of them.
        """
        fields = self.to_dict()
        if fields["pre_seq_len"] is None:
            del fields["pre_seq_len"], fields["prefix_projection"]
        for name in ("rope_ratio", "quantization_bit", "torch_dtype"):
            if fields[name] == DEFAULTS[name]:
                del fields[name]
        if "auto_map" in fields:
            fields["auto_map"] = whole_references(fields["auto_map"], folders)
            if fields["auto_map"] is None:
                del fields["auto_map"]
        if not recognition.tells(fields, self.family):
            fields[recognition.OWN_KEY] = self.family
        if self._rope_mode is not None:
            fields[OWN_ROPE_MODE] = self._rope_mode
        return families.of(self.family).file_fields(fields)

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], **others: Unpack[SaveKeywords]
    ) -> None:
        """Write config.json into a directory, atomically; the directory is made if it is absent.
        Its `auto_map` keeps the entries whose files are there. others: as in the model's.
        """
        check_keywords("save_pretrained", others, ["save_directory"], SAVE_NEUTRAL, SAVE_REASONS)
        directory = Path(save_directory)
        directory.mkdir(parents=True, exist_ok=True)
        write_json(directory / "config.json", self.file_fields(directory))

    def get(self, name: str, default: Any = None) -> Any:
        """Value of a key, or `default`."""
        return self.__dict__.get(name, default)

    def __repr__(self) -> str:
        return f"ChatGLMConfig(family={self.family!r}, {self.to_dict()})"


def _without_effect(fields: Mapping[str, Any]) -> list[str]:
    """Sentences about keys that would change a model elsewhere, and about misspelt ones."""
    told = [
        f"{n} {fields[n]!r} has no effect: {why}" for n, why in _UNUSED.items() if fields.get(n)
    ]
    layers, other = fields.get("num_layers"), fields.get("num_hidden_layers")
    if None not in (layers, other) and layers != other:
        told.append(f"num_hidden_layers {other!r} has no effect: num_layers is {layers!r}")
    for name in fields:
        near = get_close_matches(str(name), DEFAULTS, 1, 0.9) if not is_key(name) else []
        if near and name not in OWN_KEYS:
            told.append(f"{short_repr(name)} is not used (did you mean {near[0]!r}?)")
    return told


def is_key(name: str) -> bool:
    """Whether config.json may have such a key, be it there or not."""
    return name in DEFAULTS or name in _MORE_KEYS


def tokenizer_fields(directory: Path) -> dict[str, Any]:
    """tokenizer_config.json of a directory, {} where there is none that can be read: a model opens
    without, and who opens the tokenizer is told.
    """
    try:
        return read_json(directory / "tokenizer_config.json", dict)
    except (OSError, ValueError):
        return {}


def completed(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a config.json in the form that this package reads, with defaults of the others.

    Other programs write some of them otherwise: null for the default, 28.0 for 28, another name, a
    list around a value; other layouts have other words.
    """
    for family in families.of_layout({"model_type": DEFAULTS["model_type"], **fields})[:1]:
        fields = family.own_fields(fields)
    found = {
        k: v
        for k, v in fields.items()
        if v is not None or DEFAULTS.get(k) is None or k in _MAY_BE_NULL
    }
    for name in set(found) & set(DEFAULTS) - {"eos_token_id"}:
        found[name] = innermost(found[name])
    for other, name in _OTHER_NAMES.items():
        if found.get(name) is None and found.get(other) is not None:
            found[name] = found[other]
    for name in _SIZES:
        if isinstance(found.get(name), float) and found[name].is_integer():
            found[name] = int(found[name])
    return {**DEFAULTS, **found}


def innermost(value: Any) -> Any:
    """The value in lists of one item, as a stray comma in a published config makes them."""
    while isinstance(value, list | tuple) and len(value) == 1:
        value = value[0]
    return value


class AutoConfig:
    """`AutoConfig.from_pretrained(path)` -> ChatGLMConfig."""

    from_pretrained = ChatGLMConfig.from_pretrained
