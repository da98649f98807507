"""Batches in a seekable order: batch i is a pure function of (seed, i), so nothing is stored to resume."""

import queue
import threading
from bisect import bisect_left
from collections.abc import Callable, Generator, Iterator, Sequence, Sized
from dataclasses import replace
from typing import Generic, Literal, Protocol, TypeVar

import numpy as np

from mlx_training.data.batch import Batch
from mlx_training.errors import DataError

RowT = TypeVar("RowT")
ItemT = TypeVar("ItemT", bound=Sized)
ItemT_contra = TypeVar("ItemT_contra", bound=Sized, contravariant=True)
BatchBy = Literal["rows", "tokens"]
Transform = Callable[[RowT, np.random.Generator], RowT]

MIN_WINDOW_BATCHES, MIN_WINDOW_ROWS = 32, 512


class Collate(Protocol[ItemT_contra]):
    """Encoded rows and their indices in the dataset -> Batch."""

    def __call__(self, encoded: Sequence[ItemT_contra], rows: Sequence[int], /) -> Batch: ...


class Batches(Generic[RowT, ItemT]):
    """Training batches by global index, over epochs.

    An epoch is a permutation of the rows, cut into windows of `window` batches (None: 32, or those of 512 rows if
    that is more). Within a window rows are sorted by length and `cut` into batches of `batch_size` rows, or of about
    equal tokens (`batch_by`), with little padding either way, and the batches are shuffled. Every row comes once an
    epoch.

    Of processes that train together each takes its `share` of every batch: rank r of n its rows r, r + n, ... One that
    is left without a row takes one that counts nothing.

    `cache` keeps encoded rows (finite data that epochs repeat); switch it off for generated data.

    `transform` changes a row each time it is drawn, by (seed, epoch, row); nothing is kept then.
    """

    def __init__(
        self,
        dataset: Sequence[RowT],
        encode: Callable[[RowT], ItemT],
        batch_size: int,
        seed: int,
        collate: Collate[ItemT],
        *,
        batch_by: BatchBy = "rows",
        window: int | None = None,
        cache: bool = True,
        transform: Transform[RowT] | None = None,
    ) -> None:
        if batch_size > len(dataset):
            raise DataError(
                f"training.batch_size {batch_size} is larger than the training data ({len(dataset)} rows); "
                "use a smaller batch or more rows"
            )
        self.dataset = dataset
        self.encode = encode
        self.batch_size = batch_size
        self.seed = seed
        self.collate = collate
        self.batch_by = batch_by
        self.window = window or max(MIN_WINDOW_BATCHES, -(-MIN_WINDOW_ROWS // batch_size))
        self.share = 0, 1  # rank and number of processes
        self.transform = transform
        self._cache: dict[int, ItemT] | None = {} if cache and transform is None else None
        self._window: tuple[tuple[int, int], list[list[tuple[int, ItemT]]]] | None = None
        self._order: tuple[int, np.ndarray] | None = None  # of the epoch that was asked for last
        self._lock = threading.Lock()

    @property
    def num_batches(self) -> int:
        """Batches per epoch."""
        return -(-len(self.dataset) // self.batch_size)

    def batch(self, index: int) -> Batch:
        """The batch of global micro-batch index `index` >= 0; epoch = index // num_batches."""
        epoch, within = divmod(index, self.num_batches)
        window, place = divmod(within, self.window)
        with self._lock:
            if self._window is None or self._window[0] != (epoch, window):
                self._window = (epoch, window), self._build_window(epoch, window)
            chosen = self._window[1][place]
        rank, size = self.share
        part = chosen[rank::size] or chosen[:1]
        batch = self.collate([item for _, item in part], [row for row, _ in part])
        return batch if rank < len(chosen) else replace(batch, mask=np.zeros_like(batch.mask))

    def order(self, epoch: int) -> np.ndarray:
        """The rows of an epoch, shuffled: a pure function of the seed and the epoch."""
        return np.random.default_rng([self.seed, epoch, 0]).permutation(len(self.dataset))

    def item(self, row: int, epoch: int) -> ItemT:
        """A row, encoded, as an epoch draws it."""
        if self.transform is None:
            return self._encoded(row)
        return self.encode(self.transform(self.dataset[row], np.random.default_rng([self.seed, epoch, 4, row])))

    def _build_window(self, epoch: int, window: int) -> list[list[tuple[int, ItemT]]]:
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, self.order(epoch)
        size = self.window * self.batch_size
        chosen = self._order[1][window * size : (window + 1) * size]
        items = [(row, self.item(row, epoch)) for row in chosen.tolist()]
        items.sort(key=lambda pair: len(pair[1]))
        batches = [items[run] for run in cut([len(item) for _, item in items], self.batch_size, self.batch_by)]
        shuffled = np.random.default_rng([self.seed, epoch, 1 + window]).permutation(len(batches))
        return [batches[i] for i in shuffled]

    def _encoded(self, row: int) -> ItemT:
        if self._cache is None:
            return self.encode(self.dataset[row])
        if row not in self._cache:
            self._cache[row] = self.encode(self.dataset[row])
        return self._cache[row]

    def prefetch(self, start: int, stop: int | None = None, *, depth: int = 2) -> Generator[Batch, None, None]:
        """Batches start, start + 1, ... (before `stop`), prepared `depth` ahead by a background thread.

        The thread ends when the generator is closed or exhausted; its exceptions are raised here.
        """
        ready: queue.Queue[Batch | BaseException | None] = queue.Queue(maxsize=depth)
        closed = threading.Event()

        def put(value: Batch | BaseException | None) -> None:
            while not closed.is_set():
                try:
                    return ready.put(value, timeout=0.1)
                except queue.Full:
                    continue

        def work() -> None:
            index = start
            try:
                while not closed.is_set() and (stop is None or index < stop):
                    put(self.batch(index))
                    index += 1
                put(None)
            except BaseException as error:  # noqa: BLE001  # whatever it is (a panic of Rust, too), the consumer raises it
                put(error)

        thread = threading.Thread(target=work, name="batches", daemon=True)
        thread.start()
        try:
            while (value := ready.get()) is not None:
                if isinstance(value, BaseException):
                    raise value
                yield value
        finally:
            closed.set()
            thread.join(timeout=10)


def cut(lengths: Sequence[int], batch_size: int, batch_by: BatchBy) -> list[slice]:
    """Rows sorted by length as ceil(rows / batch_size) runs, none empty.

    rows: `batch_size` rows each, but for the last. tokens: as many rows as fit under a bound on rows times the longest
    row, the lowest bound that makes no more runs than that, filled from the longest row down.
    """
    if batch_by == "rows":
        return [slice(i, i + batch_size) for i in range(0, len(lengths), batch_size)]
    num_runs = -(-len(lengths) // batch_size)

    def under(bound: int) -> list[slice]:
        runs: list[slice] = []
        stop = len(lengths)
        while stop:
            fitting = max(bound // max(lengths[stop - 1], 1), 1)
            others = max(num_runs - len(runs) - 1, 0)  # runs that need a row each
            start = min(max(stop - fitting, others), stop - 1)
            runs.append(slice(start, stop))
            stop = start
        return runs[::-1]

    bounds = range(1, max(lengths[-1], 1) * len(lengths) + 1)
    return under(bounds[bisect_left(bounds, True, key=lambda bound: len(under(bound)) <= num_runs)])


def eval_batches(
    dataset: Sequence[RowT], encode: Callable[[RowT], ItemT], batch_size: int, collate: Collate[ItemT]
) -> Iterator[Batch]:
    """Every row once, in batches of similar length; `Batch.rows` says which rows a batch holds."""
    encoded = [encode(row) for row in dataset]
    order = sorted(range(len(encoded)), key=lambda row: len(encoded[row]))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        yield collate([encoded[row] for row in rows], rows)
