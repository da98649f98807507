"""Raw rows of OpenTSLM's five training stages, with the prompts its published checkpoints were trained on.

Source: github.com/StanfordBDHG/OpenTSLM, time_series_datasets. Its prompts state each series' mean and
standard deviation; here the prompt encoder adds them (`stats_in_text`), with one definition (n - 1) for
all, where the reference divides by n for sleep and ECG (0.03 % and 0.05 % at their lengths).
"""

import textwrap
from pathlib import Path
from typing import Any

import numpy as np

from mlx_training.data.files import describe, parse_list, read_table, read_text
from mlx_training.data.rows import Row, numbers_from, series_from
from mlx_training.errors import DataError

HAR_LABELS = ("biking", "lying", "running", "sitting", "standing", "walking", "walking_down", "walking_up")
SLEEP_LABELS = ("Wake", "Non-REM stage 1", "Non-REM stage 2", "Non-REM stage 3", "REM sleep", "Movement")
ECG_LEADS = ("I", "II", "III", "aVR", "aVL", "aVF", "V1", "V2", "V3", "V4", "V5", "V6")

# The reference's HAR and sleep prompts are indented by eight spaces, and only their ends are stripped.
HAR_PROMPT = (
    textwrap.indent(
        f"""\
You are given accelerometer data in all three dimensions. Your task is to classify the activity based on analysis of the data.

Instructions:
- Begin by analyzing the time series without assuming a specific label.
- Think step-by-step about what the observed patterns suggest regarding movement intensity and behavior.
- Write your rationale as a single, natural paragraph — do not use bullet points, numbered steps, or section headings.
- Do **not** mention any class label until the final sentence.

Possible activity labels are:
{", ".join(HAR_LABELS)}.
<blank>
- Make sure that your last word is the answer. You MUST end your response with "Answer: "
""",  # noqa: E501
        " " * 8,
    )
    .replace("<blank>", "")
    .strip()
)

SLEEP_PROMPT = textwrap.indent(
    """\
You are given a 30-second EEG time series segment. Your task is to classify the sleep stage based on analysis of the data.

Instructions:
- Analyze the data objectively without presuming a particular label.
- Reason carefully and methodically about what the signal patterns suggest regarding sleep stage.
- Write your reasoning as a single, coherent paragraph. Do not use bullet points, lists, or section headers.
- Only reveal the correct class at the very end.
- Never state that you are uncertain or unable to classify the data. You must always provide a rationale and a final answer.
""",  # noqa: E501
    " " * 8,
).strip()

SLEEP_QUESTION = f"""\
Possible sleep stages are:
        {", ".join(SLEEP_LABELS)}

        - Please now write your rationale. Make sure that your last word is the answer. You MUST end your response with "Answer:"""  # noqa: E501

ECG_PROMPT = """\
You are an expert cardiologist analyzing an ECG (electrocardiogram).{space}

Clinical Context: {context}

Your task is to examine the ECG signal and answer the following medical question:

Question: {question}

Instructions:
- Begin by analyzing the time series without assuming a specific answer.
- Think step-by-step about what the observed patterns suggest regarding the cardiac condition.
- Write your rationale as a single, natural paragraph — do not use bullet points, numbered steps, or section headings.
- Do **not** mention any final answer until the very end.
- Consider the ECG morphology, intervals, and any abnormalities that relate to the question."""

ECG_QUESTION = """\
Based on your analysis of the ECG data, select your answer from the following options:
{answers}

- Make sure that your last word is the answer. You MUST end your response with "Answer: \""""

ECG_OPEN_QUESTION = """\
Based on your analysis of the ECG data, provide your answer.
Make sure that your last word is the answer. You MUST end your response with "Answer: \""""


def tsqa(path: Path) -> list[Row]:
    """Stage 1, TSQA: columns Task, Question, Answer, Series (a list, or its JSON text). `type` is the task."""
    rows = []
    for where, raw in read_table(path):
        task, question, answer = (_text(raw, name, where) for name in ("Task", "Question", "Answer"))
        series = numbers_from(_list(raw, "Series", where), where, "Series")
        text = "This is the time series."
        post_prompt = f"Predict the {task} Answer:"
        rows.append(Row(question.strip(), (series,), (text,), post_prompt, answer, id=_id(raw, where), type=task))
    return rows


def m4(path: Path, *, captions: str | None = None) -> list[Row]:
    """Stage 2, M4 captions: columns id, frequency (optional), series, caption. `type` is the frequency.

    `captions`: a second file, beside this one, with columns id and caption, as the data set is published.
    """
    texts = None
    if captions is not None:
        texts = {_text(raw, "id", where): raw.get("caption") for where, raw in read_table(path.parent / captions)}
    rows = []
    for where, raw in read_table(path):
        series = numbers_from(_list(raw, "series", where), where, "series")
        if texts is not None:
            raw = {**raw, "caption": texts.get(_text(raw, "id", where))}
        rows.append(
            Row(
                pre_prompt="You are an expert in time series analysis.",
                series=(series,),
                series_text=("This is the time series",),
                post_prompt="Please generate a detailed caption for this time-series, "
                "describing it as accurately as possible.",
                answer=_text(raw, "caption", where),
                id=_id(raw, where),
                type=str(raw.get("frequency") or ""),
            )
        )
    return rows


