"""Settings of adapters, as PEFT has them: `adapter_config.json` read, checked and written."""

from __future__ import annotations

import inspect
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any
from typing import NoReturn as Never  # typing.Never came with Python 3.11

import numpy as np

from .. import families, tell
from ..files.checkpoint import read_json, write_json
from ..files.hub import near
from ..names import did_you_mean
from .modeling import ChatGLMForConditionalGeneration
from .parameters import layers_of
from .patterns import Pattern

CONFIG = "adapter_config.json"
ALL_LINEAR = "all-linear"


class TaskType(str, Enum):
    """What a model is for. Only CAUSAL_LM is of use here; the others are refused where they are
    given.
    """

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


class PeftType(str, Enum):
    """Kinds of adapters that there are here."""

    LORA = "LORA"
    PREFIX_TUNING = "PREFIX_TUNING"


# Fields of adapter_config.json that PEFT 0.4 knows: a config that holds more cannot be read by it.
_WRITTEN = (
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "fan_in_fan_out",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_dropout",
    "modules_to_save",
    "peft_type",
    "r",
    "revision",
    "target_modules",
    "task_type",
)
# Written when they are not default; any PEFT that can use them knows them.
_WRITTEN_IF_SET = {
    "use_rslora": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "exclude_modules": None,
    "use_dora": False,
    "lora_bias": False,
}
# Fields of later versions that say how something was made or run, not what it computes: any value.
_MEANINGLESS = frozenset(
    """peft_version megatron_config megatron_core runtime_config qalora_group_size
    ensure_weight_tying eva_config corda_config loftq_config lora_ga_config""".split()
)
# Fields of later versions that change what an adapter computes: only null, false and empty ones.
_CHANGING = frozenset(
    """use_qalora use_bdlora layer_replication trainable_token_indices
    target_parameters alora_invocation_tokens arrow_config kasa_config velora_config
    monteclora_config""".split()
)
# Ways to make fresh weights; the MUTATING ones take what they begin with out of the base's weights.
# Those that PEFT has beside ours and that leave the base as it is: an adapter made so is an adapter
# like others. The rest takes something out of the base that the base alone does not tell.
INITIALISATIONS = (True, False, "gaussian")
MUTATING = re.compile(r"pissa(_niter_(\d+))?|olora")
_OTHER_INITIALISATIONS = ("eva", "orthogonal")
_TOLD_INITIALISATIONS = "true, false, 'gaussian', 'pissa', 'pissa_niter_<n>' and 'olora'"
# Tasks whose adapters have no weights beside A and B.
_OTHER_WRAPPERS = ("SEQ_2_SEQ_LM", "QUESTION_ANS", "FEATURE_EXTRACTION")
# What other programs call the fields.
_OTHER_WORDS = {
    "rank": "r",
    "lora_r": "r",
    "lora_rank": "r",
    "alpha": "lora_alpha",
    "scaling": "lora_alpha",
    "lora_scaling": "lora_alpha",
    "dropout": "lora_dropout",
    "lora_target": "target_modules",
    "lora_target_modules": "target_modules",
    "target": "target_modules",
    "targets": "target_modules",
    "modules": "target_modules",
    "rslora": "use_rslora",
    "use_rs_lora": "use_rslora",
    "dora": "use_dora",
    "layers": "layers_to_transform",
    "init_weights": "init_lora_weights",
    "base_model": "base_model_name_or_path",
    "num_virtual_token": "num_virtual_tokens",
    "pre_seq_len": "num_virtual_tokens",
    "prefix_length": "num_virtual_tokens",
}
# What models call the same linears.
_SAME_MODULES = (
    ("query_key_value", "q_proj", "k_proj", "v_proj", "qkv_proj", "W_pack"),
    ("dense", "o_proj", "out_proj", "wo"),
    ("dense_h_to_4h", "gate_up_proj", "gate_proj", "up_proj", "fc1"),
    ("dense_4h_to_h", "down_proj", "fc2"),
    ("output_layer", "lm_head"),
)
_PREFIX_MEANINGLESS = frozenset(
    """auto_mapping peft_version base_model_name_or_path revision token_dim num_layers
    num_attention_heads num_transformer_submodules""".split()
)
# Keywords of PEFT's `from_pretrained` that are about downloads.
HUB = frozenset(
    """revision cache_dir token use_auth_token local_files_only force_download resume_download
    proxies repo_type repo_id""".split()
)


