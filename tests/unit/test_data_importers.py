"""Importers: every format's happy path and its errors."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from mlx_training.data.importers import FORMATS, load_rows
from mlx_training.data.rows import Row
from mlx_training.errors import ConfigError, DataError


def write_table(path: Path, *rows: dict) -> Path:
    """JSONL, CSV (lists as JSON text) or parquet, by suffix."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows({k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()} for row in rows)
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(list(rows)), path)
    return path


def values(row: Row) -> list[list[float]]:
    return [series.tolist() for series in row.series]


RAW = {
    "tsqa": {"Task": "Anomaly", "Question": " Is it odd? ", "Answer": "Yes", "Series": [1.0, 2.0]},
    "m4": {"id": "M1", "frequency": "Monthly", "series": [1.0, 2.0], "caption": "rises"},
    "har_cot": {
        "x_axis": [1.0, 2.0],
        "y_axis": [3.0, 4.0],
        "z_axis": [5.0, 6.0],
        "label": "lying",
        "rationale": "Still. Answer: lying",
    },
    "sleep_cot": {"time_series": [[1.0, 2.0]], "label": "Wake", "rationale": "Alpha. Answer: Wake"},
    "ecg_qa_cot": {
        "question": "Normal {ECG}?",
        "answer": "yes",
        "template_id": 3,
        "question_type": "single-verify",
        "ecg_id": "[12]",
        "clinical_context": "40 years",
        "rationale": "Regular. Answer: yes",
        "series": [[1.0, 2.0], [3.0, 4.0]],
    },
}


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("format", RAW)
def test_raw_rows_of_the_five_stages(tmp_path: Path, format: str, suffix: str) -> None:
    path = write_table(tmp_path / f"raw.{suffix}", RAW[format], RAW[format])
    rows = load_rows(path, format)
    assert len(rows) == 2
    row = rows[0]
    expected = {
        "tsqa": ([[1, 2]], ["This is the time series."], "Yes", "Anomaly"),
        "m4": ([[1, 2]], ["This is the time series"], "rises", "Monthly"),
        "har_cot": (
            [[1, 2], [3, 4], [5, 6]],
            [f"The following is the accelerometer data on the {axis}-axis" for axis in "xyz"],
            "Still. Answer: lying",
            "",
        ),
        "sleep_cot": ([[1, 2]], ["The following is the EEG time series"], "Alpha. Answer: Wake", ""),
        "ecg_qa_cot": (
            [[1, 2], [3, 4]],
            ["This is ECG Lead I", "This is ECG Lead II"],
            "Regular. Answer: yes",
            "single-verify",
        ),
    }[format]
    assert (values(row), list(row.series_text), row.answer, row.type) == expected
    assert row.pre_prompt == row.pre_prompt.strip() and row.post_prompt == row.post_prompt.strip()


def test_prompts_of_the_five_stages(tmp_path: Path) -> None:
    def prompts(format: str) -> tuple[str, str]:
        row = load_rows(write_table(tmp_path / "raw.jsonl", RAW[format]), format)[0]
        return row.pre_prompt, row.post_prompt

    assert prompts("tsqa") == ("Is it odd?", "Predict the Anomaly Answer:")
    assert prompts("har_cot")[1] == "Rationale:"
    assert "\n        biking, lying, running," in prompts("har_cot")[0]  # the reference's indentation
    assert prompts("sleep_cot")[1].endswith('You MUST end your response with "Answer:')
    ecg = prompts("ecg_qa_cot")
    assert "Context: 40 years\n" in ecg[0] and "Question: Normal {ECG}?\n" in ecg[0]
    assert ecg[1].startswith("Based on your analysis of the ECG data, provide your answer.\n")


