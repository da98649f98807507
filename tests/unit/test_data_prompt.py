"""Prompt encoding and series normalisation."""

from pathlib import Path

import numpy as np
import pytest

from mlx_training.data.prompt import Encoded, PromptEncoder
from mlx_training.data.rows import Row
from mlx_training.data.series import series_stats, zscore
from mlx_training.data.tokenizer import Tokenizer
from mlx_training.errors import DataError


def row(*series: object, answer: str = "up", **fields: object) -> Row:
    arrays = tuple(np.array(values, np.float32) for values in series)
    texts = tuple(f"series {i}" for i in range(len(arrays)))
    values = {"pre_prompt": "what is the trend?", "series_text": texts, "post_prompt": "Answer:", "id": "r1"} | fields
    return Row(series=arrays, answer=answer, **values)  # type: ignore[arg-type]


def text_of(encoded: Encoded, tokenizer: Tokenizer, patch: str = "#") -> str:
    """The whole sequence as text: patches as '#', specials by name."""
    names = {tokenizer.bos_id: "<bos>", tokenizer.eos_id: "<eos>"}
    parts, run = [], []
    for token, place in zip(encoded.tokens.tolist(), encoded.patch_place.tolist(), strict=True):
        if place or token in names:
            parts += [tokenizer.decode(run), patch if place else names[token]]
            run = []
        else:
            run.append(token)
    return "".join([*parts, tokenizer.decode(run)])


def test_standard_layout(tiny_tokenizer: Tokenizer) -> None:
    encoded = PromptEncoder(tiny_tokenizer, 4).encode(row([1, 2, 3, 4, 5], [0, 2]))
    assert text_of(encoded, tiny_tokenizer) == (
        "<bos>what is the trend? series 0, it has mean 3.0000 and std 1.5811:##"
        " series 1, it has mean 1.0000 and std 1.4142:# Answer: up<eos>"
    )
    answer = encoded.tokens[encoded.prompt_length :].tolist()
    assert answer == [*tiny_tokenizer.encode(" up"), tiny_tokenizer.eos_id]
    assert encoded.patch_place[encoded.patch_place > 0].tolist() == [1, 2, 3]
    assert encoded.num_patches == (2, 1)
    assert [values.size for values in encoded.series] == [8, 4]


def test_join_rule_respects_whitespace_of_the_texts(tiny_tokenizer: Tokenizer) -> None:
    encoder = PromptEncoder(tiny_tokenizer, 4, stats_in_text=False)
    spaced = row([1], pre_prompt="what?\n", series_text=("s: ",), post_prompt="\nAnswer: ")
    assert text_of(encoder.encode(spaced), tiny_tokenizer) == "<bos>what?\ns: #\nAnswer: up<eos>"
    bare = row([1], pre_prompt="", series_text=("",), post_prompt="")
    assert text_of(encoder.encode(bare), tiny_tokenizer) == "<bos># up<eos>"
    no_series = row()
    assert text_of(encoder.encode(no_series), tiny_tokenizer) == "<bos>what is the trend? Answer: up<eos>"


def test_join_rule_leaves_the_space_to_a_tokenizer_that_adds_one(shared_data: Path) -> None:
    tokenizer = Tokenizer.load(shared_data / "stories260k" / "hf")
    encoded = PromptEncoder(tokenizer, 4).encode(row(pre_prompt="the cat", post_prompt="sat", answer="down"))
    assert encoded.tokens.tolist() == [*tokenizer.encode("the cat sat down", bos=True), tokenizer.eos_id]


def test_generation_prompt_is_the_training_prompt(tiny_tokenizer: Tokenizer) -> None:
    encoder = PromptEncoder(tiny_tokenizer, 4)
    with_answer = encoder.encode(row([1, 2, 3]))
    prompt = encoder.encode(row([1, 2, 3], answer=""), with_answer=False)
    assert len(prompt) == prompt.prompt_length == with_answer.prompt_length
    np.testing.assert_array_equal(prompt.tokens, with_answer.tokens[: len(prompt)])


@pytest.mark.parametrize(
    ("text", "stats", "without", "ablated"),
    [
        ("x-axis", "x-axis, it has mean 2.0000 and std 1.0000:", "x-axis", "x-axis:"),
        ("The series.", "The series, it has mean 2.0000 and std 1.0000.", "The series.", "The series."),
        ("x, it has mean -1.5 and std 2e-05:", "x, it has mean -1.5 and std 2e-05:", "x:", "x:"),
        ("", "it has mean 2.0000 and std 1.0000:", "", ":"),
    ],
)
def test_statistics_in_the_text(tiny_tokenizer: Tokenizer, text: str, stats: str, without: str, ablated: str) -> None:
    def encode(stats_in_text: bool, **how: bool) -> str:
        encoder = PromptEncoder(tiny_tokenizer, 4, stats_in_text=stats_in_text)
        encoded = encoder.encode(row([1, 2, 3], pre_prompt="", series_text=(text,), post_prompt=""), **how)
        return text_of(encoded, tiny_tokenizer).removeprefix("<bos>").removesuffix("# up<eos>")

    assert encode(True) == stats
    assert encode(False) == without
    assert encode(True, ablate=True) == ablated


