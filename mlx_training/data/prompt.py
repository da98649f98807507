"""Prompt encoding: a Row becomes tokens with places for its patches, and normalised series.

Legend: L tokens and patches of one row, T samples of one series, n series of one row.
"""

import re
import sys
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

from mlx_training.data.rows import Row
from mlx_training.data.series import SeriesStats, check_series, pad_to, series_stats, zscore
from mlx_training.data.tokenizer import Tokenizer
from mlx_training.errors import DataError

Layout = Literal["standard", "opentslm"]
Normalize = Literal["zscore", "none"]

_NUMBER = r"[-+]?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?"
MAX_ADDED = 128  # bytes added to a text: BOS, a space, ", it has mean ... and std ..." of the largest float32
STATS_TEXT = re.compile(rf"(?:,? |^)it has mean {_NUMBER} and std {_NUMBER}")


@dataclass(frozen=True, eq=False)
class Encoded:
    """One row, ready to be collated. Its length is `len(encoded)` = L."""

    tokens: np.ndarray  # int32 (L,): ids; 0 where a patch stands
    prompt_length: int  # tokens[prompt_length:] is the supervised answer (empty for generation)
    series: tuple[np.ndarray, ...]  # each float32 (T_i,): T_i = num_patches[i] * patch_size
    scale: np.ndarray  # float32 (n, 2): asinh(mean), log(std + 1e-6) of the raw series
    patch_place: np.ndarray  # int32 (L,): 0 = text, else 1 + index among all patches of the row
    num_patches: tuple[int, ...]
    patch_size: int

    def __len__(self) -> int:
        return self.tokens.size

    @classmethod
    def of_text(cls, tokens: np.ndarray, prompt_length: int) -> "Encoded":
        """A row without series."""
        return cls(tokens, prompt_length, (), np.zeros((0, 2), np.float32), np.zeros(tokens.size, np.int32), (), 1)