def test_m4_captions_in_a_second_file(tmp_path: Path) -> None:
    path = write_table(tmp_path / "series.csv", {"id": "b", "series": [1, 2]}, {"id": "a", "series": [3]})
    write_table(tmp_path / "captions.csv", {"id": "a", "caption": "falls"}, {"id": "b", "caption": "rises"})
    rows = load_rows(path, "m4", captions="captions.csv")
    assert [(row.id, row.answer) for row in rows] == [("b", "rises"), ("a", "falls")]
    write_table(tmp_path / "captions.csv", {"id": "a", "caption": "falls"})
    with pytest.raises(DataError, match="series.csv:2: missing field 'caption'"):
        load_rows(path, "m4", captions="captions.csv")


def test_repeated_header_lines_of_a_csv_are_skipped(tmp_path: Path) -> None:
    path = write_table(tmp_path / "har.csv", RAW["har_cot"])
    path.write_text(path.read_text() * 2)
    assert len(load_rows(path, "har_cot")) == 2


def test_ecg_options_and_ptbxl_records(tmp_path: Path) -> None:
    signal = np.arange(2000, dtype="<i2").reshape(-1, 2) - 500  # 1000 samples of 2 leads
    folder = tmp_path / "records500" / "00000"
    folder.mkdir(parents=True)
    np.repeat(signal, 5, axis=0).tofile(folder / "00012_hr.dat")
    (folder / "00012_hr.hea").write_text(
        "00012_hr 2 500 5000\n00012_hr.dat 16 1000.0(0)/mV 16 0 -500 1 0 I\n00012_hr.dat 16 200/mV 16 100 -499 1 0 II\n"
    )
    raw = {name: value for name, value in RAW["ecg_qa_cot"].items() if name != "series"}
    path = write_table(tmp_path / "ecg.jsonl", raw)
    write_table(tmp_path / "answers.csv", {"template_id": 3, "classes": "['yes', 'no']"})
    row = load_rows(path, "ecg_qa_cot", records="records500", template_answers="answers.csv")[0]
    np.testing.assert_allclose(row.series[0], signal[:, 0] / 1000, rtol=1e-6)
    np.testing.assert_allclose(row.series[1], (signal[:, 1] - 100.0) / 200, rtol=1e-6)
    assert row.options == ("yes", "no") and "options:\nyes, no\n" in row.post_prompt
    assert row.group == "12"
    with pytest.raises(DataError, match="no leads: give a column 'series', or the option records"):
        load_rows(path, "ecg_qa_cot")
    (folder / "00012_hr.hea").write_text("00012_hr 3 500 5000\n")
    with pytest.raises(DataError, match="not a WFDB record of format 16"):
        load_rows(path, "ecg_qa_cot", records="records500")


@pytest.mark.parametrize(
    ("format", "change", "message"),
    [
        ("tsqa", {"Series": "[1, 2"}, "raw.jsonl:1: field 'Series' is not a list"),
        ("tsqa", {"Series": None}, "raw.jsonl:1: missing field 'Series'"),
        ("tsqa", {"Series": "[1, NaN]"}, "field 'Series': nan at position 1"),
        ("har_cot", {"rationale": " "}, "missing field 'rationale'"),
        ("sleep_cot", {"time_series": [[1], [2]]}, "must hold one channel"),
        ("sleep_cot", {"time_series": [1, 2]}, r"field 'time_series\[0\]' must be a list of numbers"),
        ("ecg_qa_cot", {"ecg_id": "[1, 2]"}, "'ecg_id' must be one number"),
    ],
)
def test_raw_row_errors(tmp_path: Path, format: str, change: dict, message: str) -> None:
    path = write_table(tmp_path / "raw.jsonl", {**RAW[format], **change})
    with pytest.raises(DataError, match=message):
        load_rows(path, format)


EXAM = {"question": "Which?", "options": "['a', 2.5]", "answer": 2.5, "ts": [1, 2], "category": "c", "id": 4}


