"""The weights of a model by name: what they are called and typed, what a set of them must be, and
the views on them that scripts reach for (`model.transformer`, `named_parameters()`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np

from .. import _core, families, tell
from ..files.checkpoint import recomputed
from ..files.foreign import refuse_quantized_names
from ..files.tensor import Tensor, same
from ..seeds import generator
from .configuration import ChatGLMConfig
from .device import Device
from .quantization import SCALE, QuantizedTensor

PEFT_PREFIX = "base_model.model."  # of LoRA tensors in PEFT's files
# What stands before or inside names in files saved from a wrapped model.
_WRAPPING_PARTS = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_WRAPPERS = ("base_model.model.", "model.")
_DTYPES = {
    "float32": "F32",
    "float": "F32",
    "fp32": "F32",
    "float16": "F16",
    "half": "F16",
    "fp16": "F16",
    "bfloat16": "BF16",
    "bf16": "BF16",
}
DTYPE_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
DTYPE_NAMES |= {"I8": "int8", "I4": "int4"}  # of quantized linears


class IncompatibleKeys(NamedTuple):
    """What `load_state_dict(strict=False)` did not use or find."""

    missing_keys: list[str]
    unexpected_keys: list[str]


class HasWeights(Protocol):
    """What a model offers the views of its weights."""

    core: _core.Model
    config: ChatGLMConfig
    device: Device
    has_prefix: bool
    prefix_is_fresh: bool

    @property
    def trainable_names(self) -> list[str]: ...
    def set_trainable(self, names: Iterable[str]) -> None: ...
    def stored_dtype(self, name: str) -> str: ...
    def read_weight(self, name: str) -> np.ndarray: ...


class Parameter:
    """One weight of a model. Reading it copies it out of the core.

    name     as in `named_parameters`; core_name as the core and, but for LoRA, the checkpoint have
    it
    """

    def __init__(self, model: HasWeights, name: str, core_name: str):
        self._model = model
        self.name = name
        self.core_name = core_name

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the dimensions."""
        return self._model.core.shape(self.core_name)

    @property
    def ndim(self) -> int:
        """Number of dimensions, 1 or 2."""
        return len(self.shape)

    @property
    def dtype(self) -> str:
        """ "float32", "float16", "bfloat16", or "int8" and "int4" of a quantized linear."""
        return DTYPE_NAMES[self._model.stored_dtype(self.core_name)]

    @property
    def device(self) -> Device:
        """The model's device."""
        return self._model.device

    def numel(self) -> int:
        """How many numbers the weight has."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def requires_grad(self) -> bool:
        """Whether it is trained; may be set. A change takes effect at the next backward, with fresh
        moments.
        """
        return self.core_name in self._model.trainable_names

    @requires_grad.setter
    def requires_grad(self, on: bool) -> None:
        names = [n for n in self._model.trainable_names if n != self.core_name]
        self._model.set_trainable([*names, self.core_name] if on else names)

    def requires_grad_(self, on: bool = True) -> Parameter:
        """Set `requires_grad`; returns the parameter."""
        self.requires_grad = on
        return self

    def numpy(self) -> np.ndarray:
        """A copy, float32; of a quantized weight integer * scale."""
        return self._model.read_weight(self.core_name)

    @property
    def data(self) -> np.ndarray:
        """A copy, float32; changing it does not change the model."""
        return self.numpy()

    @property
    def grad(self) -> np.ndarray | None:
        """The accumulated gradient (token mean), a copy; None where nothing is accumulated."""
        core = self._model.core
        if not core.accumulated_tokens or self.core_name not in core.trainable():
            return None
        return core.read(self.core_name, "grad")

    def __repr__(self) -> str:
        return f"Parameter({self.name}, {self.dtype}, {self.shape})"


class Weight:
    """A module that is one weight: `.weight` and its shape (embedding, output layer)."""

    def __init__(self, model: HasWeights, name: str):
        self.weight = Parameter(model, name, name)


class PrefixEncoder:
    """The P-Tuning v2 prefix of a model that was built with `pre_seq_len`."""

    def __init__(self, model: HasWeights):
        self._model = model

    def state_dict(self) -> dict[str, np.ndarray]:
        """Its weights, float32, under THUDM's names without `transformer.prefix_encoder.`."""
        core = self._model.core
        start = prefix_of(self._model.config)
        names = [n for n in core.names() if n.startswith(start)]
        return {n.removeprefix(start): core.read(n) for n in names}

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True
    ) -> IncompatibleKeys:
        """Set its weights. Keys with or without `transformer.prefix_encoder.`.

        Raises ValueError naming a weight that is missing, surplus or misshaped, with both lengths.
        """
        start = prefix_of(self._model.config)
        given = {
            without_wrappers(k).removeprefix(start): float_array(k, v)
            for k, v in state_dict.items()
        }
        core = self._model.core
        names = [n.removeprefix(start) for n in core.names() if n.startswith(start)]
        check_prefix(given, {n: core.shape(start + n) for n in names})
        keys = incompatible(names, given, strict, "prefix encoder")
        for name in names:
            if name in given:
                core.write(start + name, given[name])
        self._model.prefix_is_fresh = False
        return keys

    def float(self) -> PrefixEncoder:
        """Nothing: it is float32 always."""
        return self

    half = bfloat16 = float  # THUDM's scripts call them; the encoder stays float32 as in training


