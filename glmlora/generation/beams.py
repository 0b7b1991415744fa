"""Beam search over a scheduler's rows: it looks at the scores, and forks rows."""

from __future__ import annotations

import numpy as np

from .. import _core
from .cache import CachedRow, Model
from .scheduler import Scheduler, Scores, first_room


def best_answers(
    model: Model, prompt: list[int], limit: int, change: Scores, draw: tuple[int, int]
) -> list[list[int]]:
    """The best `num_return_sequences` answers to one prompt by sum of log probabilities / length **
    length_penalty.

    The rules are transformers': twice as many candidates as beams (more with several end ids), an
    end counts among the first `num_beams` of them, and the search is over when no running beam can
    beat the worst finished one. With `do_sample`, candidates are drawn without replacement from the
    warped distribution, of which at least two tokens of each beam survive.
    """
    g = change.settings
    n = int(g.num_beams)
    wanted = n * max(2, 1 + len(change.eos))
    scheduler = Scheduler(CachedRow(model, n, first_room([len(prompt)], [limit])), change)
    scheduler.submit(prompt, limit)
    scores = np.repeat(scheduler.scores(), n, axis=0)
    scheduler.fork([0] * n)
    sums = np.full(n, -np.inf)
    sums[0] = 0.0  # the beams are still alike
    finished: list[tuple[float, list[int]]] = []
    for index in range(limit):
        table = np.empty(scores.shape)
        for beam, request in enumerate(scheduler.running):
            logp = change(_log_softmax(scores[beam]), request.ids)
            if g.samples:
                warped = _core.warp_logits(
                    logp, float(g.temperature), int(g.top_k), float(g.top_p), 2
                )
                with np.errstate(divide="ignore"):
                    logp = np.log(warped)
            table[beam] = logp + sums[beam]
        flat = table.reshape(-1)
        keys = flat
        if g.samples:  # the largest of log p + Gumbel noise are draws without replacement
            key = np.array([draw[0], draw[1] << 32 | index], np.uint64)
            keys = flat + np.random.Generator(np.random.Philox(key=key)).gumbel(size=flat.size)
        best = np.argpartition(-keys, min(wanted, flat.size - 1))[:wanted]
        best = best[np.lexsort((best, -flat[best]))]
        length = (index + 1) ** float(g.length_penalty)
        chosen: list[tuple[float, int, int]] = []
        for rank, candidate in enumerate(best):
            beam, token = divmod(int(candidate), scores.shape[1])
            if flat[candidate] == -np.inf:
                break
            if token in change.eos or index + 1 == limit:
                if rank < n:
                    answer = scheduler.running[beam].new + [token]
                    finished.append((float(flat[candidate]) / length, answer))
            elif len(chosen) < n:
                chosen.append((float(flat[candidate]), beam, token))
        finished = sorted(finished, key=lambda f: -f[0])[:n]
        if not chosen:
            break
        highest = chosen[0][0] / length
        if len(finished) == n and (g.early_stopping or finished[-1][0] >= highest):
            break
        chosen += [(-np.inf, *chosen[0][1:])] * (n - len(chosen))
        scheduler.fork([beam for _, beam, _ in chosen])
        scheduler.take([token for _, _, token in chosen])
        sums = np.array([total for total, _, _ in chosen])
        scores = scheduler.scores()
    finished += finished[-1:] * (g.num_return_sequences - len(finished))
    return [answer for _, answer in finished[: g.num_return_sequences]]


def _log_softmax(scores: np.ndarray) -> np.ndarray:
    wide = scores.astype(np.float64)
    wide -= wide.max()
    return (wide - np.log(np.exp(wide).sum())).astype(np.float32)
