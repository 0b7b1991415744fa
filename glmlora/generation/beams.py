"""Beam search over a scheduler's rows: it looks at the scores, and forks rows."""

from __future__ import annotations

import numpy as np

from .. import _core
from .cache import CachedRow, Model
from .scheduler import Scheduler, Scores, first_room


def best_answers(
    model: Model,
    prompt: list[int],
    limit: int,
    change: Scores,
    draw: tuple[int, int],
    number: int = 0,
) -> list[tuple[float, list[int]]]:
    """The best `num_return_sequences` answers to one prompt, (score, new ids) each. The score is
    the sum of log probabilities / length ** length_penalty. number: of the prompt.

    The rules are transformers': twice as many candidates as beams (more with several end ids), an
    end counts among the first `num_beams` of them, and the search is over when no running beam can
    beat the worst finished one. With `do_sample`, candidates are drawn without replacement from the
    warped distribution, of which at least two tokens of each beam survive.
    """
    g = change.settings
    n = int(g.num_beams)
    wanted = n * max(2, 1 + len(change.eos))
    scheduler = Scheduler(CachedRow(model, n, first_room([len(prompt)], [limit])), change)
    scheduler.submit(prompt, limit, number=number)
    scores = np.repeat(scheduler.scores(), n, axis=0)
    scheduler.fork([0] * n)
    sums = np.full(n, -np.inf)
    sums[0] = 0.0  # the beams are still alike
    finished: list[tuple[float, list[int]]] = []
    for index in range(limit):
        table = np.empty(scores.shape)
        for beam, request in enumerate(scheduler.running):
            logp = change(_log_softmax(scores[beam]), request)
            if g.renormalize_logits:
                logp = _log_softmax(logp)
            if g.samples:
                warped = _core.warp_logits(
                    logp, float(g.temperature), int(g.top_k), float(g.top_p), 2
                )
                if g.min_p:  # at least two tokens of each beam survive here, too
                    least = min(g.min_p * warped.max(), np.partition(warped, -2)[-2])
                    warped[warped < least] = 0
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
            request = scheduler.running[beam]
            ended = token in change.eos or index + 1 == limit
            if ended or change.stops([*request.ids, token]):
                if rank < n:
                    answer = request.new + [token]
                    finished.append((float(flat[candidate]) / length, answer))
            elif len(chosen) < n:
                chosen.append((float(flat[candidate]), beam, token))
        finished = sorted(finished, key=lambda f: -f[0])[:n]
        if not chosen:
            break
        # The best that a running beam may still reach: with "never" at any length, else at this.
        reach = limit if g.early_stopping == "never" and g.length_penalty > 0 else index + 1
        highest = chosen[0][0] / reach ** float(g.length_penalty)
        enough = g.early_stopping in (True, 1)
        if len(finished) == n and (enough or finished[-1][0] >= highest):
            break
        chosen += [(-np.inf, *chosen[0][1:])] * (n - len(chosen))
        scheduler.fork([beam for _, beam, _ in chosen])
        scheduler.take([token for _, _, token in chosen])
        sums = np.array([total for total, _, _ in chosen])
        scores = scheduler.scores()
    finished += finished[-1:] * (g.num_return_sequences - len(finished))
    return finished[: g.num_return_sequences]


def _log_softmax(scores: np.ndarray) -> np.ndarray:
    wide = scores.astype(np.float64)
    wide -= wide.max()
    return (wide - np.log(np.exp(wide).sum())).astype(np.float32)
