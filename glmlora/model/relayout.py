"""Adapters that were made for the other layout of the same model, where one has a linear for
queries, keys and values together and the other has three.

From one to three each part gets A, and its rows of B, of a bias of B and of DoRA's magnitudes. From
three to one the A's are stacked, and B has theirs on its diagonal: the rank is the sum. Both change
the model as the adapter did. What is saved whole (modules_to_save) goes under its other name.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from .. import families, tell
from ..families import Family
from ..families.recognition import own_part
from .adapter_config import ALL_LINEAR, LoraConfig
from .initial import MAGNITUDE, PARTS, mutates, parts_of
from .modeling import ChatGLMForConditionalGeneration
from .parameters import PEFT_PREFIX, float_array

_TOGETHER, _PARTS = "query_key_value", ("query", "key", "value")
Parts = dict[str, np.ndarray]  # of PARTS: A (r, in), B (out, r), and vectors (out)
A_, B_ = PARTS[:2]
Place = tuple[int, str]  # layer, -1 outside the layers; the linear's word in `tensor_names`


def _places(modules: Iterable[str], family: Family) -> dict[Place, str] | None:
    """Where the modules stand in a family's layout; None where one is not of it."""
    names = family.tensor_names
    words = {name: word for word, name in names.items()}
    layer = re.compile(re.escape(names["layer"]).replace(r"\{\}", r"(\d+)") + r"\.(.+)")
    found: dict[Place, str] = {}
    for module in modules:
        inside = layer.fullmatch(module)
        word = words.get(inside[2] if inside else module)
        if word is None:
            return None
        found[int(inside[1]) if inside else -1, word] = module
    return found


def _module(place: Place, family: Family) -> str:
    names = family.tensor_names
    name = names[place[1]]
    return name if place[0] < 0 else f"{names['layer'].format(place[0])}.{name}"


def in_layout(
    source: Any,
    model: ChatGLMForConditionalGeneration,
    config: LoraConfig,
    stored: Mapping[str, Any],
) -> tuple[LoraConfig, Mapping[str, Any]]:
    """An adapter's config and tensors as the model's layout has them: as they are where they are of
    it, or of none. ValueError, that begins with `source`, where they are of a layout that they
    cannot be brought from.
    """
    own = families.of(model.config.family)
    plain = {n.removeprefix(PEFT_PREFIX) for n in stored}
    modules = {n.rpartition(".lora_")[0] for n in plain if ".lora_" in n}
    if not modules or _places(modules, own) is not None:
        return config, stored
    other = _origin(config, own, modules)
    if other is None:
        return config, stored
    reason = _hindrance(config, own, other)
    if reason:
        raise ValueError(
            f"{source}: its names are of the layout {other.model_type!r}, the model's of "
            f"{own.model_type!r}: {reason}; open the model that it was made for"
        )
    given = {
        place: _parts(source, model, config, place, module, stored)
        for place, module in (_places(modules, other) or {}).items()
    }
    whole = _saved(source, own, other, {n for n in plain if ".lora_" not in n})
    tell.warn(
        f"{source}: its names are of the layout {other.model_type!r}: taken for the same linears "
        f"in {own.model_type!r}, which is right for the same model in both"
    )
    parts = _cut(model, given) if "query" in own.tensor_names else _joined(source, model, given)
    tensors = {
        f"{PEFT_PREFIX}{_module(place, own)}.{part}": array
        for place, arrays in parts.items()
        for part, array in arrays.items()
    }
    tensors |= {PEFT_PREFIX + new: stored[PEFT_PREFIX + old] for old, new in whole.items()}
    changed = copy.copy(config)
    if config.modules_to_save:
        changed.modules_to_save = sorted({name.rpartition(".")[0] for name in whole.values()})
    wanted = config.target_modules or ALL_LINEAR
    targets = {_module(place, own) for place in parts}
    if wanted == ALL_LINEAR or isinstance(wanted, list) and "." not in "".join(wanted):
        targets = {name.rpartition(".")[2] for name in targets}  # as short as they were
    changed.target_modules = sorted(targets)
    ranks = {arrays[A_].shape[0] for (_, word), arrays in parts.items() if word == _TOGETHER}
    if ranks and ranks != {config.r}:
        rank = max(ranks)
        scale = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
        changed.rank_pattern = {_TOGETHER: rank}
        alpha = scale * (math.sqrt(rank) if config.use_rslora else rank)
        changed.alpha_pattern = {_TOGETHER: alpha}
    return changed, tensors


def _origin(config: LoraConfig, own: Family, modules: Iterable[str]) -> Family | None:
    """The family that an adapter was made for: that which its base's name says, if the modules are
    of its layout, else one of this layout that it can be brought from, if there is one.
    """
    name = own_part(str(config.base_model_name_or_path or "")).lower()
    found = [f for f in families.all_families().values() if _places(modules, f) is not None]
    found.sort(key=lambda family: not _alike(own, family))
    named = [family for family in found if family.named.search(name)]
    return named[0] if len(named) == 1 else found[0] if found else None


