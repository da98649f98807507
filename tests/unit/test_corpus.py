"""Generated pretraining text: reproducible, and in the very layout of the prompts it prepares for."""

import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from mlx_training.data.corpus import ACTIVITY_TOPICS, QUESTION_TOPICS, TOPICS, corpus_documents
from mlx_training.data.prompt import PromptEncoder
from mlx_training.data.questions import ANSWER_CUES, OPTION_INTROS, QUESTION_TYPES, SERIES_INTROS, QuestionDataset
from mlx_training.data.tokenizer import train_bpe
from mlx_training.errors import ConfigError


def one_of(texts: tuple[str, ...]) -> str:
    return "(?:" + "|".join(map(re.escape, texts)) + ")"


WORDINGS = tuple(wording for kind in QUESTION_TYPES for wording in kind.wordings)
PROMPT = re.compile(
    rf"{one_of(WORDINGS)} {one_of(OPTION_INTROS)} (?P<options>[a-z, ]+)\. {one_of(SERIES_INTROS)}, "
    rf"it has mean -?\d+\.\d{{4}} and std \d+\.\d{{4}}: (?P<votes>[\w ]+?) {one_of(ANSWER_CUES)} (?P<answer>\w+)"
)


@pytest.fixture(scope="module")
def documents() -> list[str]:
    return list(corpus_documents(0, "train", 3000))


def test_pure_and_split(documents: list[str]) -> None:
    assert documents[:50] == list(corpus_documents(0, "train", 50))
    assert not set(documents[:50]) & set(corpus_documents(1, "train", 50))
    assert len(set(documents) & set(corpus_documents(0, "test", 3000))) < 0.01 * 3000
    with pytest.raises(ConfigError, match="'dev'"):
        next(corpus_documents(0, "dev", 1))


def test_mixture(documents: list[str]) -> None:
    prompts = [text for text in documents if re.search(rf"{one_of(ANSWER_CUES)} [\w ]+$", text)]
    assert 0.45 < len(prompts) / len(documents) < 0.55
    three = [text for text in prompts if re.search("z-axis|z axis|channel 3", text)]
    assert 0.28 < len(three) / len(prompts) < 0.39
    words = Counter(" ".join(documents).replace(",", " ").replace(".", " ").split())
    for topic in QUESTION_TOPICS + ACTIVITY_TOPICS:
        assert all(words[label.split()[-1]] > 50 for label in topic.labels)
    assert all(words[topic.labels[0].split()[-1]] > 0 for topic in TOPICS)


def test_the_answer_has_most_votes_among_the_options(documents: list[str]) -> None:
    matches = [match for text in documents if (match := PROMPT.fullmatch(text))]
    assert len(matches) > 50
    for match in matches:
        votes = Counter(match["votes"].split())
        options = match["options"].split(", ")
        assert 6 <= votes.total() <= 32
        assert all(votes[match["answer"]] > votes[other] for other in options if other != match["answer"])


def test_prompts_have_the_layout_of_the_encoder(documents: list[str], tmp_path: Path) -> None:
    tokenizer = train_bpe(documents[:300], 300, tmp_path)
    encoder = PromptEncoder(tokenizer, patch_size=4)
    votes = tokenizer.encode(" up down")
    for row in QuestionDataset(0, "train", 20):
        encoded = encoder.encode(row)
        patches = np.flatnonzero(encoded.patch_place)
        before, after = encoded.tokens[: patches[0]].tolist(), encoded.tokens[patches[-1] + 1 :].tolist()
        assert before[0] == tokenizer.bos_id and after[-1] == tokenizer.eos_id
        text = tokenizer.decode(before + votes + after)
        assert PROMPT.fullmatch(text), text
        assert [*tokenizer.encode(text, bos=True), tokenizer.eos_id] == before + votes + after  # same cuts, too
