"""Keywords of transformers' `from_pretrained` and `save_pretrained`, beside those that have a
meaning of their own here: their types for checkers, the values that ask for nothing, and why others
are refused.
"""

from __future__ import annotations

from typing import Any, TypedDict

from ..files.hub import DownloadKeywords


class ConfigKeywords(DownloadKeywords, total=False):
    """Of AutoConfig.from_pretrained: keys of config.json to replace, and others."""

    pre_seq_len: int | None
    prefix_projection: bool
    prefix_dropout: float
    seq_length: int
    rope_ratio: float
    eos_token_id: int | list[int] | None
    pad_token_id: int | None
    bos_token_id: int | None
    quantization_bit: int
    tie_word_embeddings: bool
    use_cache: bool
    return_dict: bool
    return_unused_kwargs: bool
    output_attentions: bool
    output_hidden_states: bool
    gguf_file: str | None


class ModelKeywords(ConfigKeywords, total=False):
    """Of AutoModel.from_pretrained."""

    empty_init: bool
    low_cpu_mem_usage: bool | None
    weights_only: bool
    offload_folder: Any
    offload_state_dict: Any
    offload_buffers: Any
    offload_index: Any
    attn_implementation: str | None
    use_flash_attention_2: bool
    ignore_mismatched_sizes: bool
    output_loading_info: bool
    from_tf: bool
    from_flax: bool
    use_kernels: bool
    allow_all_kernels: bool
    torch_compile: bool
    quantization_config: Any
    variant: str | None
    state_dict: Any
    key_mapping: Any
    adapter_kwargs: Any
    adapter_name: str | None
    disable_mmap: bool
    experts_implementation: Any
    fusion_config: Any
    kernel_config: Any
    max_memory: Any
    tp_plan: Any
    tp_size: Any
    device_mesh: Any
    distributed_config: Any


class ForwardKeywords(TypedDict, total=False):
    """Of a call of the model."""

    inputs_embeds: Any
    output_attentions: bool | None
    cache_position: Any
    token_type_ids: Any
    full_attention_mask: Any
    return_last_logit: bool | None
    logits_to_keep: int
    num_logits_to_keep: int


class SaveKeywords(DownloadKeywords, total=False):
    """Of save_pretrained."""

    push_to_hub: bool
    commit_message: str | None
    create_pr: bool
    repo_id: str | None
    distributed_checkpoint: bool
    state_dict: Any
    save_function: Any
    variant: str | None
    save_peft_format: bool
    save_original_format: bool


# Values that ask for nothing; None in place of them: all do.

CONFIG_NEUTRAL: dict[str, tuple[Any, ...] | None] = {
    "return_unused_kwargs": (False,),
    "return_dict": (True,),
    "output_attentions": (False,),
    "output_hidden_states": (False,),
}
MODEL_NEUTRAL: dict[str, tuple[Any, ...] | None] = {
    # weights are mapped, so that nothing has to be made, offloaded or shared out
    **dict.fromkeys(("empty_init", "low_cpu_mem_usage", "weights_only", "experts_implementation")),
    **dict.fromkeys(("offload_folder", "offload_state_dict", "offload_buffers", "offload_index")),
    # attention is exact, and never holds its weights as a whole
    "use_flash_attention_2": None,
    "attn_implementation": (
        *("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"),
    ),
    "use_cache": None,  # there always is one
    "ignore_mismatched_sizes": (False,),
    "output_loading_info": (False,),
    **dict.fromkeys(("from_tf", "from_flax", "use_kernels", "allow_all_kernels"), (False,)),
    **dict.fromkeys(("torch_compile", "disable_mmap"), (False,)),
    **CONFIG_NEUTRAL,
}
FORWARD_NEUTRAL: dict[str, tuple[Any, ...] | None] = {
    "cache_position": None,  # follows from past_key_values
    **dict.fromkeys(("output_attentions", "return_last_logit"), (False,)),
    **dict.fromkeys(("logits_to_keep", "num_logits_to_keep"), (0,)),
}
SAVE_NEUTRAL: dict[str, tuple[Any, ...] | None] = {
    **dict.fromkeys(("push_to_hub", "distributed_checkpoint"), (False,)),
    # what an upload would be called
    **dict.fromkeys(("commit_message", "create_pr", "repo_id")),
    **dict.fromkeys(("save_peft_format", "save_original_format")),
}

