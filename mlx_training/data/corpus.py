"""Generated text for pretraining the small language model that the quick test freezes.

Half of the documents describe series in plain sentences. The other half are prompts in which noisy
one-word votes stand where the patches of a series will stand; the answer is the option with most votes.
A model trained on this text gives answers that *depend on what stands in the place of the series*, which is
all that an encoder in front of it needs. Label sets of many domains, and made-up words, keep it from
learning a fixed list of answers.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mlx_training.data.questions import ANSWER_CUES, QUESTION_TYPES, SERIES_INTROS, SPLITS, options_text
from mlx_training.errors import ConfigError

PROMPT_FRACTION = 0.5  # of the documents; the others are sentences
MIN_VOTES, MAX_VOTES = 6, 32


@dataclass(frozen=True)
class Topic:
    """A set of labels, the questions that ask for one of them, and sentences' words for each label."""

    subject: str
    labels: tuple[str, ...]
    questions: tuple[str, ...]
    meanings: tuple[str, ...] = ()  # aligned with labels: what the series does then


_MEANINGS = {
    "rising": "goes up, climbs and increases over time",
    "falling": "goes down, drops and decreases over time",
    "flat": "stays where it is, without a slope",
    "short": "repeats often, after a few samples",
    "medium": "repeats now and then, after some samples",
    "long": "repeats seldom, after many samples",
    "beginning": "has an unusual value early, in the first part",
    "middle": "has an unusual value halfway, near the centre",
    "end": "has an unusual value late, in the last part",
    "nowhere": "has no unusual value and no outlier at all",
    "up": "jumps to a higher level and stays there",
    "down": "jumps to a lower level and stays there",
    "none": "keeps its level without any jump",
    "growing": "is calm first and noisy later",
    "shrinking": "is noisy first and calm later",
    "steady": "has the same noise from start to finish",
}
_SUBJECTS = {
    "trend": "trend",
    "period": "period",
    "anomaly": "place of the anomaly",
    "shift": "level shift",
    "variance": "variance",
}
_GENERIC = (
    "What is shown?",
    "Which class does this recording belong to?",
    "Which label fits the data?",
    "What do the measurements show?",
)
_ACTIVITY = (
    "What is the person doing?",
    "Which activity is recorded?",
    "Which activity do the sensors show?",
    "What is the activity of the person?",
)


def _topic(subject: str, labels: str, questions: tuple[str, ...] = ()) -> Topic:
    return Topic(subject, tuple(labels.split(", ")), questions + _GENERIC)


QUESTION_TOPICS = tuple(
    Topic(_SUBJECTS[kind.name], kind.options, kind.wordings, tuple(_MEANINGS[option] for option in kind.options))
    for kind in QUESTION_TYPES
)
ACTIVITY_TOPICS = (
    _topic("activity", "walking, walking upstairs, walking downstairs, sitting, standing, laying", _ACTIVITY),
    _topic("activity", "walking, running, jogging, cycling, sitting, standing, lying, climbing", _ACTIVITY),
    _topic("activity", "standing, walking, running, badminton, tennis, rowing", _ACTIVITY),
)
OTHER_TOPICS = (
    _topic("number", "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12"),
    _topic("letter", "A, B, C, D, E, F, G, H"),
    _topic("answer", "yes, no"),
    _topic("verdict", "true, false, unknown"),
    _topic("state", "normal, abnormal, noisy, missing"),
    _topic("sleep stage", "wake, light, deep, rem"),
    _topic("machine", "idle, running, broken, starting, stopping"),
    _topic("weather", "sunny, rainy, cloudy, windy, snow, fog"),
    _topic("speaker", "one, two, three, four, five, six, seven, eight, nine"),
    _topic("gesture", "left, right, push, pull, circle, wave, point"),
    _topic("direction", "north, south, east, west"),
    _topic("size", "low, high, small, large, huge, tiny"),
    _topic("shape", "linear, square, round, sharp, smooth, jagged"),
    _topic("rhythm", "daily, weekly, monthly, yearly, random"),
    _topic("process", "constant, periodic, random, seasonal, chaotic"),
    _topic("colour", "red, green, blue, white, black, grey"),
    _topic("animal", "cat, dog, bird, horse, fish, bee"),
    _topic("device", "pump, fan, motor, valve, heater, lamp"),
    _topic("heart", "slow, fast, regular, irregular"),
)
TOPICS = QUESTION_TOPICS + ACTIVITY_TOPICS + OTHER_TOPICS
_TOPIC_WEIGHTS = np.array(
    [0.40 / len(QUESTION_TOPICS)] * len(QUESTION_TOPICS)
    + [0.20 / len(ACTIVITY_TOPICS)] * len(ACTIVITY_TOPICS)
    + [0.40 / len(OTHER_TOPICS)] * len(OTHER_TOPICS)
)
_MADE_UP_FRACTION = 0.1
_WORDS = tuple(sorted({label.split()[-1] for topic in TOPICS for label in topic.labels}))

_FILLER = (
    "Sensors write down one value after another.",
    "Every value has a time and a size.",
    "Some noise is part of every measurement.",
    "A series is a list of numbers in order.",
    "The mean and the standard deviation describe the scale.",
    "Look at the whole series before you answer.",
    "The three axes are measured at the same time.",
    "A single value says little.",
)
AXIS_INTROS = (
    ("x-axis", "y-axis", "z-axis"),
    ("The x axis", "The y axis", "The z axis"),
    ("This is channel 1 of 3", "This is channel 2 of 3", "This is channel 3 of 3"),
)
_THINGS = ("series", "signal", "curve", "recording", "measurement", "sequence")