def har_cot(path: Path) -> list[Row]:
    """Stage 3, HAR chain of thought: columns x_axis, y_axis, z_axis, rationale (which ends in "Answer: <label>")."""
    rows = []
    for where, raw in read_table(path):
        names = [f"{axis}_axis" for axis in "xyz"]
        series = tuple(numbers_from(_list(raw, name, where), where, name) for name in names)
        texts = tuple(f"The following is the accelerometer data on the {axis}-axis" for axis in "xyz")
        answer = _text(raw, "rationale", where)
        rows.append(Row(HAR_PROMPT, series, texts, "Rationale:", answer, HAR_LABELS, _id(raw, where)))
    return rows


def sleep_cot(path: Path) -> list[Row]:
    """Stage 4, sleep stages: columns time_series ([[...]], one EEG channel), rationale."""
    rows = []
    for where, raw in read_table(path):
        series = series_from(_list(raw, "time_series", where), where, "time_series")
        if len(series) != 1:
            raise DataError(f"{where}: field 'time_series' must hold one channel, [[...]]; got {len(series)}")
        text = "The following is the EEG time series"
        answer = _text(raw, "rationale", where)
        rows.append(Row(SLEEP_PROMPT, series, (text,), SLEEP_QUESTION, answer, SLEEP_LABELS, _id(raw, where)))
    return rows


def ecg_qa_cot(path: Path, *, records: str | None = None, template_answers: str | None = None) -> list[Row]:
    """Stage 5, ECG-QA: columns question, template_id, question_type, ecg_id, clinical_context, rationale.

    The leads (10 s at 100 Hz) come from a column `series`, a list of leads, or from `records`: PTB-XL's
    folder records500, beside the file. `template_answers`: a CSV of template_id, classes (possible answers),
    beside the file. `group` is the ECG, `type` the question type.
    """
    answers = {} if template_answers is None else _template_answers(path.parent / template_answers)
    rows = []
    for where, raw in read_table(path):
        question, kind = _text(raw, "question", where), _text(raw, "question_type", where)
        context = raw.get("clinical_context") or "12-lead ECG recording."
        ecg = _ecg_id(raw, where)
        if raw.get("series") not in (None, ""):
            series = series_from(_list(raw, "series", where), where, "series")
        elif records is not None:
            series = read_ptbxl(path.parent / records, ecg)
        else:
            raise DataError(f"{where}: no leads: give a column 'series', or the option records (PTB-XL's records500)")
        names = [ECG_LEADS[i] if i < len(ECG_LEADS) else f"Lead_{i}" for i in range(len(series))]
        options = answers.get(_text(raw, "template_id", where), ())
        rows.append(
            Row(
                pre_prompt=ECG_PROMPT.format(space=" ", context=context, question=question),
                series=series,
                series_text=tuple(f"This is ECG Lead {name}" for name in names),
                post_prompt=ECG_QUESTION.format(answers=", ".join(options)) if options else ECG_OPEN_QUESTION,
                answer=_text(raw, "rationale", where),
                options=options,
                id=_id(raw, where),
                group=str(ecg),
                type=kind,
            )
        )
    return rows


def read_ptbxl(records: Path, ecg_id: int) -> tuple[np.ndarray, ...]:
    """Leads of one PTB-XL record in physical units, 500 Hz reduced to 100 Hz by taking every fifth sample.

    Reads WFDB format 16 (interleaved little-endian int16); physical = (sample - baseline) / gain.
    """
    base = records / f"{ecg_id // 1000 * 1000:05d}" / f"{ecg_id:05d}_hr"
    header = read_text(base.with_suffix(".hea")).splitlines()
    try:
        num_leads = int(header[0].split()[1])
        fields = [line.split() for line in header[1 : num_leads + 1]]
        scales = [_gain_and_baseline(field) for field in fields]
        samples = np.fromfile(base.with_suffix(".dat"), "<i2").reshape(-1, num_leads)
        assert all(field[1] == "16" for field in fields)
    except (IndexError, ValueError, OSError, AssertionError) as error:
        raise DataError(f"{base}: not a WFDB record of format 16 (.hea and .dat) ({error})") from error
    step = 5 if len(samples) > 1000 else 1
    where = str(base)
    return tuple(
        numbers_from((samples[::step, lead] - baseline) / gain, where, f"lead {lead}")
        for lead, (gain, baseline) in enumerate(scales)
    )


def _gain_and_baseline(field: list[str]) -> tuple[float, float]:
    """From "1000.0(0)/mV"; without "(baseline)" the ADC zero, the field's fifth part, stands for it."""
    gain, _, baseline = field[2].split("/")[0].rstrip(")").partition("(")
    return float(gain), float(baseline or field[4])


def _template_answers(path: Path) -> dict[str, tuple[str, ...]]:
    answers = {}
    for where, raw in read_table(path):
        answers[_text(raw, "template_id", where)] = tuple(map(str, _list(raw, "classes", where)))
    return answers


def _ecg_id(raw: dict[str, Any], where: str) -> int:
    value = raw.get("ecg_id")
    text = str(value).strip("[] ")
    if not text.isdigit():
        raise DataError(f"{where}: field 'ecg_id' must be one number; got {describe(value)}")
    return int(text)


def _text(raw: dict[str, Any], field: str, where: str) -> str:
    value = raw.get(field)
    if value is None or not str(value).strip():
        raise DataError(f"{where}: missing field {field!r}; the columns are {', '.join(map(str, raw))}")
    return str(value)


def _list(raw: dict[str, Any], field: str, where: str) -> Any:
    _text(raw, field, where)
    return parse_list(raw[field], where, field)


def _id(raw: dict[str, Any], where: str) -> str:
    return str(raw.get("id") or Path(where).name)
