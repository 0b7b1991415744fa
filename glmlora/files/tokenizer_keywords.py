"""Keywords and settings of transformers' tokenizers beside those that have a meaning of their own
here: their types for checkers, the values that ask for nothing, and why others are refused.
"""

from __future__ import annotations

from typing import Any

from .hub import DownloadKeywords

# Settings of transformers' tokenizers that there are not here, and the values that change nothing.
NOT_HERE: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("add_bos_token", "add_eos_token", "add_prefix_space"), (None, False)),
    **dict.fromkeys(("do_lower_case", "remove_space", "keep_accents"), (None, False)),
    **dict.fromkeys(("split_special_tokens", "is_fast"), (None, False)),
    **dict.fromkeys(("cls_token", "sep_token", "mask_token", "sp_model_kwargs"), (None, {})),
    **dict.fromkeys(("additional_special_tokens", "extra_special_tokens"), (None, [], {})),
    "padding_side": (None, "left"),
}


class TokenizerKeywords(DownloadKeywords, total=False):
    """Of AutoTokenizer.from_pretrained, beside those that have a meaning of their own."""

    use_fast: bool
    legacy: bool | None
    from_slow: bool
    verbose: bool
    config: Any
    tokenizer_type: str | None
    mistral_format: Any
    add_bos_token: bool
    add_eos_token: bool
    add_prefix_space: bool | None
    do_lower_case: bool
    remove_space: bool
    keep_accents: bool
    split_special_tokens: bool
    is_fast: bool
    cls_token: str | None
    sep_token: str | None
    mask_token: str | None
    eos_token: str | None
    bos_token: str | None
    unk_token: str | None
    sp_model_kwargs: Any
    additional_special_tokens: Any
    extra_special_tokens: Any
    chat_template: str | None
    gguf_file: str | None


class TokenizerSaveKeywords(DownloadKeywords, total=False):
    """Of save_pretrained."""

    push_to_hub: bool
    legacy_format: bool | None
    filename_prefix: str | None
    save_jinja_files: bool
    commit_message: str | None
    repo_id: str | None


SAVE_NEUTRAL: dict[str, tuple[Any, ...] | None] = {
    "push_to_hub": (False,),
    **dict.fromkeys(("legacy_format", "save_jinja_files", "commit_message", "repo_id")),
}
SAVE_REASONS = {
    "push_to_hub": "nothing is uploaded; upload the directory when it is written",
    "filename_prefix": "files of other names would not be found again",
}
# Keywords of from_pretrained that ask for nothing with these values; None: with any.
NEUTRAL: dict[str, tuple[Any, ...] | None] = {
    **dict.fromkeys(
        ("use_fast", "legacy", "from_slow", "verbose", "config", "tokenizer_type", "mistral_format")
    ),
    **NOT_HERE,
}
REASONS = {
    **dict.fromkeys(NOT_HERE, "has no effect on this tokenizer"),
    **dict.fromkeys(("eos_token", "bos_token", "unk_token"), "the vocabulary has it"),
    "chat_template": "apply_chat_template(chat_template=..) takes another",
    "gguf_file": "GGUF files are not read: get the model's own tokenizer.model",
}