class Embedding:
    """`transformer.embedding`: holds `word_embeddings`."""

    def __init__(self, model: HasWeights):
        self.word_embeddings = Weight(model, embedding_of(model.config))


class Transformer:
    """The parts that documented scripts reach for: prefix encoder, output layer, embedding."""

    def __init__(self, model: HasWeights):
        self._model = model

    @property
    def pre_seq_len(self) -> int | None:
        """Length of the P-Tuning prefix, None without one."""
        return self._model.config.pre_seq_len if self._model.has_prefix else None

    @property
    def prefix_encoder(self) -> PrefixEncoder:
        """The P-Tuning prefix. AttributeError for a model built without `pre_seq_len`."""
        if not self._model.has_prefix:
            raise AttributeError(
                "this model has no prefix_encoder: load it with a config whose pre_seq_len is set "
                "(AutoConfig.from_pretrained(path, pre_seq_len=128))"
            )
        return PrefixEncoder(self._model)

    @property
    def output_layer(self) -> Weight:
        """The output layer, `.weight` (V, H)."""
        return Weight(self._model, output_layer_of(self._model.config))

    @property
    def embedding(self) -> Embedding:
        """`.word_embeddings.weight` (V, H)."""
        return Embedding(self._model)


# Names, and checks of what is loaded


def embedding_of(config: ChatGLMConfig) -> str:
    """Name of the word embeddings' weight."""
    return config.tensor_names["word_embeddings"] + ".weight"


def output_layer_of(config: ChatGLMConfig) -> str:
    """Name of the output layer's weight."""
    return weight_of(config, config.tensor_names["output_layer"])


def weight_of(config: ChatGLMConfig, module: str) -> str:
    """Name of a linear's weight: its own, but for an output layer that is the embeddings."""
    if config.tied_head and module == config.tensor_names["output_layer"]:
        return embedding_of(config)
    return module + ".weight"


def prefix_of(config: ChatGLMConfig) -> str:
    """What the names of the prefix encoder's weights begin with."""
    return config.tensor_names["prefix_encoder"] + "."


def layers_of(config: ChatGLMConfig) -> str:
    """What the names of the layers' weights begin with."""
    return config.tensor_names["layer"].partition("{}")[0]


def is_lora(name: str) -> bool:
    """Whether a core name is that of a LoRA tensor."""
    return ".lora_" in name


def parameter_name(name: str, adapter: str) -> str:
    """A core name as PEFT shows it, a LoRA tensor's with its adapter's."""
    for part in (".lora_A.", ".lora_B."):
        if part in name:
            return name.replace(part, f"{part}{adapter}.")
    return f"{name}.{adapter}.weight" if name.endswith(".lora_magnitude_vector") else name


def own_name(name: str, known: Callable[[str], bool]) -> str:
    """A tensor's name as the model has it: what torch.compile, DataParallel, FSDP, PEFT or a class
    around the model put into it is taken out where the rest is a known name.
    """
    plain = name if known(name) else without_wrappers(name)
    for start in _WRAPPERS:
        plain = plain if known(plain) else plain.removeprefix(start)
    return plain if known(plain) else name


def own_names(
    tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], prefix_start: str
) -> dict[str, Tensor]:
    """The tensors of a file under the model's names. ValueError where two names are one of the
    model's and their values differ.
    """

    def known(name: str) -> bool:
        return name.removesuffix(SCALE) in shapes or name.startswith(prefix_start)

    named: dict[str, Tensor] = {}
    source: dict[str, str] = {}
    for name, tensor in tensors.items():
        if recomputed(name):
            continue
        plain = own_name(name, known)
        if plain in named and not same(named[plain], tensor):
            raise ValueError(
                f"{source[plain]} and {name} are both the tensor {plain}, and their values differ"
            )
        named[plain] = named.get(plain, tensor)
        source.setdefault(plain, name)
    return named


