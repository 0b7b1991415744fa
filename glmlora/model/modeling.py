"""The model that `AutoModel.from_pretrained(directory)` returns.

A model maps its checkpoint, binds the arrays to the core in place, and turns what users pass
(padded arrays, lists) into the ragged batches that the core computes on. Arithmetic happens in the
core; this file moves names and arrays.
"""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import _core, seeds
from ..batch import Batch, as_rows, check_ids, given_rows, padded
from ..files.hub import check_keywords
from ..files.tensor import Tensor, to_arrays
from ..generation import chat as _chat
from ..generation import features as _features
from ..generation import generate as _generate
from ..generation import labels as _labels
from ..generation.cache import CachedRow, PastKeyValues, scores_after
from ..generation.config import GenerationConfig
from ..progress import bar
from ..tables import job as _job
from ..task import Task
from ..tell import warn
from . import device as devices
from .configuration import PREFIX_DROPOUT, ChatGLMConfig
from .device import Device, backend_of
from .keywords import FORWARD_NEUTRAL, FORWARD_REASONS, ForwardKeywords, SaveKeywords
from .output import CausalLMOutput, mean_loss
from .parameters import (
    DTYPE_NAMES,
    PEFT_PREFIX,
    IncompatibleKeys,
    Parameter,
    Transformer,
    Weight,
    check_prefix,
    check_shapes,
    embedding_of,
    float_array,
    fresh_prefix,
    incompatible,
    is_dtype,
    is_lora,
    layers_of,
    output_layer_of,
    own_keys,
    own_names,
    parameter_name,
    parse_dtype,
    prefix_of,
    prefix_shapes,
    sort_tensors,
    tie,
)
from .quantization import SCALE, QuantizedTensor, check_form, is_quantized, join
from .quantization import quantize as quantize_tensor
from .saving import Opened, check_saving, weight_sources, write_model

if TYPE_CHECKING:
    from typing_extensions import Unpack

# Of the memory that is free, what activations may take: other programs and the system's file cache,
# out of which the weights are read again and again, need some.
_FREE_FOR_ACTIVATIONS = 0.7
_LEAST_BUDGET = 1 << 30  # GLM_DEFAULT_BUDGET in csrc/model/state.h


class _Casts:
    """Casts by name; apart from the model, in whose body the method `float` would hide the type."""

    def _cast(self, dtype: str) -> ChatGLMForConditionalGeneration:
        raise NotImplementedError

    def half(self) -> ChatGLMForConditionalGeneration:
        """Store the base weights in float16. Adapters, prefix and trained weights stay float32.
        Returns the model.
        """
        return self._cast("F16")

    def bfloat16(self) -> ChatGLMForConditionalGeneration:
        """Store the base weights in bfloat16; otherwise as `half`."""
        return self._cast("BF16")

    def float(self) -> ChatGLMForConditionalGeneration:
        """Store the base weights in float32."""
        return self._cast("F32")