# Why, or what instead

_WHOLE = "a model is on one device here: device_map or device names it"
CONFIG_REASONS = {
    "return_unused_kwargs": "unknown keywords are an error here",
    "return_dict": "is an argument of the call: model(..., return_dict=False)",
    "output_attentions": "attention weights are never held as a whole here",
    "output_hidden_states": "is an argument of the call: model(..., output_hidden_states=True)",
    "gguf_file": "GGUF files are not read: get the model's own weights",
}
MODEL_REASONS = {
    "quantization_config": "is not supported; load_in_8bit=True or load_in_4bit=True quantize on "
    "loading, in this package's own int8 and int4",
    "ignore_mismatched_sizes": "every weight must fit; load_state_dict(.., strict=False) takes a "
    "part of them",
    "attn_implementation": "expected one of transformers' names; they all mean the same here",
    "output_loading_info": "missing and surplus tensors are an error here",
    "variant": "weights of a variant are not looked for; rename the files to the usual names",
    "state_dict": "pass it to model.load_state_dict",
    "key_mapping": "rename tensors and pass them to model.load_state_dict",
    **dict.fromkeys(
        ("adapter_kwargs", "adapter_name"), "open the adapter with PeftModel.from_pretrained"
    ),
    "disable_mmap": "weights are always mapped",
    **dict.fromkeys(("fusion_config", "kernel_config"), "kernels are chosen by compute_dtype"),
    **dict.fromkeys(("max_memory", "tp_plan", "tp_size", "device_mesh"), _WHOLE),
    "distributed_config": _WHOLE,
    **CONFIG_REASONS,
}
_LAST = "logits of every token are returned: logits[:, -1] are the last"
FORWARD_REASONS = {
    "inputs_embeds": "the model takes ids",
    "output_attentions": "attention weights are never held as a whole",
    "token_type_ids": "these models have no types of tokens",
    "full_attention_mask": "attention_mask says which tokens there are",
    **dict.fromkeys(("return_last_logit", "logits_to_keep", "num_logits_to_keep"), _LAST),
}
SAVE_REASONS = {
    "push_to_hub": "nothing is uploaded; upload the directory when it is written",
    "state_dict": "pass it to load_state_dict before",
    "save_function": "files are written in one way only",
    "variant": "weights of a variant would not be found again",
}

# What this release lacks of PEFT's wrapper, and what stands in for it.
NOT_IN_WRAPPER = {
    "add_weighted_adapter": "; merge_and_unload(adapter_names=[..]) adds several",
    "merge_adapter": "; merge_and_unload() merges, on a copy where the base is needed again",
    "unmerge_adapter": "; load the base again",
    "base_model_torch_dtype": "; see dtype",
    "create_or_update_model_card": "",
    "get_layer_status": "; see active_adapter and trainable_names",
    "get_model_status": "; see active_adapter and trainable_names",
    "get_prompt": "",
    "get_model_config": "; see config",
    "get_prompt_embedding_to_save": "; see glmlora.save_prefix",
    "has_active_enabled_adapter": "; see active_adapter",
    "inject_adapter": "; get_peft_model attaches",
    "modules_to_save": "",
    "prefix": "",
    "prepare_model_for_gradient_checkpointing": "; see gradient_checkpointing_enable",
    "push_to_hub": "; save_pretrained writes a folder",
    "set_requires_grad": "; see set_adapter and set_trainable",
    "subtract_mutated_init": "; save_pretrained(path_initial_model_for_weight_conversion=..)",
    "supports_lora_conversion": "",
    "target_module_mapping": "",
    "tuner_layer_cls": "",
    "uses_shared_state": "",
}
