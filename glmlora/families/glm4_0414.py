"""GLM-4-0414 and GLM-Z1 (`model_type` glm4): the transformers layout, with norms of what attention
and MLP yield.
"""

from __future__ import annotations

import re

from .glm_hf import GLM


class GLM0414(GLM):
    """The `glm4` layout. This release has no tokenizer and no chat of it."""

    special_tokens = None

    name, alias, title = "0414", "glm4-0414", "GLM-4-0414"
    named = re.compile(r"glm[-_ ]?(4|z1).*0414")
    checkpoint = "THUDM/GLM-4-9B-0414"
    model_type = "glm4"
    tensor_names = {
        **GLM.tensor_names,
        "post_self_attn_layernorm": "post_self_attn_layernorm",
        "post_mlp_layernorm": "post_mlp_layernorm",
    }


FAMILY = GLM0414()