def own_keys(
    state_dict: Mapping[str, Any], names: Iterable[str], config: ChatGLMConfig
) -> dict[str, Any]:
    """A state dict under the model's `names`, without what is computed anew and without a tied
    output layer. ValueError where two of its keys are one of them, or that differs.
    """
    known, given = set(names), {}
    for key, value in state_dict.items():
        own = own_name(key, lambda n: n.removesuffix(SCALE) in known)
        if own in given:
            raise ValueError(f"load_state_dict: {own} is there twice, once as {key}")
        if not recomputed(key):
            given[own] = value
    head, embedding = config.tensor_names["output_layer"] + ".weight", embedding_of(config)
    if config.tied_head and head in given and embedding in given:
        if not np.array_equal(given[embedding], given.pop(head)):
            raise ValueError(
                f"load_state_dict: {head} and {embedding} differ, but they are one weight "
                "(tie_word_embeddings)"
            )
    return given


def without_wrappers(name: str) -> str:
    """A tensor's name without the parts that torch.compile, DataParallel and FSDP put into it."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPING_PARTS)


def tie(tensors: dict[str, Tensor], config: ChatGLMConfig) -> None:
    """Where config.json says `tie_word_embeddings`, let the output layer be the embeddings; in a
    layout that does not tie them it begins as a copy, with a warning. ValueError where both are
    there and differ.
    """
    if not config.tie_word_embeddings:
        return
    embedding, output = embedding_of(config), config.tensor_names["output_layer"] + ".weight"
    if embedding in tensors and output in tensors and not same(tensors[embedding], tensors[output]):
        raise ValueError(
            f"tie_word_embeddings is true, but {output} and {embedding} differ: say false in "
            "config.json if the output layer is a weight of its own, as the published models have "
            "it, or leave it out of the file"
        )
    if config.tied_head:
        tensors.pop(output, None)
        return
    if embedding in tensors:
        tensors.setdefault(output, tensors[embedding])
    config.tie_word_embeddings = False
    tell.warn(
        f"tie_word_embeddings: {output} begins as a copy of {embedding}; full-parameter training "
        "and what is saved treat them as two weights"
    )


def sort_tensors(
    tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], prefix_start: str
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(base weights, prefix weights, whose names begin with `prefix_start`). A matrix that is there
    a second time under a name that the model has not is passed over. ValueError naming all that are
    missing, surplus, misshaped or not floats.
    """
    prefix = {n: t for n, t in tensors.items() if n.startswith(prefix_start)}
    base = {n: t for n, t in tensors.items() if n in shapes}
    others = {n: t for n, t in tensors.items() if n not in prefix and n not in shapes}
    surplus = [n for n, t in others.items() if not any(_again(t, b) for b in base.values())]
    base |= {n: others[n] for n in surplus}
    missing = [n for n in shapes if n not in base]
    refuse_quantized_names(surplus)
    for name, tensor in (base | prefix).items():
        quantized = isinstance(tensor, QuantizedTensor)
        if not quantized and tensor.dtype not in ("F32", "F16", "BF16", "F64"):
            raise ValueError(
                f"tensor {name}: type {tensor.dtype}, expected float32, float16 or bfloat16; "
                "config.json of a quantized model says quantization_bit 4 or 8"
            )
    check_shapes({n: (shapes[n], base[n].shape) for n in shapes if n in base})
    if missing and not surplus and len(missing) > len(base):
        what = "the prefix encoder of P-Tuning" if not base else "some of its weights"
        how = (
            "AutoConfig.from_pretrained(base, pre_seq_len=..), AutoModel.from_pretrained(base, "
            "config=config), "
            "then glmlora.load_prefix(model, directory)"
            if not base
            else "AutoModel.from_pretrained(base), then "
            "model.load_state_dict(glmlora.load_state_dict(directory), strict=False)"
        )
        raise ValueError(
            f"holds {what} only ({len(base) + len(prefix)} tensors, {len(missing)} of the model's "
            "are missing): "
            f"it must be loaded over the base model it was trained from: {how}"
        )
    faults = []
    if missing:
        faults.append(f"{len(missing)} tensors are missing: {', '.join(missing)}")
    if surplus:
        faults.append(f"{len(surplus)} tensors are not of this model: {', '.join(surplus)}")
    if faults:
        raise ValueError("; ".join(faults))
    return base, prefix