def _alike(own: Family, other: Family) -> bool:
    """Whether their layers have the same weights, but for one linear in place of three."""
    plain = not (own.layout_keys or other.layout_keys)
    return plain and set(own.tensor_names) ^ set(other.tensor_names) == {_TOGETHER, *_PARTS}


def _hindrance(config: LoraConfig, own: Family, other: Family) -> str:
    """Why an adapter cannot be brought from the other layout; empty where it can."""
    if not _alike(own, other):
        return "they are different models"
    for field in ("rank_pattern", "alpha_pattern", "exclude_modules", "layers_pattern"):
        if getattr(config, field):
            return f"{field} names modules of the other"
    if mutates(config):
        return f"init_lora_weights {config.init_lora_weights!r} took a part of its linears"
    return ""


def _saved(source: Any, own: Family, other: Family, names: Iterable[str]) -> dict[str, str]:
    """The names here of weights of the other layout that are saved whole. ValueError, that begins
    with `source`, for one that is not a weight of both.
    """
    found = {}
    for name in names:
        module, _, end = name.rpartition(".")
        place = next(iter(_places([module], other) or {(-1, "")}))
        if place[1] not in own.tensor_names or place[1] in (_TOGETHER, *_PARTS):
            raise ValueError(f"{source}: {name} is in the layout {other.model_type!r} alone")
        found[name] = f"{_module(place, own)}.{end}"
    return found


def _rows(model: ChatGLMForConditionalGeneration) -> dict[str, int]:
    """Of the weights of queries, keys and values."""
    c = model.config
    keys = c.multi_query_group_num * c.kv_channels
    return dict(zip(_PARTS, (c.num_attention_heads * c.kv_channels, keys, keys), strict=True))


def _parts(
    source: Any,
    model: ChatGLMForConditionalGeneration,
    config: LoraConfig,
    place: Place,
    module: str,
    stored: Mapping[str, Any],
) -> Parts:
    """The tensors of a module of the other layout. ValueError, that begins with `source`, for one
    that is missing, or that would not fit the model there.
    """
    layer, word = place
    arrays = {}
    for part in parts_of(config):
        name = f"{PEFT_PREFIX}{module}.{part}"
        if name not in stored:
            raise ValueError(f"{source}: does not fit this model: missing {name}")
        try:
            arrays[part] = float_array(name, stored[name])
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None
    A, B = arrays[A_], arrays[B_]
    rows = {**_rows(model), _TOGETHER: sum(_rows(model).values())}.get(word)
    fits = A.ndim == B.ndim == 2 and A.shape[0] == B.shape[1]
    fits = fits and all(
        arrays[part].shape == B.shape[:1] for part in arrays if part not in (A_, B_)
    )
    if rows is not None:
        fits = fits and (B.shape[0], A.shape[1]) == (rows, model.config.hidden_size)
    if not fits or layer >= model.config.num_layers:
        shape = "" if rows is None else f" of ({rows}, {model.config.hidden_size})"
        raise ValueError(
            f"{source}: does not fit this model: {module}: expected lora_A (r, in) and lora_B "
            f"(out, r){shape} in one of {model.config.num_layers} layers, got {A.shape} and "
            f"{B.shape}"
        )
    return arrays


def _cut(
    model: ChatGLMForConditionalGeneration, given: Mapping[Place, Parts]
) -> dict[Place, Parts]:
    found: dict[Place, Parts] = {}
    for (layer, word), arrays in given.items():
        if word != _TOGETHER:
            found[layer, word] = arrays
            continue
        ends = np.cumsum(list(_rows(model).values()))[:-1]
        for part, array in arrays.items():
            cut = [array.copy() for _ in _PARTS] if part == A_ else np.split(array, ends)
            for own, rows in zip(_PARTS, cut, strict=True):
                found.setdefault((layer, own), {})[part] = np.ascontiguousarray(rows)
    return found


def _joined(
    source: Any, model: ChatGLMForConditionalGeneration, given: Mapping[Place, Parts]
) -> dict[Place, Parts]:
    sizes = _rows(model)
    found = {place: arrays for place, arrays in given.items() if place[1] not in _PARTS}
    for layer in sorted({layer for layer, word in given if word in _PARTS}):
        there = {word: given[layer, word] for word in _PARTS if (layer, word) in given}
        A = np.concatenate([arrays[A_] for arrays in there.values()])
        joined = {A_: A, B_: np.zeros((sum(sizes.values()), A.shape[0]), np.float32)}
        row = column = 0
        for word in _PARTS:
            end = row + sizes[word]
            for part, array in there.get(word, {}).items():
                if part == B_:
                    joined[B_][row:end, column : column + array.shape[1]] = array
                    column += array.shape[1]
                elif part != A_:
                    joined.setdefault(part, np.zeros(sum(sizes.values()), np.float32))
                    joined[part][row:end] = array
            row = end
        if MAGNITUDE in joined and len(there) < len(_PARTS):
            missing = ", ".join(word for word in _PARTS if word not in there)
            raise ValueError(
                f"{source}: use_dora: layer {layer} has no magnitudes of {missing}, which are one "
                "linear with the others in this model; open the model that it was made for"
            )
        found[layer, _TOGETHER] = joined
    return found