def test_timeseriesexam(tmp_path: Path) -> None:
    pair = {**EXAM, "options": ["a", "b"], "answer": "a", "ts1": [1, 2], "ts2": [3]}
    del pair["ts"]
    path = tmp_path / "exam.json"
    path.write_text(json.dumps([EXAM, pair]))
    one, two = load_rows(path, "timeseriesexam")
    assert (one.options, one.answer, one.type, one.id) == (("a", "2.5"), "2.5", "c", "4")
    assert one.post_prompt == "Options: a; 2.5. Answer:"
    assert values(two) == [[1, 2], [3]]
    by_letter, _ = load_rows(path, "timeseriesexam", answer_with="letter")
    assert (by_letter.options, by_letter.answer) == (("A", "B"), "B")
    assert by_letter.post_prompt == "Options: A) a; B) 2.5. Answer:"
    for change, message in (
        ({"options": "['a', "}, "question 1: field 'options' is not a list"),
        ({"options": "7"}, "'options' must be a list of answers"),
        ({"answer": "c"}, "the answer 'c' is none of the options"),
        ({"ts": None}, "missing field 'ts'"),
        ({"ts": []}, "the series is empty"),
    ):
        path.write_text(json.dumps([{**EXAM, **change}]))
        with pytest.raises(DataError, match=message):
            load_rows(path, "timeseriesexam")


TS = "#c\n@problemName X\n@univariate false\n@dimensions 2\n@classLabel true 1 2\n@data\n"