def unknown_argument(what: str, name: str, known: Iterable[str]) -> TypeError:
    """The error for a keyword that there is not, with the nearest right word."""
    known = list(known)
    word = _OTHER_WORDS.get(name)
    near = f" (did you mean {word!r}?)" if word in known else did_you_mean(name, known)
    return TypeError(f"{what}: unknown argument {name!r}{near}")


class PeftConfig:
    """Settings of an adapter. `PeftConfig.from_pretrained(directory)` gives the class of the
    directory's kind.
    """

    peft_type: str
    task_type: str | None
    inference_mode: bool

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        subfolder: str | None = None,
        **hub: Any,
    ) -> Any:
        """Read `adapter_config.json` of a directory, or of its `subfolder`: a LoraConfig or a
        PrefixTuningConfig. Keywords of downloads (`revision`, `cache_dir`, `token`, ..) are
        accepted and mean nothing. ValueError naming a field that is not supported.
        """
        for name in set(hub) - HUB:
            known = [*HUB, "pretrained_model_name_or_path", "subfolder"]
            raise unknown_argument(f"{cls.__name__}.from_pretrained", name, known)
        path = Path(pretrained_model_name_or_path, subfolder or "")
        file = path / CONFIG
        if not file.exists():
            raise ValueError(
                f"Can't find {CONFIG!r} at {os.fspath(path)!r}: {_what_is_there(path)}"
            )
        fields = read_json(file, dict)
        kind = fields.pop("peft_type", None)
        found = next((c for c in (LoraConfig, PrefixTuningConfig) if c.peft_type == kind), None)
        if found is None or not issubclass(found, cls):
            only = f"only {cls.peft_type!r}" if hasattr(cls, "peft_type") else "only 'LORA'"
            raise ValueError(f"{file}: peft_type {kind!r} is not supported by this release, {only}")
        if fields.get("task_type") in _OTHER_WRAPPERS:
            tell.warn(
                f"{file}: task_type {fields['task_type']!r} is another wrapper in PEFT, around the "
                "same numbers: the adapter is taken as one of 'CAUSAL_LM'"
            )
            fields["task_type"] = "CAUSAL_LM"
        # A key with null means the default, as for PEFT's optional fields.
        given = {k: v for k, v in fields.items() if v is not None}
        own = set(inspect.signature(found).parameters)
        try:
            later = _fitting(found, {k: v for k, v in given.items() if k not in own})
            return found(**{k: v for k, v in given.items() if k in own}, **later)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{file}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """The fields that are written."""
        raise NotImplementedError

    def save_pretrained(self, save_directory: str | os.PathLike[str], **hub: Any) -> None:
        """Write `adapter_config.json` into a directory. Keywords of uploads are refused."""
        for name in hub:
            raise unknown_argument(f"{type(self).__name__}.save_pretrained", name, ())
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        write_json(Path(save_directory) / CONFIG, self.to_dict())

    @property
    def is_prompt_learning(self) -> bool:
        """Whether it is a prefix."""
        return self.peft_type == "PREFIX_TUNING"