class PromptEncoder:
    """Tokenise and normalise rows.

    Layout `standard`: one BOS at the start (when the tokenizer adds one), pre_prompt, then each series'
    text and patches, post_prompt, answer, one EOS. Every text is tokenised on its own. The join rule:
    a text that is not the first gets one leading space, unless it begins with whitespace or what stands
    before it is a text that ends in whitespace. A tokenizer that puts such a space itself
    (`Tokenizer.adds_space`) gets none. Empty texts are left out. The answer and its EOS are supervised.

    Layout `opentslm` reproduces the reference's sequence at batch size 1: BOS before *every* text and
    before the answer, prompts stripped, all series of a row padded to the longest and every patch
    attended. All answer ids are supervised, its leading BOS included.

    `stats_in_text`: each series' text ends in ", it has mean 0.1234 and std 0.5678:" (a final "." of the
    text is kept in place of ":"). False removes such a statement from texts that carry one.

    `patch_size` 0: the model reads no series, and a row that has some is an error.

    `max_length`: longer rows lose the end of their answer, which is said once; a row that would lose all of it is an
    error.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        patch_size: int,
        *,
        layout: Layout = "standard",
        normalize: Normalize = "zscore",
        stats_in_text: bool = True,
        max_length: int | None = None,
        max_patches: int = 1024,
        max_series: int = 0,
    ) -> None:
        self.tokenizer = tokenizer
        self.patch_size = patch_size
        self.layout = layout
        self.normalize = normalize
        self.stats_in_text = stats_in_text
        self.max_length = max_length
        self.max_patches = max_patches
        self.max_series = max_series
        self._has_said_cut = False
        self._ids = lru_cache(maxsize=8192)(tokenizer.encode)  # prompts and answers repeat; callers never mutate

    def check(self, row: Row, *, with_answer: bool = True) -> None:
        """Raise what `encode` would. Tokenises only rows that could be too long: a token is at least one byte."""
        if with_answer:
            self._check_answer(row)
        self._check_num_series(row)
        for index in range(len(row.series)):
            self._check_series(row, index)
        texts = (row.pre_prompt, *row.series_text, row.post_prompt)
        most = sum(len(text.encode()) + MAX_ADDED for text in texts) + sum(self._num_patches(row))
        if self.max_length is not None and most > self.max_length:
            self.encode(row, with_answer=with_answer)

    def encode(self, row: Row, *, with_answer: bool = True, ablate: bool = False) -> Encoded:
        """Encode one row; without its answer for generation.

        `ablate` removes what the series say and keeps the sequence's shape: samples and scale features
        become zero and the statistics leave the text.
        """
        if with_answer:
            self._check_answer(row)
        self._check_num_series(row)
        stats = [self._stats(row, index) for index in range(len(row.series))]
        num_patches = self._num_patches(row)
        if self.layout == "standard":
            prompt, places, answer = self._standard(row, stats, num_patches, with_answer, ablate)
        else:
            prompt, places, answer = self._opentslm(row, stats, num_patches, with_answer, ablate)
        self._check_length(row, len(prompt), with_answer)
        self._say_cut(row, len(prompt) + len(answer))
        tokens = (prompt + answer)[: self.max_length]
        places += [0] * (len(tokens) - len(prompt))
        return Encoded(
            tokens=np.array(tokens, np.int32),
            prompt_length=len(prompt),
            series=tuple(map(self._samples, row.series, stats, num_patches, [ablate] * len(stats))),
            scale=self._scale(stats, ablate),
            patch_place=np.array(places, np.int32),
            num_patches=num_patches,
            patch_size=self.patch_size,
        )

    def _standard(
        self, row: Row, stats: list[SeriesStats], num_patches: tuple[int, ...], with_answer: bool, ablate: bool
    ) -> tuple[list[int], list[int], list[int]]:
        bos = self.tokenizer.bos_id
        tokens = [bos] if self.tokenizer.add_bos and bos is not None else []
        places = [0] * len(tokens)
        space_due = False
        num_seen = 0
        for text, count in zip(self._texts(row, stats, ablate), (0, *num_patches, 0), strict=True):
            if text:
                ids = self._piece(text, space_due)
                tokens += ids
                places += [0] * len(ids)
                space_due = not text[-1].isspace()
            if count:
                tokens += [0] * count
                places += range(num_seen + 1, num_seen + count + 1)
                num_seen += count
                space_due = True
        answer = [*self._piece(row.answer, space_due), self.tokenizer.eos_id] if with_answer else []
        return tokens, places, answer

    def _opentslm(
        self, row: Row, stats: list[SeriesStats], num_patches: tuple[int, ...], with_answer: bool, ablate: bool
    ) -> tuple[list[int], list[int], list[int]]:
        bos = self.tokenizer.bos_id
        start = [bos] if self.tokenizer.add_bos and bos is not None else []
        tokens: list[int] = []
        places: list[int] = []
        num_seen = 0
        pre_prompt, *series_text, post_prompt = self._texts(row, stats, ablate)
        texts = (pre_prompt.strip(), *series_text, post_prompt.strip())
        for text, count in zip(texts, (0, *num_patches, 0), strict=True):
            ids = start + self._ids(text)
            tokens += ids + [0] * count
            places += [0] * len(ids) + list(range(num_seen + 1, num_seen + count + 1))
            num_seen += count
        answer = [*start, *self._ids(row.answer.lstrip()), self.tokenizer.eos_id] if with_answer else []
        return tokens, places, answer

    def _piece(self, text: str, space_due: bool) -> list[int]:
        """Ids of a text by the join rule of the class."""
        joined = " " + text if space_due and not text[0].isspace() else text
        if self.tokenizer.adds_space and joined[0] == " ":
            joined = joined[1:]
        return self._ids(joined)

    def _texts(self, row: Row, stats: list[SeriesStats], ablate: bool) -> list[str]:
        series_text = [self._series_text(*item, ablate) for item in zip(row.series_text, stats, strict=True)]
        return [row.pre_prompt, *series_text, row.post_prompt]

    def _series_text(self, text: str, stats: SeriesStats, ablate: bool) -> str:
        bare = STATS_TEXT.sub("", text)
        if not self.stats_in_text:
            return bare
        if bare != text and not ablate:
            return text  # the row states them itself
        body = bare.rstrip()
        end = body[-1:] if body.endswith((".", ":")) else ":"
        stated = "" if ablate else f", it has mean {stats.mean:.4f} and std {stats.std:.4f}"
        return (body.removesuffix(end) + stated).removeprefix(", ") + end

    def _check_answer(self, row: Row) -> None:
        if not row.answer.strip():
            raise DataError(f"{row.name}: no answer; training and scoring need one (generation does not)")

    def _check_num_series(self, row: Row) -> None:
        if self.patch_size == 0 and row.series:
            raise DataError(
                f"{row.name}: {len(row.series)} series, but a model of family pretrained reads text only; give rows "
                "with an empty list of series, or family timeseries"
            )
        if self.max_series and len(row.series) > self.max_series:
            raise DataError(
                f"{row.name}: {len(row.series)} series, but model.encoder.max_series is {self.max_series}; raise it, "
                "or set 0 to treat all series alike"
            )

    def _stats(self, row: Row, index: int) -> SeriesStats:
        self._check_series(row, index)
        return series_stats(row.series[index])

    def _check_series(self, row: Row, index: int) -> None:
        values = row.series[index]
        check_series(values, f"{row.name}, series {index}")
        limit = self.max_patches * self.patch_size
        if values.size > limit:
            raise DataError(
                f"{row.name}, series {index}: {values.size} samples, but the encoder takes at most {limit} "
                f"(max_patches {self.max_patches} x patch_size {self.patch_size}); shorten or downsample the series, "
                "or raise model.encoder.max_patches"
            )

    def _num_patches(self, row: Row) -> tuple[int, ...]:
        counts = tuple(-(-values.size // self.patch_size) for values in row.series)
        return (max(counts),) * len(counts) if self.layout == "opentslm" and counts else counts

    def _samples(self, values: np.ndarray, stats: SeriesStats, num_patches: int, ablate: bool) -> np.ndarray:
        length = num_patches * self.patch_size
        if ablate:
            return np.zeros(length, np.float32)
        samples = zscore(values, stats) if self.normalize == "zscore" else values.astype(np.float32)
        return pad_to(samples, length)

    def _scale(self, stats: list[SeriesStats], ablate: bool) -> np.ndarray:
        if ablate:
            return np.zeros((len(stats), 2), np.float32)
        return np.array([s.features() for s in stats], np.float32).reshape(-1, 2)

    def _say_cut(self, row: Row, length: int) -> None:
        if self.max_length is not None and length > self.max_length and not self._has_said_cut:
            self._has_said_cut = True
            print(
                f"note: {row.name} has {length} tokens and patches, and max_length is {self.max_length}: the end of "
                "its answer is cut off and not learnt, as that of every longer row (`mlx-training doctor` shows them)",
                file=sys.stderr,
            )

    def _check_length(self, row: Row, prompt_length: int, with_answer: bool) -> None:
        if prompt_length == 0:
            raise DataError(f"{row.name}: the prompt is empty; give a pre_prompt, a series or a post_prompt")
        if self.max_length is not None and prompt_length + with_answer > self.max_length:
            raise DataError(
                f"{row.name}: the prompt has {prompt_length} tokens and patches, so max_length {self.max_length} "
                "leaves no place for the answer; raise dataset.max_length, use a larger patch_size or shorten the row"
            )