def test_ts(tmp_path: Path) -> None:
    path = tmp_path / "x.ts"
    path.write_text(TS + "1,2,3:4,5:2\n6:7:1\n")
    rows = load_rows(path, label_names={1: "one", "2": "two"}, channel_names=["left", "right"], question="Who?")
    assert values(rows[0]) == [[1, 2, 3], [4, 5]] and values(rows[1]) == [[6], [7]]
    assert [row.answer for row in rows] == ["two", "one"]
    assert rows[0].options == ("one", "two") and rows[0].post_prompt == "Options: one, two. Answer:"
    assert rows[0].series_text == ("left", "right") and rows[0].pre_prompt == "Who?"
    assert rows[0].id == "x.ts:7"
    path.write_text(TS + "1:2:2\n")
    assert load_rows(path)[0].options == ("1", "2")  # all labels of the header, so that files agree


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (TS + "1,?,3:4:1\n", r"x.ts:7: channel 0 has a missing sample \('\?'\) at position 1"),
        (TS + "1,2:4,NaN:1\n", "x.ts:7: field 'channel 1': nan at position 1"),
        (TS + "1,2:1\n", "x.ts:7: 1 channels before the label; expected 2"),
        (TS + "1,x:2:1\n", "x.ts:7: channel 0: not a number"),
        (TS + "1:2:3\n", "x.ts:7: class label '3' is not in the header's 1, 2"),
        (TS, "x.ts: no rows"),
        ("1,2:3\n", "x.ts:1: expected '@name value'"),
        ("@problemName X\n", "no '@data' line"),
        ("@data\n1:1\n", "no class labels"),
        (TS.replace("@data", "@timeStamps true\n@data") + "1:2:1\n", "time stamps are not supported"),
    ],
)
def test_ts_errors(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "x.ts"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        load_rows(path, "ts")


NESTED = "[" * 100_000 + "]" * 100_000
TEXTS = '{"pre_prompt": %s, "series": [%s], "series_text": [""], "post_prompt": ""}'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", TEXTS % ('""', NESTED), r"a.jsonl:1: not JSON \(nested more than 64 levels deep\)"),
        ("a.jsonl", TEXTS % ('""', "[" + "9" * 10_000 + "]"), "a.jsonl:1: not JSON"),
        ("a.jsonl", TEXTS % ('"\\ud800"', "[1]"), "a.jsonl:1: not JSON .half a character"),
        ("a.jsonl", TEXTS % (NESTED[:20] + NESTED[-20:], "[1]"), "field 'pre_prompt' must be text; got list"),
        ("a.jsonl", TEXTS % ('""', "[" + "9" * 400 + "]"), "must be a list of numbers"),
        ("a.csv", f'label,series\na,"{NESTED}"\n', "a.csv:2: field 'series' is not a list"),
        ("a.csv", 'label,series\na,"{[]: 1}"\n', "a.csv:2: field 'series' is not a list"),
        ("a.csv", 'label,series\na,"0x' + "f" * 5000 + '"\n', "a.csv:2: field 'series' must be a list of numbers"),
        ("a.ts", "@dimensions x\n@classLabel true a\n@data\n1:a\n", "expected the number of channels"),
        ("a.ts", "@dimensions\n@classLabel true a\n@data\n1:a\n", "expected the number of channels"),
        ("a.ts", "@timeStamps\n@classLabel\n@data\n1:a\n", "no class labels"),
        ("a.ts", "@\n", "no '@data' line"),
    ],
)
def test_what_parsers_trip_over(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_bytes(content.encode())
    with pytest.raises(DataError, match=message):
        load_rows(tmp_path / name)


def test_npz(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    windows = np.arange(12.0).reshape(2, 3, 2)
    np.savez(path, X=windows, y=[1, 0], labels=["LYING", "WALKING"], subject=[3, 4])
    rows = load_rows(path, label_names={"LYING": "lying"})
    assert values(rows[1]) == [[6, 8, 10], [7, 9, 11]]
    assert [(row.answer, row.group) for row in rows] == [("WALKING", "3"), ("lying", "4")]
    assert rows[0].series_text == ("This is channel 1 of 2", "This is channel 2 of 2")
    np.savez(path, data=windows[:, :, 0], target=["b", "a"])
    rows = load_rows(path, "npz", x="data", y="target")
    assert values(rows[0]) == [[0, 2, 4]] and [row.answer for row in rows] == ["b", "a"] and rows[0].group == ""
    for arrays, message in (
        ({"X": windows}, "no array 'y'"),
        ({"X": windows, "y": [0]}, r"y has shape \(1,\); expected \(2,\)"),
        ({"X": windows, "y": [0, 2], "labels": ["a", "b"]}, "indices into labels"),
        ({"X": windows[0, 0], "y": [0, 1]}, "must be numbers of shape"),
        ({"X": np.where(windows == 7, np.nan, windows), "y": [0, 1]}, "window 1, channel 1: nan at position 0"),
        ({"X": windows, "y": np.array([{}, {}])}, "not a readable npz archive"),
    ):
        np.savez(path, **arrays)
        with pytest.raises(DataError, match=message):
            load_rows(path)


def test_csv(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text('who,x,y,label\ns1,"[1, 2]","[3]",up\ns2,"[4]","[5]",down\n')
    rows = load_rows(path, series_columns=["x", "y"], group_column="who", id_column="who")
    assert values(rows[0]) == [[1, 2], [3]]
    assert [(row.id, row.group, row.answer) for row in rows] == [("s1", "s1", "up"), ("s2", "s2", "down")]
    assert rows[0].options == ("down", "up")
    path.write_text("label,v0,v1,v2,q\nup,1,2,3,a?\ndown,4,5,,b?\n")
    wide = {"value_columns": ["v0", "v2"], "question_column": "q", "post_prompt": "Say:"}
    rows = load_rows(path, "csv", **wide)
    assert [values(row) for row in rows] == [[[1, 2, 3]], [[4, 5]]]
    assert (rows[1].pre_prompt, rows[1].post_prompt, rows[1].options) == ("b?", "Say:", ())
    path.write_text("label,v0,v1,v2,q\nup,1,,3,a?\n")
    with pytest.raises(DataError, match="x.csv:2: nan at position 1"):
        load_rows(path, "csv", **wide)
    path.write_text("label,v0,v1,v2,q\nup,1,x,3,a?\n")
    with pytest.raises(DataError, match="x.csv:2: a value column is not a number"):
        load_rows(path, "csv", **wide)
    path.write_text("label,v0\nup,1,2\n")
    with pytest.raises(DataError, match="x.csv:2: the number of cells differs from the header's 2"):
        load_rows(path, "csv", **wide)
    path.write_text("label,v0\nup,1\n")
    with pytest.raises(DataError, match="x.csv:2: no column 'series'; the columns are label, v0"):
        load_rows(path, "csv")


def test_format_and_option_errors(tmp_path: Path) -> None:
    path = tmp_path / "x.ts"
    path.write_text(TS + "1:2:1\n")
    with pytest.raises(ConfigError, match="unknown format 'tsq'; did you mean 'tsqa'"):
        load_rows(path, "tsq")
    with pytest.raises(ConfigError, match="format 'ts' has no option 'label_name'; did you mean 'label_names'"):
        load_rows(path, "ts", label_name={})
    with pytest.raises(ConfigError, match="format 'jsonl' has no option 'x'; allowed: none"):
        load_rows(path, "jsonl", x=1)
    with pytest.raises(DataError, match="cannot tell the format from the suffix '.json'"):
        load_rows(tmp_path / "x.json")
    with pytest.raises(DataError, match="label_names has '3', but the labels are 1"):
        load_rows(path, "ts", label_names={3: "three"})
    with pytest.raises(DataError, match="2 channels, but channel_names has 1"):
        load_rows(path, "ts", channel_names=["a"])
    for format in FORMATS:
        suffix = {"ts": "ts", "npz": "npz", "parquet": "parquet"}.get(format, "jsonl")
        with pytest.raises(DataError, match="no data file"):
            load_rows(tmp_path / f"missing.{suffix}", format)


@pytest.mark.parametrize(
    ("file", "format", "num_rows", "num_series", "num_options"),
    [
        ("har_uci/har_total_acc_train.npz", "auto", 3645, 3, 6),
        ("timeseriesexam/qa_dataset.json", "timeseriesexam", 560, 1, 3),
        ("japanesevowels/JapaneseVowels_TRAIN.ts", "auto", 270, 12, 9),
        ("gunpoint/GunPoint_TRAIN.ts", "auto", 50, 1, 2),
        ("basicmotions/BasicMotions_TRAIN.ts", "auto", 40, 6, 4),
        ("italypowerdemand/ItalyPowerDemand_TRAIN.ts", "auto", 67, 1, 2),
    ],
)
def test_real_files(
    shared_data: Path, file: str, format: str, num_rows: int, num_series: int, num_options: int
) -> None:
    rows = load_rows(shared_data / file, format)
    assert (len(rows), len(rows[0].series), len(rows[0].options)) == (num_rows, num_series, num_options)
    assert all(row.answer in row.options for row in rows)


def test_instruct(tmp_path: Path) -> None:
    """Alpaca's headings; an empty input is left out; the answer follows without a space."""
    tasks = [
        {"instruction": "Fix it.", "input": "He go.", "output": "He goes."},
        {"instruction": " Say hi. ", "input": "", "output": "Hi"},
    ]
    (tmp_path / "a.json").write_text(json.dumps(tasks))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(task) + "\n" for task in tasks))
    for name in ("a.json", "a.jsonl"):
        first, second = load_rows(tmp_path / name, "instruct")
        assert first.pre_prompt == "### Instruction:\nFix it.\n\n### Input:\nHe go.\n\n### Response:\n"
        assert second.pre_prompt == "### Instruction:\nSay hi.\n\n### Response:\n"
        assert (first.answer, first.series, first.post_prompt) == ("He goes.", (), "")
    for content, message in (
        ('{"instruction": "a"}', "expected a JSON list of tasks; got dict"),
        ('[{"instruction": "a"}]', "task 1: missing field 'output'"),
        ('[{"instruction": "a", "input": 3, "output": "b"}]', "task 1: field 'input' must be text"),
        ("[", r"a\.json:1: not JSON"),
    ):
        (tmp_path / "a.json").write_text(content)
        with pytest.raises(DataError, match=message):
            load_rows(tmp_path / "a.json", "instruct")
