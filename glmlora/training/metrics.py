"""Scores of generated answers: exact match, character BLEU-4 and, where its libraries are
installed, ROUGE.

Every score is a percentage. ROUGE needs `jieba` and `rouge_chinese`; without them its keys are
absent.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence


def exact_match(pred: str, label: str) -> bool:
    """True where both texts are equal after stripping surrounding white space."""
    return pred.strip() == label.strip()


def bleu4(pred: str, label: str) -> float:
    """Sentence BLEU over characters, in percent: uniform weights of 1- to 4-grams, one reference.

    Papineni et al. 2002, with the third smoothing of Chen and Cherry 2014 (NIST): the i-th n-gram
    order without a match counts as 1 / (2^i * candidates). No common character at all, or an empty
    side, gives 0.
    """
    log_sum, unmatched = 0.0, 0
    for n in range(1, 5):
        have = Counter(pred[i : i + n] for i in range(len(pred) - n + 1))
        want = Counter(label[i : i + n] for i in range(len(label) - n + 1))
        matched = sum(min(count, want[gram]) for gram, count in have.items())
        total = max(1, sum(have.values()))
        if matched == 0:
            if n == 1:
                return 0.0
            unmatched += 1
            log_sum -= math.log(2**unmatched * total)
        else:
            log_sum += math.log(matched / total)
    brevity = 1.0 if len(pred) > len(label) else math.exp(1 - len(label) / len(pred))
    return 100 * brevity * math.exp(log_sum / 4)


def _rouge_scorer():
    """A function (pred, label) -> {"rouge-1": ..., ...} in percent, or None where its libraries are
    missing.
    """
    try:
        import jieba
        from rouge_chinese import Rouge
    except ModuleNotFoundError:
        return None
    scorer = Rouge()

    def score(pred: str, label: str) -> dict[str, float]:
        hypothesis, reference = " ".join(jieba.cut(pred)), " ".join(jieba.cut(label))
        if not hypothesis.split() or not reference.split():
            return {"rouge-1": 0.0, "rouge-2": 0.0, "rouge-l": 0.0}
        return {
            name: 100 * s["f"] for name, s in scorer.get_scores(hypothesis, reference)[0].items()
        }

    return score


def compute_metrics(preds: Sequence[str], labels: Sequence[str]) -> dict[str, float]:
    """Means over all samples in percent, rounded to 4 decimals.

    Keys: `accuracy` (exact match), `bleu-4` and, with jieba and rouge_chinese installed, `rouge-1`,
    `rouge-2`, `rouge-l` (F scores over words). Raises ValueError for no samples or lists of
    different lengths.
    """
    if len(preds) != len(labels):
        raise ValueError(
            f"preds and labels: expected equal lengths, got {len(preds)} and {len(labels)}"
        )
    if len(preds) == 0:
        raise ValueError("preds: expected at least one sample, got none")
    rouge = _rouge_scorer()
    sums: dict[str, float] = {}
    for pred, label in zip(preds, labels, strict=True):
        scores = rouge(pred, label) if rouge else {}
        scores["bleu-4"] = bleu4(pred, label)
        scores["accuracy"] = 100.0 * exact_match(pred, label)
        for name, value in scores.items():
            # Each sample's score is rounded first, as the original does.
            sums[name] = sums.get(name, 0.0) + round(value, 4)
    return {name: round(total / len(preds), 4) for name, total in sums.items()}