class ChatGLMForConditionalGeneration(_Casts):
    """A model of one of the families on the C core.

    Made by `AutoModel.from_pretrained`. `core` is the `_core.Model`; `training` says whether
    `backward` applies dropout. One thread at a time may use it: a second gets RuntimeError.
    """

    backend = "cpu"
    products: str | None = None  # what fp16 or bf16 of a training asks of a GPU

    def __init__(
        self,
        config: ChatGLMConfig,
        tensors: Mapping[str, Tensor],
        compute_dtype: str | None = None,
    ):
        """Bind `tensors` (every base weight, and prefix weights if there are any) in place.
        compute_dtype: see `AutoModel.from_pretrained`.

        Raises ValueError naming all tensors that are missing, surplus, misshaped or not floating
        point.
        """
        self.config = config
        self.name_or_path: str | None = None  # the directory it was loaded from
        self.asked_compute_dtype = compute_dtype
        matrices = {t.dtype for t in tensors.values() if len(t.shape) == 2}
        backend = backend_of(self.backend, compute_dtype, matrices)
        self.core = _core.Model(config.arch(), backend, names=config.tensor_names)
        self.device = _device_of(self.backend)
        self.training = False
        self.active_adapter_name = "default"
        self._dropout_key = seeds.next_key()
        self._generation_config = GenerationConfig.from_model_config(config)
        self.opened = Opened(None, {}, self.generation_config)
        self.transformer = Transformer(self)
        self.has_prefix = False
        self.prefix_is_fresh = False
        self.prompt_template = "auto"  # or what it was trained with: of its chats
        self.task: Task | None = None  # what it was trained for, its adapter included
        self.cached_row: CachedRow | None = None  # kept between chats
        self.gradient_checkpointing = False
        self._reserved = (0, 0, 0)  # sizes of the largest training step so far
        self._trainable: list[str] = []
        # base weights that lie where they were bound
        self._stored: dict[str, Tensor | QuantizedTensor] = {}
        self.replaced: dict[str, Any] = {}  # the base's, where an adapter has its own (replaced.py)
        self.neftune_noise_alpha: float | None = None  # of `backward` in train() mode
        self._shapes = self.core.shapes()
        named = own_names(tensors, self._shapes, prefix_of(config))
        tie(named, config)
        bits, group = check_form(config.quantization_bit, config.quantization_group_size)
        if bits:
            named = join(named, self._linear_shapes(), bits, group)
        base, prefix = sort_tensors(named, self._shapes, prefix_of(config))
        for name in self._shapes:
            tensor = base[name]
            self._bind(name, _converted(tensor, "F32") if tensor.dtype == "F64" else tensor)
        if config.pre_seq_len is not None:
            self._build_prefix(prefix)
        elif prefix:
            warn(
                f"the P-Tuning prefix beside the weights ({len(prefix)} tensors) is not used: open "
                "the model with pre_seq_len=.. for it"
            )
        config.built()

    @cached_property
    def dropout_seed(self) -> int:
        """Of its dropout masks."""
        return seeds.seed_of(self._dropout_key)

    @property
    def generation_config(self) -> GenerationConfig:
        """Settings of `generate`, and of `chat` where it has no default of its own."""
        return self._generation_config

    @generation_config.setter
    def generation_config(self, config: GenerationConfig) -> None:
        if not isinstance(config, GenerationConfig):
            kind = type(config).__name__
            raise TypeError(f"generation_config: expected a GenerationConfig, got {kind}")
        self._generation_config = config

    @property
    def compute_dtype(self) -> str:
        """Type of the large products, e.g. "bfloat16"."""
        return self.core.backend.partition("/")[2] or "float32"

    # Building

    def _bind(self, name: str, tensor: Tensor | QuantizedTensor) -> None:
        if isinstance(tensor, QuantizedTensor):
            integers, scale = tensor.integers.data, tensor.scale.data
            self.core.bind(name, integers, tensor.dtype, scale, tensor.group)
        else:
            self.core.bind(name, tensor.data, tensor.dtype)
        self._stored[name] = tensor

    def stored_tensors(self) -> list[Tensor | QuantizedTensor]:
        """Base weights that lie where they were bound: in mapped files, or quantized."""
        return list(self._stored.values())

    def _linear_shapes(self) -> dict[str, tuple[int, ...]]:
        """The matrices of the layers: what is quantized."""
        start = layers_of(self.config)
        return {n: s for n, s in self._shapes.items() if n.startswith(start) and len(s) == 2}

    def _build_prefix(self, tensors: Mapping[str, Tensor]) -> None:
        """A fresh prefix encoder, or the one that a complete checkpoint brought; only the prefix is
        trainable.
        """
        shapes, start = prefix_shapes(self.config), prefix_of(self.config)
        if tensors:
            arrays = {k.removeprefix(start): t.numpy() for k, t in tensors.items()}
            check_prefix(arrays, shapes)
            incompatible(shapes, arrays, True, "prefix encoder")
        else:
            arrays = fresh_prefix(shapes)
        self.set_prefix(arrays, fresh=not tensors)

    def set_prefix(self, arrays: Mapping[str, np.ndarray], fresh: bool = False) -> None:
        """Attach a P-Tuning prefix encoder and make it what is trained.

        arrays: float32 under THUDM's names without `transformer.prefix_encoder.`, of the shapes of
        `prefix_shapes`.
        """
        dropout = float(self.config.get("prefix_dropout", PREFIX_DROPOUT))
        start = prefix_of(self.config)
        given = {start + n: np.ascontiguousarray(a, np.float32) for n, a in arrays.items()}
        self.core.set_prefix(given, dropout)
        self.has_prefix, self.prefix_is_fresh = True, fresh
        self.cached_row = None  # has no room for the prefix
        self.set_trainable(given)

    # Casts and places

    def _cast(self, dtype: str) -> ChatGLMForConditionalGeneration:
        self._apply_trainable()
        trained = set(self.core.trainable())
        for name in self._shapes:
            kept = name in trained or isinstance(self._stored.get(name), QuantizedTensor)
            if not kept and self.stored_dtype(name) != dtype:
                self._bind(name, _converted(self._tensor(name), dtype))
        return self._move(self.device)  # for its products' type

    def _move(self, device: Device) -> ChatGLMForConditionalGeneration:
        """To another device, weight by weight in the order of the files; on failure (MemoryError)
        it is where it was.
        """
        first = self.core.backend
        stored_as = parse_dtype(self.dtype)
        kinds = {self.stored_dtype(n) for n, s in self._shapes.items() if len(s) == 2}
        home = "cpu" if self.backend.startswith(("cuda", "emu")) else self.backend
        cpu = backend_of(home, self.asked_compute_dtype, kinds)
        asked = self.asked_compute_dtype or self.products
        backend = devices.backend(device, stored_as, cpu, asked)
        if _core.backend_name(backend) == first:
            return self
        self._apply_trainable()
        stored = dict(self._stored)
        self.core.move(backend, list(stored))
        self.cached_row = None
        try:
            for name in _uploading(list(stored), device, stored.values()):
                self._bind(name, stored[name])
                if device != "cpu" and isinstance(stored[name], Tensor):
                    _core.drop_pages(stored[name].data)
        except BaseException:
            self.core.move(first, [n for n in stored if n not in self.core.missing()])
            for name, tensor in stored.items():
                self._bind(name, tensor)
            raise
        self.device = device
        return self

    def cuda(self, device: Any = None) -> ChatGLMForConditionalGeneration:
        """Move to a GPU (the first, or a number, or "cuda:1"); returns the model. Without one it
        goes to the CPU with one warning; GLMLORA_STRICT_DEVICE=1 raises RuntimeError instead.

        Raises MemoryError, naming the GPU and the bytes asked and free, where it does not fit.
        """
        return self.to(device="cuda" if device is None else device)

    def cpu(self) -> ChatGLMForConditionalGeneration:
        """Move to the CPU; returns the model."""
        return self.to(device="cpu")

    def to(
        self, *device_or_dtype: Any, device: Any = None, dtype: Any = None
    ) -> ChatGLMForConditionalGeneration:
        """Move ("cpu", "cuda", "cuda:1", 1) or cast ("float16", numpy.float32, torch.bfloat16);
        returns the model.
        """
        for arg in device_or_dtype:
            if is_dtype(arg):
                dtype = arg
            elif device is None and (isinstance(arg, str | int) or hasattr(arg, "type")):
                device = arg
            else:
                raise TypeError(f"to: expected a device or a dtype, got {arg!r}")
        kind = parse_dtype(dtype)
        if kind is not None:
            self._cast(kind)
        return self if device is None else self._move(devices.find(device))

    def eval(self) -> ChatGLMForConditionalGeneration:
        """Turn dropout off; returns the model."""
        return self.train(False)

    def train(self, mode: bool = True) -> ChatGLMForConditionalGeneration:
        """Turn dropout in `backward` on (or off); returns the model."""
        self.training = bool(mode)
        return self

    def quantize(
        self,
        bits: int,
        empty_init: bool = False,
        device: Any = None,
        *,
        group_size: int | None = None,
    ) -> ChatGLMForConditionalGeneration:
        """Store the linear layers as integers of 8 or 4 bits; 0 bits, and a model that is quantized
        so already, leave it as it is. Returns the model.

        Row-wise as THUDM's published models; `group_size` (a multiple of 32, 4 bits only) gives
        each run of so many columns a scale of its own, which is nearer to the float weights.
        Embeddings, output layer, norms and biases keep their type; adapters and a prefix train over
        it. Needs memory for the result, beside what is mapped. `empty_init` and `device` are
        accepted and mean nothing. Raises ValueError for other bits (also where the model is
        quantized to others already) and for a weight that is not finite, RuntimeError while the
        linear layers are trained; the model is unchanged then.
        """
        bits, group = check_form(bits, group_size)
        if not bits or is_quantized(self.config, bits, group_size):
            return self
        self._apply_trainable()
        names = list(self._linear_shapes())
        for name in set(names) & set(self.core.trainable()):
            raise RuntimeError(f"quantize: {name} is being trained; only a frozen base can be")
        before = {}
        try:
            for name in _quantizing(names, sum(self._tensor(n).nbytes for n in names)):
                tensor = self._tensor(name)
                result = quantize_tensor(name, tensor, bits, group)
                before[name] = tensor
                self._bind(name, result)
                _core.drop_pages(tensor.data)
        except BaseException:
            for name, tensor in before.items():
                self._bind(name, tensor)
            raise
        self.config.quantization_bit = bits
        self.config.quantization_group_size = group or None
        # the CPU's products are in another type then; a GPU's stay in theirs
        return self._move(self.device) if self.device == "cpu" else self

    # Weights

    @property
    def dtype(self) -> str:
        """What the base weights are stored in: "float32", "float16" or "bfloat16"."""
        name = embedding_of(self.config)
        return DTYPE_NAMES[getattr(self.replaced.get(name), "dtype", self.stored_dtype(name))]

    def stored_dtype(self, name: str) -> str:
        """File type name ("F16") of a weight as it is held."""
        return self._stored[name].dtype if name in self._stored else self.core.dtype(name)

    def read_weight(self, name: str) -> np.ndarray:
        """A weight's values, a float32 copy."""
        stored = self._stored.get(name)
        return stored.numpy() if isinstance(stored, QuantizedTensor) else self.core.read(name)

    def _tensor(self, name: str) -> Any:
        """A base weight, Tensor or QuantizedTensor, in the type it is held in: in place where it
        was bound, a copy where it was changed.
        """
        if name in self._stored:
            return self._stored[name]
        dtype = self.core.dtype(name)
        return Tensor(_core.convert(self.core.read(name), "F32", dtype), dtype)

    def weights_changed(self, names: Iterable[str]) -> None:
        """Say that the core holds other values than those bound (merge, training)."""
        for name in names:
            self._stored.pop(name, None)

    def base_names(self) -> list[str]:
        """Names of the base weights, without adapters and prefix."""
        return list(self._shapes)

    def named_parameters(self) -> Iterator[tuple[str, Parameter]]:
        """(name, Parameter) of every weight; LoRA names carry the adapter's
        (`...lora_A.default.weight`).
        """
        for name in self.core.names():
            shown = parameter_name(name, self.active_adapter_name)
            yield shown, Parameter(self, shown, name)

    def parameters(self) -> Iterator[Parameter]:
        """Every weight as a Parameter."""
        for _, parameter in self.named_parameters():
            yield parameter

    def num_parameters(self, only_trainable: bool = False) -> int:
        """How many numbers all weights (or the trainable ones) have."""
        parameters = self.parameters()
        return sum(p.numel() for p in parameters if p.requires_grad or not only_trainable)

    def get_memory_footprint(self) -> int:
        """Bytes of all weights as they are held, mapped ones included."""
        size = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
        total = 0
        for name in self.core.names():
            stored = self._stored.get(name)
            count = int(np.prod(self.core.shape(name), dtype=np.int64))
            total += stored.nbytes if stored else count * size[self.core.dtype(name)]
        return total

    def get_input_embeddings(self) -> Weight:
        """`transformer.embedding.word_embeddings`."""
        return Weight(self, embedding_of(self.config))

    def get_output_embeddings(self) -> Weight:
        """`transformer.output_layer`."""
        return Weight(self, output_layer_of(self.config))

    def state_dict(self) -> dict[str, np.ndarray]:
        """Every weight: base ones as they are held (bfloat16 widened to float32), LoRA and prefix
        float32; copies, unless the memory does not suffice (a warning says so). A quantized linear
        is its int8 `weight` and a float16 `weight_scale`.
        """
        tensors = {}
        for name in self._shapes:
            tensor = self._tensor(name)
            if isinstance(tensor, QuantizedTensor):
                tensors[name], tensors[name + SCALE] = tensor.integers, tensor.scale
            else:
                tensors[name] = tensor
        state = to_arrays(tensors, "state_dict")
        for name in self.core.names():
            if name not in state:
                state[name] = self.core.read(name)
        return state

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True
    ) -> IncompatibleKeys:
        """Copy weights in by name, cast to the type each is held in. `rotary_pos_emb.inv_freq` is
        ignored, and so is what torch.compile, DataParallel or PEFT put in front of a name.

        state_dict: arrays, or what NumPy can read. Raises ValueError naming every misshaped weight
        and, if `strict`, every missing and unexpected one; nothing is changed then.
        """
        integers, floats = self._split_quantized(
            own_keys(state_dict, self.core.names(), self.config)
        )
        given = {k: float_array(k, v) for k, v in floats.items()}
        names = [n for n in self.core.names() if n not in integers]
        shapes = {n: self.core.shape(n) for n in names}
        keys = incompatible(names, given, strict, "model")
        check_shapes({n: (shapes[n], given[n].shape) for n in names if n in given})
        trained = set(self.core.trainable())
        for name, tensor in integers.items():
            self._bind(name, tensor)
        for name in names:
            if name not in given:
                continue
            if name in trained or name not in self._shapes:
                self.core.write(name, given[name])
            else:
                dtype = self.stored_dtype(name)
                self._bind(name, Tensor(_core.convert(given[name], "F32", dtype), dtype))
        if any(n.startswith(prefix_of(self.config)) for n in given):
            self.prefix_is_fresh = False
        return keys

    def _split_quantized(
        self, state_dict: Mapping[str, Any]
    ) -> tuple[dict[str, QuantizedTensor], dict[str, Any]]:
        """(quantized weights, the others) of a state dict for this model."""
        bits, group = check_form(self.config.quantization_bit, self.config.quantization_group_size)
        shapes = self._linear_shapes() if bits else {}
        parts = {
            key: value if isinstance(value, Tensor) else Tensor(np.asarray(value))
            for key, value in state_dict.items()
            if key.removesuffix(SCALE) in shapes
        }
        joined = join(parts, shapes, bits, group)
        found = {n: joined[n] for n in shapes if n in joined}
        rest = {k: v for k, v in state_dict.items() if k.removesuffix(SCALE) not in found}
        return found, rest

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        *,
        max_shard_size: int | str = "10GB",
        safe_serialization: bool = True,
        **others: Unpack[SaveKeywords],
    ) -> None:
        """Write the base weights (and a prefix, if there is one) as a whole model directory,
        atomically: with config.json, generation_config.json, and the small files of the directory
        that was opened (tokenizer, template, licence, code that `auto_map` names) that are not
        there yet.

        LoRA tensors are not among them: PeftModel.save_pretrained writes those, merge_and_unload()
        folds them in. is_main_process=False writes nothing. others: keywords of transformers that
        mean nothing here or are refused (SAVE_NEUTRAL and SAVE_REASONS in keywords.py). Raises
        OSError naming the file.
        """
        check_saving("save_pretrained", others)
        if not is_main_process:
            return
        weights = weight_sources(self)
        write_model(self, save_directory, weights, max_shard_size, safe_serialization)

    # What is trained

    @property
    def trainable_names(self) -> list[str]:
        """The core's names of the weights to train, in the order of the flat block."""
        return list(self._trainable)

    def set_trainable(self, names: Iterable[str]) -> None:
        """Choose the weights to train by the core's names; takes effect (and memory) at the next
        backward.

        Another choice than before starts with fresh gradients and moments. Raises ValueError for an
        unknown name.
        """
        names = list(names)
        known = set(self.core.names())
        for name in names:
            if name not in known:
                raise ValueError(f"set_trainable: this model has no weight {name!r}")
        self._trainable = names

    def requires_grad_(self, requires_grad: bool = True) -> ChatGLMForConditionalGeneration:
        """True: train every weight (full-parameter training, 16 bytes each). False: none. Returns
        the model.
        """
        self.set_trainable(self.core.names() if requires_grad else [])
        return self

    def _apply_trainable(self) -> None:
        if self.core.trainable() != self._trainable:
            self.core.set_trainable(self._trainable)
            self.weights_changed(self._trainable)

    def prepare_training(self) -> None:
        """Take the memory for gradients and moments of the chosen weights now.

        Raises RuntimeError when nothing is trainable, MemoryError with the bytes.
        """
        if not self._trainable:
            raise RuntimeError(
                "nothing is trainable: add an adapter with get_peft_model, load one with "
                "is_trainable=True, "
                "or call requires_grad_(True)"
            )
        self._apply_trainable()

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None
    ) -> None:
        """Activations beyond 1 GiB are recomputed in the backward pass rather than kept. Otherwise
        that starts where the free memory ends. The result is the same, bit for bit.
        `gradient_checkpointing_kwargs` is accepted and means nothing.
        """
        self.gradient_checkpointing, self._reserved = True, (0, 0, 0)

    def gradient_checkpointing_disable(self) -> None:
        """Keep the activations that fit into the free memory again."""
        self.gradient_checkpointing, self._reserved = False, (0, 0, 0)

    def activation_budget(self, checkpointing: bool, held: int = 0) -> int:
        """Bytes of activations that a training step may keep before layers are recomputed, 0 for
        the core's default: with `checkpointing`, or where less is free.

        Free is what the system or the control group leaves, without the mapped weights, which
        training reads again and again; held: bytes of activations that this model has already.
        """
        if checkpointing:
            return 0
        if self.device != "cpu":  # whose weights are there already
            available = devices.memory_available(self.device)
        else:
            stored = self.stored_tensors()
            mapped = sum(t.nbytes for t in stored if not isinstance(t, QuantizedTensor))
            available = _core.memory_available() - mapped
        free = int(_FREE_FOR_ACTIVATIONS * (available + held))
        return free if free > _LEAST_BUDGET else 0

    def enable_input_require_grads(self) -> None:
        """Accepted: gradients always reach every trainable weight."""

    # Running

    def _batch(
        self, input_ids: Any, attention_mask: Any, position_ids: Any, labels: Any
    ) -> tuple[Batch, np.ndarray, np.ndarray, tuple[int, int]]:
        """(ragged batch, row and column of each of its tokens, shape of the padded arrays),
        checked.
        """
        ids, mask, places, labels = given_rows(
            input_ids, attention_mask, position_ids, labels, self.config.context
        )
        check_ids("input_ids", ids, self.config.padded_vocab_size)
        if labels is not None:
            check_ids("labels", labels, self.config.padded_vocab_size, ignored=-100)
        batch, row, column = Batch.from_padded(ids, mask, labels, places)
        limit = self.config.seq_length
        longest = int(batch.lengths.max())
        if longest > limit:
            row_number = int(batch.lengths.argmax())
            raise ValueError(
                f"input_ids: row {row_number} has {longest} tokens, the model has positions for "
                f"{limit} (seq_length)"
            )
        if batch.positions is not None and batch.positions.max() >= limit:
            raise ValueError(
                f"position_ids: {batch.positions.max()} is beyond the model's {limit} positions "
                "(seq_length)"
            )
        return batch, row, column, ids.shape

    def forward(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        labels: Any = None,
        output_hidden_states: bool = False,
        return_dict: bool = True,
        use_cache: bool | None = None,
        past_key_values: PastKeyValues | None = None,
        **others: Unpack[ForwardKeywords],
    ) -> Any:
        """Logits of every token, without dropout or gradients.

        input_ids (B, T) integers, arrays or lists; attention_mask (B, T), 0 over padding at either
        end; labels (B, T), not shifted, -100 where not scored (`loss` is their mean; all masked: a
        warning, and None). past_key_values: what an earlier call returned; input_ids are those
        that follow, attention_mask covers all. A call without labels returns it unless `use_cache`
        is False. others: FORWARD_NEUTRAL in keywords.py. Returns a CausalLMOutput, or its tuple
        with `return_dict=False`. Raises ValueError naming argument, row and value.
        """
        if others:
            known = inspect.signature(self.forward).parameters
            check_keywords("forward", others, known, FORWARD_NEUTRAL, FORWARD_REASONS)
        if past_key_values is not None:
            if labels is not None or output_hidden_states:
                raise ValueError("past_key_values: cannot be given with labels or hidden states")
            logits, past = scores_after(
                self, past_key_values, input_ids, attention_mask, position_ids
            )
            out = CausalLMOutput(logits, past_key_values=past)
            return out if return_dict else out.to_tuple()
        batch, row, column, shape = self._batch(input_ids, attention_mask, position_ids, labels)
        if attention_mask is None:
            pad = self.generation_config.pad_token_id
            _generate.warn_of_padding(as_rows("input_ids", input_ids), pad)
        flat, hidden = self.core.forward(
            batch.ids, batch.lengths, batch.positions, hidden_states=bool(output_hidden_states)
        )
        loss = None
        if labels is not None:
            rows, targets = batch.rows_and_targets()
            if rows.size:
                loss = mean_loss(flat, rows, targets)
            else:
                warnings.warn("labels: all are masked (-100), so there is no loss", stacklevel=2)
        states = None
        if hidden is not None:
            states = tuple(padded(layer, row, column, shape) for layer in hidden)
        past = None
        if use_cache or use_cache is None and labels is None and batch.positions is None:
            if batch.positions is not None:
                raise ValueError(
                    "position_ids: with use_cache each row counts from its first token"
                )
            ids = np.split(batch.ids, np.cumsum(batch.lengths)[:-1])
            past = PastKeyValues(self, [part.tolist() for part in ids], width=shape[1])
        out = CausalLMOutput(padded(flat, row, column, shape), loss, past, states)
        return out if return_dict else out.to_tuple()

    __call__ = forward

    def backward(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        labels: Any = None,
        position_ids: Any = None,
    ) -> float:
        """Add the gradients of the labelled tokens' loss; returns this call's mean loss (nats).

        Arguments as in `forward`. Gradients read and used later are means over all tokens
        accumulated since `zero_grad`. Dropout applies in `train()` mode. Raises ValueError where no
        label is left, RuntimeError where nothing is trainable, FloatingPointError naming layer and
        row of a value that is not finite.
        """
        if labels is None:
            raise ValueError("labels: expected an array like input_ids, got None")
        batch, _, _, _ = self._batch(input_ids, attention_mask, position_ids, labels)
        rows, targets = batch.rows_and_targets()
        if not rows.size:
            raise ValueError(
                "labels: no label is left: all are -100, over padding, or the first of a row"
            )
        self.prepare_training()
        self.prefix_is_fresh = False
        sizes = (batch.n_tokens, len(batch.lengths), len(rows))
        if any(n > most for n, most in zip(sizes, self._reserved, strict=True)):
            self._reserved = tuple(map(max, sizes, self._reserved))
            held = self.core.plan(*sizes, True)["held"]
            budget = self.activation_budget(self.gradient_checkpointing, held)
            self.core.reserve(*self._reserved, True, budget)
        return self.core.backward(
            batch.ids,
            batch.lengths,
            rows,
            targets,
            positions=batch.positions,
            dropout_seed=self.dropout_seed,
            dropout=self.training,
            noise=float(self.neftune_noise_alpha or 0) if self.training else 0.0,
        )

    def named_gradients(self) -> dict[str, np.ndarray]:
        """Accumulated gradients (means over the accumulated tokens), float32, under the names that
        files store.
        """
        return {
            PEFT_PREFIX + n if is_lora(n) else n: self.core.read(n, "grad")
            for n in self.core.trainable()
        }

    def zero_grad(self) -> None:
        """Forget the accumulated gradients."""
        self.core.zero_grad()

    # Functions of glmlora/generation, whose first argument is the model

    generate = _generate.generate
    stream_generate = _generate.stream_generate
    chat = _chat.chat
    batch_chat = _chat.batch_chat
    classify = _labels.classify
    features = _features.features
    predict_table = _job.predict_table
    stream_chat = _chat.stream_chat

    def __repr__(self) -> str:
        c = self.config
        return (
            f"ChatGLMForConditionalGeneration(family={c.family!r}, layers={c.num_layers}, "
            f"hidden={c.hidden_size}, vocab={c.padded_vocab_size}, dtype={self.dtype!r})"
        )


def _uploading(names: list[str], device: Device, tensors: Iterable[Any]) -> Iterable[str]:
    small = sum(t.nbytes for t in tensors) < 1 << 28
    return bar(names, desc=f"Weights to {device}", disable=small or device == "cpu")


def _quantizing(names: list[str], nbytes: int) -> Iterable[str]:
    return bar(names, desc="Quantizing", disable=nbytes < 1 << 28)


def _converted(tensor: Tensor, dtype: str) -> Tensor:
    return Tensor(_core.convert(tensor.data, tensor.dtype, dtype), dtype)


def _device_of(backend: str) -> Device:
    kind = backend.partition("/")[0]
    return Device("cpu") if kind.partition(":")[0] not in ("cuda", "emu") else devices.parse(kind)
