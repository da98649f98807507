"""Checks of language models: decoding token by token says what a whole pass says, and every expert gets tokens."""

from dataclasses import replace

import numpy as np

from mlx_training.backend import Arrays
from mlx_training.data.batch import Batch
from mlx_training.diagnostics.exam import Check, Exam, only_label
from mlx_training.diagnostics.report import Finding, failed, passed, skipped
from mlx_training.objectives.lm import lm

NEW_TOKENS = 3  # that are read one by one
SAME = {"float32": 1e-3, "bfloat16": 0.1}  # nats
NEVER = 1e-3  # of an expert's fair share of probability: less, and it is not by chance that no token comes


def decoding(exam: Exam) -> Finding:
    """Tokens that are read one by one, after prompts of two lengths, get the loss that they have in a whole text."""
    name, subject, whole = "decoding", exam.subject, replace(exam.batches[0], segments=None)
    length = int(whole.lengths.min()) - NEW_TOKENS
    if not hasattr(subject.model, "lm") or whole.series is not None or whole.positions is not None or length < 2:
        return skipped(name, "no text in windows, or no model of this package")
    rows = np.arange(min(2, len(whole.lengths)))
    lengths = (length - rows).astype(np.int32)  # the second prompt is shorter: padding stands before it
    session, worst = subject.backend.session(subject.model), 0.0
    logits = session.prefill(_prompt(whole, lengths))
    for token in range(NEW_TOKENS):
        places = lengths - 1 + token
        if token:
            logits = session.extend(whole.tokens[rows, places])
        losses = _log_sum_exp(logits) - logits[rows, whole.targets[rows, places]]
        for row, place, loss in zip(rows.tolist(), places.tolist(), losses.tolist(), strict=True):
            expected = subject.backend.score(subject.model, lm, only_label(whole, row, place))["loss"]
            worst = max(worst, abs(loss - expected))
    figure = f"losses of {NEW_TOKENS} tokens differ by {worst:.1e} from those in the whole text"
    if not worst <= SAME[subject.backend.runtime.precision]:
        return failed(name, figure, "decoding_differs")
    return passed(name, figure)


def experts(exam: Exam) -> list[Finding]:
    """Every expert of every layer is chosen, or has at least a chance."""
    name, spec = "experts", getattr(exam.subject.spec, "experts", None)
    if spec is None:
        return []
    routers: dict[str, list[np.ndarray]] = {}
    for batch in exam.batches:
        real = np.arange(batch.tokens.shape[1]) < batch.lengths[:, None]
        for path, logits in _routers(exam, batch).items():
            routers.setdefault(path, []).append(logits[real])
    unused, shares = [], []
    for path, parts in routers.items():
        logits_XE = np.concatenate(parts).astype(np.float64)
        chosen = np.argsort(-logits_XE, axis=-1)[:, : spec.num_active]
        share_E = np.bincount(chosen.ravel(), minlength=spec.num_experts) / chosen.size
        mean_E = np.exp(logits_XE - _log_sum_exp(logits_XE)[:, None]).mean(0)
        never = (share_E == 0) & (mean_E * spec.num_experts < NEVER)
        unused += [f"{path.removesuffix('.router')}, expert {index}" for index in np.flatnonzero(never)]
        shares += share_E.tolist()
    if unused:
        return [failed(name, f"{len(unused)} of {len(shares)} never get a token", "expert_unused", unused[:8])]
    return [passed(name, f"each has {min(shares):.0%} to {max(shares):.0%} of the tokens")]


CHECKS = (Check("decoding", decoding), Check("experts", experts))


def _prompt(batch: Batch, lengths: np.ndarray) -> Batch:
    """The first tokens of the first rows."""
    count, longest = len(lengths), int(lengths.max())
    parts = {name: getattr(batch, name)[:count, :longest] for name in ("tokens", "targets", "mask")}
    return replace(batch, **parts, lengths=lengths, rows=batch.rows[:count])


def _routers(exam: Exam, batch: Batch) -> Arrays:
    outputs = exam.subject.backend.activations(exam.subject.model, exam.subject.objective, batch)
    return {path: array for path, array in outputs.items() if path.endswith(".router")}


def _log_sum_exp(logits: np.ndarray) -> np.ndarray:
    highest = logits.max(-1)
    return highest + np.log(np.exp(logits - highest[..., None]).sum(-1))
