"""Scores of a model on records, by loss or generated answers; how metrics are shown and stored."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..batch import Encoded
from ..files.write import read_json, write_json, write_text
from ..generation.chat import end_ids
from ..generation.config import GenerationConfig
from ..generation.generate import generate_rows
from ..generation.labels import Classification, score_ids
from ..model.modeling import ChatGLMForConditionalGeneration
from ..progress import bar
from ..seeds import set_seed
from .arguments import DataArguments, TrainingArguments
from .classes import label_scores
from .methods import unwrapped
from .metrics import compute_metrics

MOST_LABELS = 1000
# How the original decodes while evaluating.
DECODING = {"do_sample": True, "top_p": 0.7, "temperature": 0.95, "top_k": 50}


def progress(total: int, disable: bool | None, initial: int = 0, desc: str | None = None) -> Any:
    """A bar that is shown unless it is disabled."""
    return bar(total=total, initial=initial, desc=desc, disable=bool(disable))


def speed(prefix: str, started: float, samples: float, steps: int) -> dict[str, float]:
    """`<prefix>_runtime` (s), `_samples_per_second` and `_steps_per_second`, rounded as the
    original does.
    """
    runtime = time.perf_counter() - started
    per = max(runtime, 1e-9)
    return {
        f"{prefix}_runtime": round(runtime, 4),
        f"{prefix}_samples_per_second": round(samples / per, 3),
        f"{prefix}_steps_per_second": round(steps / per, 3),
    }


def evaluate_loss(
    core: Any,
    encoded: Encoded,
    batch_size: int,
    disable_tqdm: bool | None = None,
) -> dict[str, float]:
    """`eval_loss`, the mean over all labelled tokens (nats, dropout off), and the speed.

    Raises ValueError where no token is labelled, FloatingPointError for a loss that is not finite.
    """
    started = time.perf_counter()
    n_batches = -(-len(encoded) // batch_size)
    total, tokens = 0.0, 0
    bar = progress(n_batches, disable_tqdm, desc="eval")
    with bar:
        for first in range(0, len(encoded), batch_size):
            rows = np.arange(first, min(first + batch_size, len(encoded)))
            batch = encoded.batch(rows)
            at, targets = batch.rows_and_targets()
            if at.size:
                losses = core.loss(batch.ids, batch.lengths, at, targets)
                total += float(losses.astype(np.float64).sum())
                tokens += at.size
            bar.update()
    if not tokens:
        raise ValueError("eval_data: no label is left: all are masked")
    if not math.isfinite(total):
        raise FloatingPointError(f"evaluation: the loss of {tokens} tokens is {total}")
    return {"eval_loss": total / tokens, **speed("eval", started, len(encoded), n_batches)}


def labels_of(*encoded: Encoded) -> list[tuple[int, ...]]:
    """The different answers of some records, as ids with their end. ValueError where they are too
    many to be labels.
    """
    labels = {tuple(one.target(row).tolist()) for one in encoded for row in range(len(one))}
    if len(labels) > MOST_LABELS:
        raise ValueError(
            f"label_metrics: expected answers that are labels, at most {MOST_LABELS} different "
            f"ones, the data have {len(labels)}"
        )
    return sorted(labels)


def evaluate_labels(
    base: ChatGLMForConditionalGeneration, encoded: Encoded, labels: Sequence[tuple[int, ...]]
) -> dict[str, float]:
    """`eval_accuracy`, `eval_macro_f1` and `eval_log_loss` (nats) by the probability of each of the
    labels after each prompt, as `classify` has it. No prompt is cut again.
    """
    numbers = {label: number for number, label in enumerate(labels)}
    rows = range(len(encoded))
    codes = np.array([numbers[tuple(encoded.target(row).tolist())] for row in rows])
    found = np.empty((len(encoded), len(labels)))
    for row, likelihood in score_ids(base, [encoded.source(row).tolist() for row in rows], labels):
        found[row] = likelihood
    proba = Classification([str(number) for number in range(len(labels))], found).proba
    return {f"eval_{name}": score for name, score in label_scores(codes, proba).items()}


def predict(
    model: Any,
    tokenizer: Any,
    encoded: Encoded,
    prefix: str,
    batch_size: int,
    max_new_tokens: int,
    num_beams: int = 1,
    disable_tqdm: bool | None = None,
    kept: Path | None = None,
) -> tuple[dict[str, float], list[str], list[str]]:
    """Answers by generation: (metrics under `prefix`_, answers, references). kept: where the
    answers so far are written if something stops this.

    Decoded as the original does while evaluating: sampling with top_p 0.7, temperature 0.95 and
    top_k 50, or `num_beams` beams; repeatable by `set_seed`.
    """
    started = time.perf_counter()
    base = unwrapped(model)
    ends = end_ids(base, tokenizer)
    g = GenerationConfig(
        **{**DECODING, "do_sample": num_beams == 1},
        num_beams=num_beams,
        max_new_tokens=max_new_tokens,
        eos_token_id=ends,
    )
    prompts = [encoded.source(row).tolist() for row in range(len(encoded))]
    targets = (encoded.target(row).tolist() for row in range(len(encoded)))
    references = [tokenizer.decode(ids, skip_special_tokens=True) for ids in targets]
    answered: dict[int, str] = {}
    try:
        with progress(len(prompts), disable_tqdm, desc=prefix) as bar:
            for row, ids in generate_rows(base, prompts, g, batch_size):
                stop = next((i for i, token in enumerate(ids) if token in ends), len(ids))
                answered[row] = tokenizer.decode(ids[:stop], skip_special_tokens=True)
                bar.update()
    except BaseException:
        if kept is not None and answered:
            rows = sorted(answered)
            write_predictions(kept, [answered[i] for i in rows], [references[i] for i in rows])
            print(f"{len(rows)} of {len(prompts)} answers are kept in {kept}", file=sys.stderr)
        raise
    answers = [answered[row] for row in range(len(prompts))]
    scores = {f"{prefix}_{k}": v for k, v in compute_metrics(answers, references).items()}
    return (
        {**scores, **speed(prefix, started, len(encoded), -(-len(encoded) // batch_size))},
        answers,
        references,
    )


def write_predictions(path: Path, answers: Sequence[str], references: Sequence[str]) -> None:
    """`generated_predictions.jsonl`: {"label", "predict"} per line, no newline at the end."""
    lines = [
        json.dumps({"label": label, "predict": answer}, ensure_ascii=False)
        for answer, label in zip(answers, references, strict=True)
    ]
    write_text(path, "\n".join(lines))


def metrics_block(split: str, metrics: Mapping[str, Any]) -> str:
    """The `***** train metrics *****` block, laid out as transformers does."""
    shown: dict[str, Any] = {}
    for key, value in metrics.items():
        if key.endswith("_runtime"):
            seconds, rest = divmod(value, 1)
            minutes, s = divmod(int(seconds), 60)
            shown[key] = f"{minutes // 60}:{minutes % 60:02d}:{s:02d}.{int(rest * 100):02d}"
        elif key == "total_flos":
            shown[key] = f"{int(value) >> 30}GF"
        else:
            shown[key] = round(value, 4) if isinstance(value, float) else value
    keys = max(map(len, shown))
    values = max(len(str(v)) for v in shown.values())
    lines = [f"***** {split} metrics *****"]
    lines += [f"  {key:<{keys}} = {shown[key]!s:>{values}}" for key in sorted(shown)]
    return "\n".join(lines)


def save_metrics(output_dir: Path, split: str, metrics: Mapping[str, Any]) -> None:
    """Write `<split>_results.json` and bring them into `all_results.json`."""
    write_json(output_dir / f"{split}_results.json", dict(metrics), indent=4)
    everything = output_dir / "all_results.json"
    known: dict[str, Any] = {}
    if everything.is_file():
        try:
            known = read_json(everything, dict)
        except ValueError:  # somebody else's, or damaged: these results replace it
            known = {}
    write_json(everything, {**known, **metrics}, indent=4)


def report_metrics(
    output_dir: Path, split: str, metrics: Mapping[str, Any], verbose: bool = True
) -> None:
    """Save the metrics; verbose: print them too."""
    if verbose:
        print(metrics_block(split, metrics))
    save_metrics(output_dir, split, metrics)


def evaluate_answers(
    model: Any, tokenizer: Any, encoded: Encoded, args: TrainingArguments, data_args: DataArguments
) -> None:
    """Scores of generated answers for do_eval; the answers too for do_predict."""
    beams = data_args.eval_num_beams or args.generation_num_beams or 1
    for prefix, wanted in (("eval", args.do_eval), ("predict", args.do_predict)):
        if not wanted:
            continue
        set_seed(args.seed)
        path = Path(args.output_dir) / "generated_predictions.jsonl"
        kept = path.with_suffix(".partial.jsonl") if prefix == "predict" else None
        metrics, answers, references = predict(
            model,
            tokenizer,
            encoded,
            prefix,
            args.per_device_eval_batch_size,
            data_args.max_target_length + 1,
            beams,
            args.disable_tqdm,
            kept,
        )
        report_metrics(Path(args.output_dir), prefix, metrics)
        if kept is not None:
            write_predictions(path, answers, references)
