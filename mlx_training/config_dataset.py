"""The `dataset` section of a configuration."""

from typing import Annotated, Literal

from pydantic import Field, Tag

from mlx_training.config_section import (
    Count,
    Fraction,
    Names,
    Positive,
    Rate,
    Section,
    Seed,
    Share,
    Text,
    as_tuple,
    either,
)

Groups = Annotated[tuple[str | int, ...], as_tuple]
Degrees = Annotated[float, Field(ge=0, le=180)]


class SplitFiles(Section):
    """One file per split, beside dataset.path (or in it, where it is a folder)."""

    train: str
    validation: str | None = None
    test: str | None = None


class SplitGroups(Section):
    """Whole groups (subjects, recordings) by name. Without `train`, every group that is not named trains."""

    train: Groups | None = None
    validation: Groups | None = None
    test: Groups | None = None


class SplitFractions(Section):
    """Shares of the rows; what is left of 1 trains."""

    validation: Share | None = None
    test: Share | None = None


class Splits(Section):
    """How rows are divided: by file, then by group, then by fraction; each split is named once."""

    file: SplitFiles | None = None
    """{train: FILE, validation: FILE, test: FILE}."""
    group: SplitGroups | None = None
    """{validation: [names], test: [names]}: no group is in two splits."""
    fraction: SplitFractions | None = None
    """{validation: 0.1, test: 0.1} of what files and groups leave, drawn by `seed`."""
    by_group: bool = False
    """Draw fractions of the groups instead of the rows."""
    seed: Seed = 0
    """Which rows a fraction draws; apart from experiment.seed, so that runs with other seeds share their test."""
    unit: Literal["document", "character"] | None = None
    """text: fractions draw documents, or cut the text in order; null: documents where each split gets some ten."""


class DatasetOptions(Section):
    """What an importer cannot know from the file: names of arrays and columns, and the words of the prompt."""

    question: str | None = None
    """ts, npz, csv: text before the series."""
    post_prompt: str | None = None
    """ts, npz, csv: text after the series; "{options}" in it becomes the list of answers."""
    channel_names: Names | None = None
    """ts, npz, csv: one text per channel, before its series."""
    label_names: dict[str, str] | None = None
    """ts, npz, csv: class label -> answer text."""
    x: str | None = None
    """npz: array of windows, (n, T) or (n, T, C); null: X."""
    y: str | None = None
    """npz: array of labels; null: y."""
    labels: str | None = None
    """npz: array of label names that y indexes; null: labels, where present."""
    group: str | None = None
    """npz: array of groups for splits; null: subject, where present."""
    series_columns: Names | None = None
    """csv: columns that each hold a series as a list; null: [series]."""
    value_columns: Names | None = None
    """csv: [first, last] of a range of columns with one number each, instead of series_columns."""
    answer_column: str | None = None
    """csv: null: label."""
    question_column: str | None = None
    """csv: column of the text before the series."""
    id_column: str | None = None
    """csv: column that names the row."""
    group_column: str | None = None
    """csv: column of groups for splits."""
    type_column: str | None = None
    """csv: column of question types; chance and accuracy are reported per type."""
    answer_with: Literal["text", "letter"] | None = None
    """timeseriesexam: the option's text (null), or its letter."""
    captions: str | None = None
    """m4: file of the captions."""
    records: str | None = None
    """ecg_qa_cot: folder of the PTB-XL records."""
    template_answers: str | None = None
    """ecg_qa_cot: table of the answers that each question template allows."""
    text_column: str | None = None
    """text: field of a .jsonl, .csv or .parquet file; null: text."""
    separator: str | None = None
    """text: what stands between documents in a text file; null: a file is one document."""


class Augment(Section):
    """Random changes of training rows' series, drawn anew each epoch. Evaluation reads rows as they are."""

    rotation_degrees: Annotated[
        Annotated[Degrees, Tag("<number>")] | Annotated[tuple[Degrees, Degrees, Degrees], as_tuple, Tag("<axes>")],
        either("<axes>", "<number>"),
    ] = 0.0
    """Turn three axes: standard deviation of the angle about each of them, or [x, y, z]. Rows of three equal series."""
    roll_fraction: Fraction = 0.0
    """Turn this share of the rows about x by any angle as well. Rows of three equal series."""
    scale: Fraction = 0.0
    """Multiply each series by exp(z), where z has this standard deviation."""
    jitter: Rate = 0.0
    """Add noise of this standard deviation to each sample, in standard deviations of its series."""


class TextSource(Section):
    """One of several sources of text."""

    path: Text
    """As dataset.path."""
    weight: Positive | None = None
    """Share of the training rows that are drawn from it, beside the others' weights; null for all: by size."""
    max_documents: Count | None = None
    """Use no more of its documents than these, the first ones."""
    max_tokens: Count | None = None
    """Use no more training tokens than these, the first ones."""
    text_column: str | None = None
    """As dataset.options.text_column, which holds where this is null."""
    separator: str | None = None
    """As dataset.options.separator, which holds where this is null."""


class Dataset(Section):
    path: str | None = None
    """File or directory (text: also a pattern with *, or hub:owner/name); null for generated formats."""
    sources: Annotated[tuple[TextSource, ...], as_tuple, Field(min_length=1)] | None = None
    """text: several sources in place of path, each divided by itself, mixed by weight."""
    format: Literal[
        "auto", "jsonl", "parquet", "tsqa", "timeseriesexam", "m4", "har_cot", "sleep_cot", "ecg_qa_cot", "ts", "npz",
        "csv", "instruct", "questions", "corpus", "text",
    ] = "auto"  # fmt: skip
    """How the file is read; auto goes by its suffix. questions and corpus are generated."""
    splits: Splits | None = None
    """How rows are divided; null: {fraction: {validation: 0.1, test: 0.1}}. Generated data has its own splits."""
    num_samples_train: Count | None = None
    """Rows (documents) to generate, or the most to use of a file; null: 100000 generated, or the whole file."""
    num_samples_validation: Count | None = None
    """The same for validation; null: 500 generated, or the whole split."""
    num_samples_test: Count | None = None
    """The same for the test; null: 1000 generated, or the whole split."""
    normalize: Literal["zscore", "none"] = "zscore"
    """Each series to mean 0 and standard deviation 1, or left as it is."""
    stats_in_text: bool = True
    """Say each series' mean and standard deviation in its text."""
    augment: Augment | None = None
    """{rotation_degrees: 10, scale: 0.1, jitter: 0.05}: change training series at random; null: as they are."""
    max_length: Count | None = None
    """Most tokens a row may have, patches and answer included; null: what the LM allows."""
    packing: Literal["windows", "documents"] = "windows"
    """text: rows are windows of one stream, or whole documents that do not see each other."""
    cache_dir: str | None = None
    """text: where tokens are kept, mapped into memory; null: from 32 MB of text on, in ~/.cache/mlx-training/tokens."""
    options: DatasetOptions = DatasetOptions()