def _again(tensor: Tensor, base: Tensor | QuantizedTensor) -> bool:
    """Whether a surplus tensor is a weight's second name: a matrix of the same bytes. Vectors of
    norms are alike without being one.
    """
    return isinstance(base, Tensor) and len(tensor.shape) > 1 and same(tensor, base)


def check_shapes(pairs: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]) -> None:
    wrong = [f"{n}: expected {a}, got {b}" for n, (a, b) in pairs.items() if tuple(a) != tuple(b)]
    if wrong:
        raise ValueError("wrong shape: " + "; ".join(wrong))


def incompatible(
    names: Iterable[str], given: Mapping[str, Any], strict: bool, what: str
) -> IncompatibleKeys:
    names = list(names)
    missing = [n for n in names if n not in given]
    surplus = [n for n in given if n not in set(names)]
    if strict and (missing or surplus):
        raise ValueError(
            f"load_state_dict of the {what}: missing {', '.join(missing) or 'none'}; "
            f"unexpected {', '.join(surplus) or 'none'}"
        )
    return IncompatibleKeys(missing, surplus)


def prefix_shapes(config: ChatGLMConfig) -> dict[str, tuple[int, ...]]:
    """Weights of the prefix encoder that a config asks for, with their shapes (without
    `transformer.prefix_encoder.`).
    """
    width, hidden = config.prefix_width, config.hidden_size
    first = families.of(config.family).prefix_input(config) if config.prefix_projection else width
    shapes: dict[str, tuple[int, ...]] = {"embedding.weight": (config.pre_seq_len, first)}
    if config.prefix_projection:
        shapes["trans.0.weight"], shapes["trans.0.bias"] = (hidden, first), (hidden,)
        shapes["trans.2.weight"], shapes["trans.2.bias"] = (width, hidden), (width,)
    return shapes


def fresh_prefix(
    shapes: Mapping[str, tuple[int, ...]], seed: int | None = None, std: float = 1.0
) -> dict[str, np.ndarray]:
    """Initial prefix weights, float32: normal(0, std), linears uniform within 1/sqrt(in)."""
    rng = generator(seed)
    arrays = {}
    for name, shape in shapes.items():
        if name == "embedding.weight":
            arrays[name] = rng.standard_normal(shape, np.float32) * np.float32(std)
        else:
            fan_in = shapes[name.replace("bias", "weight")][1]
            bound = fan_in**-0.5
            arrays[name] = rng.uniform(-bound, bound, shape).astype(np.float32)
    return arrays


def check_prefix(arrays: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """ValueError, with both numbers, for prefix weights of another length or kind than the config
    says.
    """
    found, expected = arrays.get("embedding.weight"), shapes["embedding.weight"]
    if found is not None and found.ndim == 2 and found.shape[0] != expected[0]:
        raise ValueError(
            f"prefix encoder: pre_seq_len is {expected[0]}, but embedding.weight has "
            f"{found.shape[0]} rows"
        )
    projected, wanted = "trans.0.weight" in arrays, "trans.0.weight" in shapes
    if projected != wanted and found is not None:
        raise ValueError(
            f"prefix encoder: prefix_projection is {str(wanted).lower()}, but the weights are "
            f"{'with' if projected else 'without'} projection (trans.0, trans.2)"
        )
    check_shapes({n: (shapes[n], arrays[n].shape) for n in shapes if n in arrays})


def float_array(name: str, value: Any) -> np.ndarray:
    if isinstance(value, Tensor):
        value = value.numpy()
    array = np.asarray(value)
    if array.dtype.kind != "f":
        raise ValueError(f"{name}: expected floating point numbers, got {array.dtype}")
    return np.ascontiguousarray(array, np.float32)


# Types


def is_dtype(value: Any) -> bool:
    if isinstance(value, str):
        return value.removeprefix("torch.") in _DTYPES
    if isinstance(value, type) and issubclass(value, np.generic):
        return True
    return isinstance(value, np.dtype) or str(value).startswith("torch.")


def parse_dtype(value: Any) -> str | None:
    """ "F32", "F16" or "BF16" of a dtype given as name, NumPy or torch object; None for None and
    "auto".
    """
    if value is None or value == "auto":
        return None
    name = value if isinstance(value, str) else str(value)
    if isinstance(value, type) and issubclass(value, np.generic):
        name = np.dtype(value).name
    kind = _DTYPES.get(name.removeprefix("torch."))
    if kind is None:
        raise ValueError(f"dtype: expected float32, float16 or bfloat16, got {value!r}")
    return kind