def _fitting(kind: type, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a file that `kind` does not spell out: those that it knows of, without unknown ones
    of later versions that say "not used". ValueError naming one that says something.
    """
    known = _MEANINGLESS | _CHANGING if kind is LoraConfig else _PREFIX_MEANINGLESS
    for name, value in fields.items():
        if name not in known and value:
            raise ValueError(f"{name} {value!r} is not supported by this release")
    return {k: v for k, v in fields.items() if k in known}


class LoraConfig(PeftConfig):
    """Settings of a LoRA adapter: y = W x + b + scale * B A x.

    r: rank; lora_alpha: scale is lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora;
    lora_dropout on the input of A in training; target_modules: list of module names or endings
    ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h", "output_layer"), a regular
    expression over the whole dotted name (matched in bounded time: no back references), or
    "all-linear", which is all but the output layer; default query_key_value, in the transformers
    layout q_proj, k_proj and v_proj. exclude_modules: not
    these, in the same forms. rank_pattern, alpha_pattern: overrides by module name or ending;
    layers_to_transform: only these layers. init_lora_weights: True (A uniform, B zero), "gaussian"
    (A normal, B zero) or False (both random); "pissa" (of the r largest singular values, exactly;
    "pissa_niter_4" nearly, by four rounds of a randomised method) and "olora" (of a QR
    decomposition) begin with a part of each weight, which the frozen base is then without.
    use_dora: outputs have a magnitude of their own (DoRA); lora_dropout stays on the input of A.
    lora_bias: B has a bias. modules_to_save: modules, by name or its end, that are trained and
    saved whole beside A and B, say the output layer and the embeddings.
    base_model_name_or_path, revision and auto_mapping are kept and written, no more; fan_in_fan_out
    is false with a warning, as no weight of these models is transposed. PEFT's fields that say how
    an adapter was made or run mean nothing here: peft_version, runtime_config, megatron_config,
    megatron_core, eva_config, corda_config, lora_ga_config, loftq_config, qalora_group_size,
    ensure_weight_tying. Its other fields are refused.

    Raises ValueError naming a field that is out of range, or of an adapter kind that is not
    supported; TypeError naming an unknown argument and the nearest one.
    """

    peft_type = "LORA"

    def __init__(
        self,
        task_type: str | TaskType | None = None,
        inference_mode: bool = False,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        target_modules: Sequence[str] | str | None = None,
        bias: str = "none",
        fan_in_fan_out: bool = False,
        modules_to_save: Sequence[str] | None = None,
        init_lora_weights: bool | str = True,
        layers_to_transform: int | Sequence[int] | None = None,
        layers_pattern: str | Sequence[str] | None = None,
        use_rslora: bool = False,
        rank_pattern: Mapping[str, int] | None = None,
        alpha_pattern: Mapping[str, float] | None = None,
        base_model_name_or_path: str | os.PathLike[str] | None = None,
        revision: str | None = None,
        auto_mapping: Any = None,
        exclude_modules: Sequence[str] | str | None = None,
        use_dora: bool = False,
        lora_bias: bool = False,
        peft_type: str | PeftType = "LORA",
        **later: Never,  # of later PEFT versions: refused, unless they say "not used"
    ):
        self.task_type = task_type.value if isinstance(task_type, TaskType) else task_type
        self.inference_mode = _flag("inference_mode", inference_mode)
        self.r = r
        self.lora_alpha = lora_alpha
        self.lora_dropout = lora_dropout
        self.target_modules = _target_words(target_modules)
        self.exclude_modules = _names_or_pattern(exclude_modules) or None
        self.bias = bias
        self.fan_in_fan_out = _flag("fan_in_fan_out", fan_in_fan_out)
        self.modules_to_save = _names_or_pattern(modules_to_save) or None
        self.use_dora = _flag("use_dora", use_dora)
        self.lora_bias = _flag("lora_bias", lora_bias)
        self.init_lora_weights = init_lora_weights
        self.layers_to_transform = layers_to_transform
        self.layers_pattern = layers_pattern or None
        self.use_rslora = _flag("use_rslora", use_rslora)
        self.rank_pattern = _mapping("rank_pattern", rank_pattern)
        self.alpha_pattern = _mapping("alpha_pattern", alpha_pattern)
        if base_model_name_or_path is not None:
            base_model_name_or_path = os.fspath(base_model_name_or_path)
        self.base_model_name_or_path = base_model_name_or_path
        self.revision = revision
        self.auto_mapping = auto_mapping
        _check_kind(self, peft_type)
        self._check(later)

    def _check(self, later: Mapping[str, Any]) -> None:
        _check_task(self.task_type)
        _check_rank("r", self.r)
        for name, rank in self.rank_pattern.items():
            _check_rank(f"rank_pattern[{name!r}]", rank)
        _check_alpha("lora_alpha", self.lora_alpha)
        for name, alpha in self.alpha_pattern.items():
            _check_alpha(f"alpha_pattern[{name!r}]", alpha)
        p = self.lora_dropout
        if isinstance(p, bool) or not isinstance(p, int | float) or not 0 <= p < 1:
            raise ValueError(f"lora_dropout: expected from 0 to below 1, got {p!r}")
        for name, value in (
            ("target_modules", self.target_modules),
            ("exclude_modules", self.exclude_modules),
        ):
            names = value if isinstance(value, list) else []
            if not isinstance(value, str | None) and not (
                names and all(isinstance(t, str) for t in names)
            ):
                raise ValueError(f"{name}: expected names, got {value!r}")
            if isinstance(value, str):
                _compiled(name, value)
        self._check_layers()
        if self.bias != "none":
            raise ValueError(f"bias {self.bias!r} is not supported by this release, only 'none'")
        if self.fan_in_fan_out:
            tell.warn(
                "fan_in_fan_out true: these models store no transposed weights, taken as false"
            )
            self.fan_in_fan_out = False
        names = self.modules_to_save
        if names is not None and not (
            isinstance(names, list) and all(isinstance(n, str) and n for n in names)
        ):
            raise ValueError(f"modules_to_save: expected names in a list, got {names!r}")
        if self.lora_bias and self.use_dora:
            raise ValueError("lora_bias: is not supported together with use_dora")
        if self.lora_bias and self.init_lora_weights not in (True, False):
            raise ValueError(
                f"lora_bias: needs init_lora_weights true or false, got {self.init_lora_weights!r}"
            )
        how = self.init_lora_weights
        known = how in (*INITIALISATIONS, *_OTHER_INITIALISATIONS)
        if not known and not MUTATING.fullmatch(str(how).lower()):
            raise ValueError(
                f"init_lora_weights {how!r} is not supported by this release, only "
                f"{_TOLD_INITIALISATIONS}; adapters that PEFT converted to plain LoRA "
                "(path_initial_model_for_weight_conversion) are read however they began"
            )
        for name, value in later.items():
            if name not in _MEANINGLESS | _CHANGING:
                known = [n for n in inspect.signature(LoraConfig).parameters if n != "later"]
                raise unknown_argument("LoraConfig", name, known)
            if name in _CHANGING and value:
                raise ValueError(f"{name} {value!r} is not supported by this release")

    def _check_layers(self) -> None:
        layers = self.layers_to_transform
        for layer in [layers] if isinstance(layers, int) else layers or []:
            if type(layer) is not int or layer < 0:
                raise ValueError(f"layers_to_transform: expected layer numbers, got {layers!r}")
        if layers is not None and isinstance(self.target_modules, str):
            if self.target_modules != ALL_LINEAR:
                raise ValueError("layers_to_transform: needs target_modules to be a list of names")
        names = (
            [self.layers_pattern] if isinstance(self.layers_pattern, str) else self.layers_pattern
        )
        if names and not (isinstance(names, Sequence) and all(isinstance(n, str) for n in names)):
            raise ValueError(
                f"layers_pattern: expected names of lists of layers, got {names!r:.80}"
            )
        if names and layers is None:
            raise ValueError("layers_pattern: needs layers_to_transform")

    def to_dict(self) -> dict[str, Any]:
        """The fields that are written: those of PEFT 0.4, and newer ones that are not default."""
        fields = {name: getattr(self, name) for name in _WRITTEN}
        for name, default in _WRITTEN_IF_SET.items():
            if getattr(self, name) != default:
                fields[name] = getattr(self, name)
        return fields

    def targets(self, model: ChatGLMForConditionalGeneration) -> dict[str, tuple[int, float]]:
        """{module: (rank, scale)} of the linears of a model that this adapter changes.

        Raises ValueError naming targets that match nothing, or modules other than the linears of a
        layer and the output layer.
        """
        family = families.of(model.config.family)
        wanted = self.target_modules or list(family.targets)
        weights = [n.removesuffix(".weight") for n in model.base_names() if n.endswith(".weight")]
        start = layers_of(model.config)
        linear = {n for n in weights if n.startswith(start) and _leaf(n) in family.linears}
        head = model.config.tensor_names["output_layer"]
        weights += [head] if model.config.tied_head else []
        kinds = (*family.linears, _leaf(head))
        if wanted == ALL_LINEAR:
            matched = [n for n in weights if n in linear]
        else:
            matched = _matching("target_modules", wanted, weights)
        if isinstance(wanted, list):
            ends = {part for n in weights for part in (n, *_endings(n))}
            unmatched = [t for t in wanted if t not in ends]
            if unmatched and len(unmatched) < len(wanted):
                near = _near(unmatched[0], kinds)
                tell.warn(f"target_modules: no module of this model is named {unmatched}{near}")
        if self.layers_to_transform is not None:
            full = wanted if isinstance(wanted, list) else ()  # a whole name says its layer
            matched = [n for n in matched if n in full or self._in_layers(n, start)]
        if self.exclude_modules:
            excluded = set(_matching("exclude_modules", self.exclude_modules, weights))
            matched = [n for n in matched if n not in excluded]
        whole = {name.removesuffix(".weight") for name in self.saved(model)}
        whole |= {head} if model.config.tied_head and whole & set(_tied_modules(model)) else set()
        matched = [n for n in matched if n not in whole]
        if not matched:
            raise ValueError(self._nothing_matches(wanted, kinds))
        other = [n for n in matched if n not in linear and n != head]
        if other:
            raise ValueError(
                f"target_modules: {', '.join(other)}: adapters on this module are not supported "
                "by this release, "
                f"only on {', '.join(kinds)}"
            )
        found = {}
        for name in matched:
            rank = _pattern("rank_pattern", self.rank_pattern, name, self.r)
            alpha = _pattern("alpha_pattern", self.alpha_pattern, name, self.lora_alpha)
            found[name] = (rank, alpha / (math.sqrt(rank) if self.use_rslora else rank))
        for field in ("rank_pattern", "alpha_pattern"):
            for key in getattr(self, field):
                if not any(_pattern(field, {key: True}, name, False) for name in matched):
                    tell.warn(f"{field}: {key!r} is none of the modules that this adapter changes")
        return found

    def saved(self, model: ChatGLMForConditionalGeneration) -> list[str]:
        """Names of the base weights that are trained and saved whole. ValueError naming a word of
        modules_to_save that is no module of the model, or an output layer that is the embeddings
        and would no longer be.
        """
        words = self.modules_to_save or ()
        names = model.base_names()
        modules = {name: name.rpartition(".")[0] for name in names}
        tied = _tied_modules(model)
        for word in words:
            if not any(module.endswith(word) for module in (*modules.values(), *tied)):
                near = did_you_mean(word, sorted({_leaf(m) for m in (*modules.values(), *tied)}))
                raise ValueError(
                    f"modules_to_save: no module of this model is named {word!r}{near}"
                )
        named = [module for module in tied if module.endswith(tuple(words))] if words else []
        if named and len(named) < len(tied):
            raise ValueError(
                f"modules_to_save: {named[0]}: in this model {' and '.join(tied)} are one weight "
                "(tie_word_embeddings), which can only be saved as both: name both"
            )
        ends = tuple(words)
        return [n for n in names if words and modules[n].endswith(ends)]

    def _in_layers(self, module: str, start: str) -> bool:
        wanted, patterns = self.layers_to_transform, self.layers_pattern
        numbers = {wanted} if isinstance(wanted, int) else set(wanted or ())
        if patterns and _leaf(start.rstrip(".")) not in (
            [patterns] if isinstance(patterns, str) else patterns
        ):
            return False
        return not numbers or _layer(module, start) in numbers

    def _nothing_matches(self, wanted: Any, linears: Sequence[str]) -> str:
        limits = (
            "" if self.layers_to_transform is None else f" in layers {self.layers_to_transform}"
        )
        limits += f" outside exclude_modules {self.exclude_modules}" if self.exclude_modules else ""
        if isinstance(wanted, list):
            near = _near(wanted[0], linears)
        else:
            near = " (a text is a regular expression for whole names: give names in a list)"
        return (
            f"target_modules {wanted!r}: no module of this model matches{limits}{near}; "
            f"expected some of {', '.join(linears)}, or {ALL_LINEAR!r}"
        )

    def __repr__(self) -> str:
        fields = {k: v for k, v in self.to_dict().items() if v is not None}
        return f"LoraConfig({', '.join(f'{k}={v!r}' for k, v in fields.items())})"


class PrefixTuningConfig(PeftConfig):
    """Settings of a P-Tuning v2 prefix.

    num_virtual_tokens: its length P; prefix_projection: with the two-layer encoder; init_std: of
    the fresh embedding. token_dim, num_layers, num_attention_heads and num_transformer_submodules
    are the model's, and mean nothing here; nor do auto_mapping, peft_version, revision and
    base_model_name_or_path. Raises as LoraConfig does.
    """

    peft_type = "PREFIX_TUNING"

    def __init__(
        self,
        task_type: str | TaskType | None = None,
        num_virtual_tokens: int | None = None,
        prefix_projection: bool = False,
        inference_mode: bool = False,
        init_std: float = 1.0,
        peft_type: str | PeftType = "PREFIX_TUNING",
        encoder_hidden_size: int | None = None,
        init_weights: str | None = None,
        modules_to_save: Sequence[str] | None = None,
        **meaningless: Any,
    ):
        _check_kind(self, peft_type)
        for name in meaningless.keys() - _PREFIX_MEANINGLESS:
            known = [n for n in inspect.signature(type(self)).parameters if n != "meaningless"]
            raise unknown_argument("PrefixTuningConfig", name, known)
        for name, value in (
            ("encoder_hidden_size", encoder_hidden_size),
            ("init_weights", init_weights),
            ("modules_to_save", modules_to_save),
        ):
            if value:
                raise ValueError(f"{name} {value!r} is not supported by this release")
        self.task_type = task_type.value if isinstance(task_type, TaskType) else task_type
        _check_task(self.task_type)
        _check_rank("num_virtual_tokens", num_virtual_tokens)
        if not isinstance(init_std, int | float) or not 0 <= init_std < math.inf:
            raise ValueError(f"init_std: expected a number from 0, got {init_std!r}")
        self.num_virtual_tokens = num_virtual_tokens
        self.prefix_projection = _flag("prefix_projection", prefix_projection)
        self.inference_mode = _flag("inference_mode", inference_mode)
        self.init_std = init_std

    def to_dict(self) -> dict[str, Any]:
        """All fields."""
        return {"peft_type": self.peft_type, **self.__dict__}

    def __repr__(self) -> str:
        return f"PrefixTuningConfig({', '.join(f'{k}={v!r}' for k, v in self.__dict__.items())})"


def _check_task(task: Any) -> None:
    if task not in (None, "CAUSAL_LM"):
        raise ValueError(f"task_type {task!r} is not supported by this release, only 'CAUSAL_LM'")


def _check_rank(name: str, value: Any) -> None:
    if type(value) is not int or value < 1:
        raise ValueError(f"{name}: expected a whole number from 1, got {value!r}")


def _check_alpha(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name}: expected a number, got {value!r}")


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"{name}: expected True or False, got {value!r}")
    return bool(value)


def _mapping(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping | None):
        raise ValueError(f"{name}: expected a dict of module names, got {value!r}")
    return dict(value or {})


def _near(word: str, kinds: Sequence[str]) -> str:
    """The right word for a target that there is not."""
    same = next((names for names in _SAME_MODULES if word.rpartition(".")[2] in names), ())
    own = [repr(name) for name in same if name in kinds]
    return f" (here it is {', '.join(own)})" if own else did_you_mean(word, kinds)


def _check_kind(config: PeftConfig, peft_type: Any) -> None:
    if peft_type != config.peft_type:
        kind = type(config).__name__
        raise ValueError(f"peft_type: a {kind} is {config.peft_type}, got {peft_type!r}")


def _compiled(name: str, pattern: str) -> Pattern:
    try:
        return Pattern(pattern)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _names_or_pattern(value: Any) -> Any:
    """Names as a sorted list; text and None as they are, and what is none of these."""
    if isinstance(value, Iterable) and not isinstance(value, str | Mapping):
        return sorted(value, key=str)
    return value


def _target_words(value: Any) -> Any:
    """As above, with one way to say that all linears are meant."""
    words = _names_or_pattern(value)
    one = words[0] if isinstance(words, list) and len(words) == 1 else words
    return ALL_LINEAR if str(one).lower() in (ALL_LINEAR, "all", "all_linear") else words


def _matching(field: str, wanted: str | Sequence[str], modules: Sequence[str]) -> list[str]:
    """Modules that a regular expression matches, or that are or end in one of the names."""
    if isinstance(wanted, str):
        pattern = _compiled(field, wanted)
        return [n for n in modules if pattern.fullmatch(n)]
    names = set(wanted)
    return [n for n in modules if n in names or not names.isdisjoint(_endings(n))]


def _endings(module: str) -> list[str]:
    parts = module.split(".")
    return [".".join(parts[i:]) for i in range(1, len(parts))]


def _leaf(module: str) -> str:
    return module.rpartition(".")[2]


def _tied_modules(model: ChatGLMForConditionalGeneration) -> tuple[str, ...]:
    """The embeddings and the output layer, where they are one weight."""
    names = model.config.tensor_names
    both = (names["word_embeddings"], names["output_layer"])
    return both if model.config.tied_head else ()


def _layer(module: str, start: str) -> int | None:
    found = re.match(re.escape(start) + r"(\d+)\.", module)
    return int(found[1]) if found else None


def _pattern(field: str, patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first key that is the module's name, its ending, or a regular expression for
    one of these.
    """
    for key, value in patterns.items():
        if _compiled(field, rf"(.*\.)?({key})").fullmatch(module):
            return value
    return default


def _what_is_there(path: Path) -> str:
    if not path.is_dir():
        return f"there is no such directory{near(path)}"
    if (path / "config.json").is_file() and (path / "pytorch_model.bin").is_file():
        return "it is a model or a P-Tuning directory (glmlora.load_prefix), not an adapter's"
    if (path / "config.json").is_file():
        return "it is a model's directory: AutoModel.from_pretrained opens it"
    within = sorted(path.glob(f"*/{CONFIG}"), key=lambda file: file.stat().st_mtime)
    if within:
        return f"it is not an adapter directory, {within[-1].parent.name!r} in it is one"
    return "it is not an adapter directory"
