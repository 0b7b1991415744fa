"""Models that are of no family here, by name, and what to get instead."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_TEXT = "get a text model: THUDM/glm-4-9b-chat, chatglm3-6b or chatglm2-6b"
_DENSE = "get a dense model, THUDM/glm-4-9b-chat say"
_KINDS = {  # model_type of config.json: what it is, and what to get instead
    "glm4_moe": ("GLM-4.5 to 4.7, with experts", _DENSE),
    "glm4_moe_lite": ("GLM-4.7-Flash, with experts", _DENSE),
    **dict.fromkeys(
        ("glm_moe_dsa", "glm5_next"),
        ("GLM-5, whose smallest published copy has 91 GiB", _DENSE),
    ),
    **dict.fromkeys(
        ("glm4v", "glm4v_moe", "glm46v", "glm_ocr", "glm_image", "cogvlm", "visualglm"),
        ("a model of images", _TEXT),
    ),
    "glmasr": ("a model of speech", _TEXT),
}


def check(fields: Mapping[str, Any], layouts: Sequence[str]) -> None:
    """ValueError for a config.json of a model that is of none of the families, or whose positions
    are scaled in a way that is not there. layouts: the families' model_types.
    """
    kind = fields.get("model_type")
    if isinstance(kind, str) and kind in _KINDS:
        what, instead = _KINDS[kind]
        raise ValueError(
            f"model_type {kind!r} ({what}) is not supported by this release; {instead}"
        )
    if kind not in layouts:
        known = ", ".join(map(repr, layouts))
        raise ValueError(f"model_type {kind!r} is not supported by this release, only {known}")
    if fields.get("vision_config"):
        raise ValueError(f"vision_config: a model of images is not supported; {_TEXT}")
    for key in ("rope_scaling", "rope_parameters"):
        scaling = fields.get(key)
        if isinstance(scaling, Mapping):
            how = scaling.get("rope_type", scaling.get("type"))
            if how == "yarn":
                raise ValueError(
                    f"{key}: 'yarn' is not supported by this release; without this key the model "
                    "is right for the lengths that it was trained with"
                )