def _pick(rng: np.random.Generator, values: Sequence[str]) -> str:
    return values[int(rng.integers(len(values)))]


def _made_up_word(rng: np.random.Generator) -> str:
    consonants, vowels = "bdfgklmnprstvz", "aeiou"
    return "".join(_pick(rng, consonants) + _pick(rng, vowels) for _ in range(rng.integers(2, 4)))


def _some_topic(rng: np.random.Generator) -> Topic:
    if rng.random() < _MADE_UP_FRACTION:
        return Topic("label", tuple(_made_up_word(rng) for _ in range(rng.integers(2, 7))), _GENERIC)
    return TOPICS[rng.choice(len(TOPICS), p=_TOPIC_WEIGHTS)]


def _sentence(rng: np.random.Generator) -> str:
    topic = _some_topic(rng)
    k = int(rng.integers(len(topic.labels)))
    label, thing, subject = topic.labels[k], _pick(rng, _THINGS), topic.subject
    if topic.meanings and rng.random() < 0.7:
        meaning = topic.meanings[k]
        forms: Sequence[str] = (
            f"The {thing} {meaning}, so the {subject} is {label}.",
            f"If the {subject} is {label}, the {thing} {meaning}.",
            f"A {thing} whose {subject} is {label} {meaning}.",
            f"This {thing} {meaning}: {label}.",
        )
    else:
        other = topic.labels[int(rng.integers(len(topic.labels)))]
        forms = (
            f"The {subject} of this {thing} is {label}.",
            f"Here the {subject} is {label}.",
            f"The {thing} shows the {subject} {label}.",
            f"Possible answers for the {subject} are {', '.join(topic.labels)}.",
            f"First the {subject} was {other}, then it was {label}.",
        )
    return _pick(rng, forms)


def _sentences(rng: np.random.Generator) -> str:
    parts = [_pick(rng, _FILLER) if rng.random() < 0.2 else _sentence(rng) for _ in range(rng.integers(2, 7))]
    return " ".join(parts)


def _vote_words(labels: Sequence[str]) -> list[str]:
    """What votes for each label: its last word, or all of it where last words coincide."""
    last = [label.split()[-1] for label in labels]
    return last if len(set(last)) == len(last) else list(labels)


def _votes(rng: np.random.Generator, winner: str, losers: Sequence[str], num_votes: int) -> list[str]:
    """`num_votes` words: `winner` clearly more often than any of `losers`, mixed with unrelated words."""
    wins = max(2, round(rng.uniform(0.35, 1.0) * num_votes))
    limit = 0.75 * wins
    votes = [winner] * wins
    counts = dict.fromkeys(losers, 0)
    noise = rng.random()
    while len(votes) < num_votes:
        word = _pick(rng, losers) if losers and rng.random() < noise else _pick(rng, _WORDS)
        if word == winner or counts.get(word, 0) + 1 > limit:
            word = winner
        counts[word] = counts.get(word, 0) + 1
        votes.append(word)
    return [votes[i] for i in rng.permutation(num_votes)]


def _statistics(rng: np.random.Generator) -> str:
    std = 10.0 ** rng.uniform(-2.0, 3.0)
    return f", it has mean {std * rng.uniform(-5.0, 5.0):.4f} and std {std:.4f}"


def _prompt(rng: np.random.Generator) -> str:
    """A question, votes in the place of each series, and the answer: the layout of `data/prompt.py`."""
    topic = _some_topic(rng)
    labels = [topic.labels[i] for i in rng.permutation(len(topic.labels)).tolist()]
    labels = labels[: max(2, int(rng.integers(len(labels) // 2, len(labels) + 1)))]
    answer = int(rng.integers(len(labels)))
    words = _vote_words(labels)
    winner, losers = words[answer], words[:answer] + words[answer + 1 :]

    if rng.random() < 1 / 3:
        intros: Sequence[str] = AXIS_INTROS[rng.integers(len(AXIS_INTROS))]
    else:
        intros = (_pick(rng, SERIES_INTROS),)
    with_statistics = rng.random() < 0.8
    end = ":" if with_statistics or rng.random() < 0.5 else ""
    num_votes = int(rng.integers(MIN_VOTES, MAX_VOTES + 1))
    parts = []
    for intro in intros:
        parts.append(intro + (_statistics(rng) if with_statistics else "") + end)
        parts += _votes(rng, winner, losers, num_votes)
    question, options = _pick(rng, topic.questions), options_text(rng, labels)
    place = rng.random()
    if place < 0.6:  # as in data/questions.py
        parts = [question, options, *parts]
    elif place < 0.8:  # as in data/importers.py
        parts = [question, *parts, options]
    else:
        parts = [*parts, question, options]
    return " ".join([*parts, _pick(rng, ANSWER_CUES), labels[answer]])


def corpus_documents(seed: int, split: str, num_documents: int) -> Iterator[str]:
    """`num_documents` texts, a pure function of the arguments; splits are independent streams of one seed."""
    if split not in SPLITS:
        raise ConfigError(f"split {split!r} of the generated corpus: expected one of {', '.join(SPLITS)}")
    for index in range(num_documents):
        rng = np.random.default_rng((seed, SPLITS.index(split), 2, index))
        yield _prompt(rng) if rng.random() < PROMPT_FRACTION else _sentences(rng)
