"""Names of transformers' GenerationConfig and generate that are no setting here: those that mean
nothing, and those that are refused unless they have the value that changes nothing.
"""

from __future__ import annotations

from typing import Any

# Accepted with any value. The cache is always kept and grows as needed, nothing is compiled, scores
# that are not finite stop with an error, and there is no encoder and no assistant model.
NOTHING = frozenset(
    "cache_implementation cache_config max_cache_len compile_config disable_compile low_memory "
    "prefill_chunk_size continuous_batching_config synced_gpus remove_invalid_values "
    "decoder_start_token_id is_assistant num_assistant_tokens num_assistant_tokens_schedule "
    "assistant_confidence_threshold assistant_lookbehind target_lookbehind "
    "assistant_ensemble_weight max_matching_ngram_size speculation_type transformers_version "
    "_from_model_config _commit_hash _original_object_hash".split()
)

_PROCESSOR = "a function for logits_processor can do it"
_BEAMS = "num_beams does plain beam search"
_ASSISTANT = "every token comes from this model alone"

# name -> (values that change nothing, what to do instead)
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "top_h": ((None,), "top_k, top_p and min_p cut the distribution"),
    "typical_p": ((None, 1), "top_k, top_p and min_p cut the distribution"),
    "epsilon_cutoff": ((None, 0), "top_k, top_p and min_p cut the distribution"),
    "eta_cutoff": ((None, 0), "top_k, top_p and min_p cut the distribution"),
    "encoder_repetition_penalty": ((None, 1), "repetition_penalty covers the prompt too"),
    "encoder_no_repeat_ngram_size": ((None, 0), "no_repeat_ngram_size covers the prompt too"),
    "exponential_decay_length_penalty": ((None,), _PROCESSOR),
    "sequence_bias": ((None,), "bad_words_ids forbids sequences; " + _PROCESSOR),
    "guidance_scale": ((None, 1), _PROCESSOR),
    "negative_prompt_ids": ((None,), _PROCESSOR),
    "negative_prompt_attention_mask": ((None,), _PROCESSOR),
    "watermarking_config": ((None,), _PROCESSOR),
    "token_healing": ((None, False), "leave the last token of the prompt out yourself"),
    "output_attentions": ((None, False), "attention weights are not kept"),
    "output_hidden_states": (
        (None, False),
        "model(ids, output_hidden_states=True) gives those of a sequence",
    ),
    "penalty_alpha": ((None, 0), "do_sample or num_beams choose otherwise than greedily"),
    "dola_layers": ((None,), "do_sample or num_beams choose otherwise than greedily"),
    "diversity_penalty": ((None, 0), _BEAMS),
    "num_beam_groups": ((None, 1), _BEAMS),
    "constraints": ((None,), "prefix_allowed_tokens_fn restricts what may follow"),
    "force_words_ids": ((None,), "prefix_allowed_tokens_fn restricts what may follow"),
    "assistant_model": ((None,), _ASSISTANT),
    "prompt_lookup_num_tokens": ((None,), _ASSISTANT),
    "assistant_early_exit": ((None,), _ASSISTANT),
    "use_mtp": ((None, False), _ASSISTANT),
    "custom_generate": ((None,), "stream_generate gives a loop of your own each token"),
}


def changes_nothing(name: str, value: Any) -> bool:
    """Whether `name` is one of transformers' that is accepted and means nothing. ValueError naming
    it where it would mean something that is not there; False for other names.
    """
    if name in NOTHING:
        return True
    if name not in REFUSED:
        return False
    neutral, instead = REFUSED[name]
    if not any(value is n or (isinstance(value, int | float) and value == n) for n in neutral):
        raise ValueError(f"{name}: is not supported, got {value!r:.80}; {instead}")
    return True