def test_ablation_says_nothing_about_the_series(tiny_tokenizer: Tokenizer) -> None:
    for layout in ("standard", "opentslm"):
        encoder = PromptEncoder(tiny_tokenizer, 4, layout=layout)  # type: ignore[arg-type]
        a, b = (encoder.encode(row(values), ablate=True) for values in ([1, 2, 3, 4, 9], [-5, 8, 100, 1e-3, 0]))
        np.testing.assert_array_equal(a.tokens, b.tokens)
        assert not a.series[0].any() and a.series[0].size == 8
        assert not a.scale.any() and a.scale.shape == (1, 2)


def test_opentslm_layout_puts_bos_before_every_text_and_pads_to_the_longest(tiny_tokenizer: Tokenizer) -> None:
    encoder = PromptEncoder(tiny_tokenizer, 4, layout="opentslm")
    spaced = row([1, 2, 3, 4, 5], [0, 2], pre_prompt="  what?\n", post_prompt=" Answer: ", answer=" yes ")
    encoded = encoder.encode(spaced)
    assert text_of(encoded, tiny_tokenizer) == (
        "<bos>what?<bos>series 0, it has mean 3.0000 and std 1.5811:##"
        "<bos>series 1, it has mean 1.0000 and std 1.4142:##<bos>Answer:<bos>yes <eos>"
    )
    assert encoded.num_patches == (2, 2)
    assert encoded.tokens[encoded.prompt_length] == tiny_tokenizer.bos_id  # the answer's own BOS is supervised
    no_pre_prompt = encoder.encode(row(pre_prompt=""))
    assert no_pre_prompt.tokens[:2].tolist() == [tiny_tokenizer.bos_id] * 2


def test_normalisation_matches_sample_statistics() -> None:
    values = np.random.default_rng(0).normal(1e5, 0.3, 500).astype(np.float32)
    stats = series_stats(values)
    exact = values.astype(np.float64)
    assert stats.mean == pytest.approx(exact.mean(), rel=1e-12)
    assert stats.std == pytest.approx(exact.std(ddof=1), rel=1e-9)
    normalised = zscore(values, stats).astype(np.float64)
    assert abs(normalised.mean()) < 1e-5
    assert normalised.std(ddof=1) == pytest.approx(1, rel=1e-5)


def test_scale_features(tiny_tokenizer: Tokenizer) -> None:
    encoded = PromptEncoder(tiny_tokenizer, 4).encode(row([10, 20, 30], [0.1] * 7))
    np.testing.assert_allclose(encoded.scale[0], [np.arcsinh(20), np.log(10 + 1e-6)], rtol=1e-6)
    np.testing.assert_allclose(encoded.scale[1], [np.arcsinh(0.1), np.log(1e-6)], rtol=1e-6)


@pytest.mark.parametrize("value", [0.0, 0.1, -1e7, 3e38])
@pytest.mark.parametrize("length", [1, 3, 1000])
def test_a_constant_series_becomes_zeros(value: float, length: int) -> None:
    values = np.full(length, value, np.float32)
    assert not zscore(values, series_stats(values)).any()


def test_raw_values_without_normalisation(tiny_tokenizer: Tokenizer) -> None:
    encoded = PromptEncoder(tiny_tokenizer, 2, normalize="none").encode(row([5, 7, 9]))
    assert encoded.series[0].tolist() == [5, 7, 9, 0]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (row([1], answer="  "), "row 'r1': no answer"),
        (row([1], [2, np.inf]), "row 'r1', series 1: inf at position 1"),
        (row([]), "row 'r1', series 0: the series is empty"),
        (row([[1, 2]]), "one dimension"),
        (row(range(13)), r"13 samples, but the encoder takes at most 12 \(max_patches 3 x patch_size 4\)"),
        (row([1], [2], [3]), "row 'r1': 3 series, but model.encoder.max_series is 2"),
        (row([1], pre_prompt="up " * 40), r"prompt has \d+ tokens and patches, so max_length 60"),
        (row([1], id="", pre_prompt="Which?", answer=""), "row without id .it begins 'Which[?]'"),
    ],
)
def test_bad_rows_are_named(tiny_tokenizer: Tokenizer, bad: Row, message: str) -> None:
    with pytest.raises(DataError, match=message):
        PromptEncoder(tiny_tokenizer, 4, max_length=60, max_patches=3, max_series=2).encode(bad)


def test_long_answers_lose_their_end_and_only_that(
    tiny_tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    full = PromptEncoder(tiny_tokenizer, 4).encode(row([1, 2], answer="down " * 20))
    limit = full.prompt_length + 1
    assert "cut off" not in capsys.readouterr().err
    encoder = PromptEncoder(tiny_tokenizer, 4, max_length=limit)
    cut = encoder.encode(row([1, 2], answer="down " * 20))
    encoder.encode(row([1, 2], answer="up " * 20))
    said = capsys.readouterr().err
    assert (
        said.count("cut off") == 1 and f"has {full.tokens.size} tokens and patches, and max_length is {limit}" in said
    )
    np.testing.assert_array_equal(cut.tokens, full.tokens[:limit])
    assert cut.patch_place.size == limit
    with pytest.raises(DataError, match=f"max_length {limit - 1} leaves no place for the answer"):
        PromptEncoder(tiny_tokenizer, 4, max_length=limit - 1).encode(row([1, 2]))
