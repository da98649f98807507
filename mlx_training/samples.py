"""Texts that a language model writes while it is trained, at a cadence of their own: samples.jsonl."""

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from mlx_training.evaluate import Evaluator
from mlx_training.generate import Generator
from mlx_training.json_lines import JsonLines
from mlx_training.sampling import Sampling

SAMPLES = "samples.jsonl"


class TrainingSamples:
    """Continues the prompts of `evaluation.samples`, prints the texts and keeps them: {"step", "prompt", "text"}.

    Continues a run that has taken `from_step` steps. `afterwards` is called when texts were written. Raises DataError
    when a prompt is too long for the model.
    """

    def __init__(self, run: Path, evaluator: Evaluator, from_step: int, afterwards: Callable[[], None]) -> None:
        self.config, self.afterwards = evaluator.config.evaluation.samples, afterwards
        self.log = JsonLines(run / SAMPLES, from_step=from_step, lazy=True)
        if self.config is not None:
            options = self.config.model_dump(exclude={"prompts", "every_steps"})
            sampling = Sampling(seed=evaluator.config.experiment.seed, **options)
            parts = (evaluator.backend, evaluator.model, evaluator.data.tokenizer, sampling, evaluator.batch_size)
            self.generator = Generator(*parts)
            for prompt in self.config.prompts:
                self.generator.encode(prompt)

    def write(self, step: int, averaged: Callable[[], AbstractContextManager[None]]) -> None:
        """Write samples, if this is a step for them, with the weights that the model has in this context."""
        if self.config is None or step % self.config.every_steps:
            return
        with averaged():
            texts = self.generator.texts(self.config.prompts)
        for prompt, found in zip(self.config.prompts, texts, strict=True):
            self.log.log({"step": step, "prompt": prompt, "text": found.text})
            clear = "\r\033[K" if sys.stderr.isatty() else ""  # the progress line
            print(f"{clear}step {step}  sample {prompt!r} {found.text!r}", file=sys.stderr)
        self.afterwards()

    def close(self) -> None:
        """Close the file."""
        self.log.close()
