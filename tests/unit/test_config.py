"""Configurations: every error at once with its place, overrides, `extends:`, presets, and the schema."""

import inspect
import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from mlx_training.config import RunConfig, json_schema, load_config, to_yaml
from mlx_training.config_checks import OPTIONS
from mlx_training.config_errors import OLDER_SPELLINGS
from mlx_training.configs import find_config, shipped_configs, shipped_root
from mlx_training.data.importers import FORMATS
from mlx_training.data.splits import SplitSpec
from mlx_training.data.text_files import read_documents
from mlx_training.errors import ConfigError
from mlx_training.yaml_loader import parse_value, read_yaml

MINIMAL = """\
model: {family: timeseries, llm_id: builtin/tiny-llama-4bit}
dataset: {format: questions}
training: {max_steps: 100}
"""


@pytest.fixture
def write(tmp_path):
    def write(text: str, name: str = "c.yaml") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return write


@pytest.fixture
def minimal(write):
    return write(MINIMAL)


def lines(path, *overrides):
    """The lines of the ConfigError, without the directory of the file."""
    with pytest.raises(ConfigError) as error:
        load_config(path, overrides)
    return str(error.value).replace(f"{Path(path).parent}/", "").splitlines()


def one_line(path, *overrides):
    (line,) = lines(path, *overrides)
    return line


def test_minimal_configuration_has_sensible_defaults(minimal):
    config = load_config(minimal)
    assert config.experiment.name == "c" and config.output_dir == "runs/c"
    assert config.learning_rates == {"encoder": 1e-3, "projector": 1e-3}
    assert config.dataset.num_samples_test == 1000 and config.dataset.splits is None
    with pytest.raises(ValidationError, match="frozen"):
        config.training.batch_size = 3


def test_all_errors_at_once_each_with_its_place(write):
    path = write("""\
backend: jaxx
model:
  family: timeseries
  encoder: {hiden_size: 3, num_heads: 5}
dataset: {format: questions, format: questions}
training:
  max_steps: 1e3
  num_epochs: 3
  batch_size: "8"
  learning_rate: {encoder: -1, projectr: 2}
  betas: [0.9, 1.0]
evaluation: {metrics: [loss, acuracy], save_predictions: yes}
checkpoint: 3
logging: {every_steps: 0}
batch_size: 3
""")
    head, *found = lines(path, "training.schedule=cosin", "nonsense")
    assert head == "16 problems in the configuration:"
    expected = [
        r"c.yaml:1: backend: given the text 'jaxx'; allowed: auto, mlx, torch$",
        r"c.yaml:4: model.encoder.hiden_size: unknown key; did you mean model.encoder.hidden_size\? allowed here: ",
        r"c.yaml:4: model.encoder.hidden_size: given 64; it must be a multiple of num_heads, which is 5$",
        r"c.yaml:5: dataset.format: given twice \(first at c.yaml:5\)",
        r"c.yaml:7: training.max_steps: given 1000.0; allowed: a whole number >= 1 or null$",
        r"c.yaml:9: training.batch_size: given the text '8'; allowed: a whole number >= 1$",
        r"c.yaml:10: training.learning_rate.encoder: given -1; allowed: a number >= 0$",
        r"c.yaml:10: training.learning_rate.projectr: unknown group; .*; did you mean projector\?",
        r"c.yaml:11: training.betas.1: given 1.0; allowed: a number >= 0 and < 1$",
        r"c.yaml:12: evaluation.metrics.1: given the text 'acuracy'; .*; did you mean accuracy\?",
        r"c.yaml:12: evaluation.save_predictions: given the text 'yes'; allowed: true or false$",
        r"c.yaml:13: checkpoint: given 3; allowed: a mapping of every_steps, keep, best$",
        r"c.yaml:14: logging.every_steps: given 0; allowed: a whole number >= 1$",
        r"c.yaml:15: batch_size: unknown key; did you mean training.batch_size or evaluation.batch_size\? allowed",
        r"override: 'nonsense' is not key=value",
        r"override: training.schedule: given the text 'cosin'; .*; did you mean cosine\?",
    ]
    assert len(found) == len(expected), found
    for pattern in expected:
        assert any(re.match(pattern, line) for line in found), pattern
    assert [line.split(": ")[0] for line in found] == [pattern.split(": ")[0] for pattern in expected]


def test_contradictions_are_reported_beside_other_errors(minimal):
    found = lines(minimal, "training.num_epochs=2", "model.encoder.num_heads=5", "training.batch_size=x")
    assert len(found) == 4
    assert "override: training.batch_size: given the text 'x'" in found[1] + found[2] + found[3]
    assert any("training.max_steps: both are given" in line for line in found)
    assert any("model.encoder.hidden_size: given 64; it must be a multiple of num_heads" in line for line in found)


def test_a_wrong_key_hides_no_contradiction_and_invents_none(minimal):
    found = lines(minimal, "model.family=timeserie", "training.max_steps=null")
    assert any(
        "model.family: given the text 'timeserie'; allowed: timeseries or decoder or recurrent or kgram or ssm" in line
        for line in found
    )
    assert any("training.max_steps: neither is given" in line for line in found)
    assert len(found) == 3
    assert "override: training.max_steps: given the text 'x'" in one_line(minimal, "training.max_steps=x")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.max_steps=null"], "override: training.max_steps: neither is given; exactly one of"),
        (["training.num_epochs=3"], "override: training.max_steps: both are given"),
        (["model.encoder.num_heads=5"], "override: model.encoder.hidden_size: given 64; it must be a multiple of"),
        (["training.learning_rate={encoder: 1e-3, projektor: 1e-3}", "training.learning_rate.projector=1"],
         "training.learning_rate.projektor: unknown group; the groups that train are encoder, projector; did you mean"),
        (["training.learning_rate={encoder: 1e-3}"], "training.learning_rate: no rate for projector"),
        (["training.learning_rate=0"], "every rate is 0, so nothing would train"),
        (["training.warmup_fraction=1.5"], "given 1.5; allowed: a number >= 0 and <= 1"),
        (["training.eps=.nan"], "override: training.eps: given nan"),
        (["checkpoint.best=eval/macro_f1"], "evaluation.metrics has only loss, accuracy"),
        (["checkpoint.best=loss"], "did you mean eval/loss?"),
        (["model.layout=opentslm", "model.encoder.numeric_scale=true"], "the opentslm layout has no numeric scale"),
        (["dataset.path=x.jsonl"], "questions is generated and has no path"),
        (["dataset.format=jsonl"], "dataset.path: missing; give the file or folder"),
        (["dataset.format=corpus"], "the timeseries family reads rows about time series"),
        (["dataset.format=jsonl", "dataset.path=x", "dataset.options.question=a"], "jsonl does not read it"),
        (["dataset.format=jsonl", "dataset.path=x", "dataset.splits.fraction={validation: 0.5, test: 0.5}"],
         "dataset.splits.fraction: given 1 in all"),
        (["dataset.format=jsonl", "dataset.path=x", "dataset.splits.group={validation: [1, 2], test: ['2']}"],
         "dataset.splits.group.test: group 2 is in validation too"),
        (["dataset.format=jsonl", "dataset.path=x", "dataset.splits.group.validation=[a]"],
         "evaluation.test_split: the split test has no rows"),
        (["trainig.batch_size=3"], "override: trainig: unknown key; did you mean training? allowed here: experiment,"),
        (["trainng={}"], "override: trainng: unknown key; did you mean training? allowed here: experiment,"),
        (["model.enkoder={}"], "override: model.enkoder: unknown key; did you mean model.encoder? allowed here: "),
        (["training.wd=1"], "unknown key; did you mean training.weight_decay? allowed"),
        (["training.clip=1"], "unknown key; did you mean training.grad_clip_norm? allowed"),
        (["training.steps=1"], "unknown key; did you mean training.max_steps or "),
        (["dataset.s=1"], "override: dataset.s: unknown key; allowed here: "),
        (["training.batch_size="], "override: training.batch_size: given null; allowed: a whole number >= 1"),
        (["training.betas=[0.9"], "override: training.betas: given '[0.9'; not valid YAML"),
        (["training..x=1"], "is not key=value"),
        (["output_dir={a: 1}"], "override: output_dir: given a mapping (a); allowed: text"),
    ],
)  # fmt: skip
def test_single_mistakes(minimal, overrides, message):
    assert message in one_line(minimal, *overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.decoder.num_heads=3"], "model.decoder.hidden_size: given 128; it must be a multiple of num_heads"),
        (["model.decoder.num_kv_heads=3"], "model.decoder.num_heads: given 4; it must be a multiple of num_kv_heads"),
        (["model.decoder.head_dim=7"], "a head is 7 wide; rotary positions need an even number"),
        (["evaluation.metrics=[loss, accuracy]"], "a decoder has no answers to score"),
        (["training.learning_rate={encoder: 1}"], "the groups that train are model"),
        (["model.llm_id=x"], "model.llm_id: unknown key; it belongs to the family "),
        (["model.tokenizer.train=3"], "model.tokenizer.train: given 3; allowed: a whole number >= 259"),
        (["model.tokenizer=3"], "given 3; allowed: text or a mapping of train"),
        (["dataset.stats_in_text=false"], "dataset.stats_in_text: model.family: decoder does not read it"),
        (["dataset.format=text", "dataset.path=x", "dataset.splits.group.test=[a]"], "text does not read it"),
        (["dataset.format=text", "dataset.path=x", "dataset.num_samples_test=3"], "text does not read it"),
    ],
)
def test_decoder_mistakes(write, overrides, message):
    path = write("{model: {family: decoder}, dataset: {format: corpus}, training: {max_steps: 9}}")
    assert load_config(path).evaluation.metrics == ("loss",)
    assert any(message in line for line in lines(path, *overrides))


@pytest.mark.parametrize(
    ("ssm", "message"),
    [
        ("window: 8", "model.ssm.window: mixers: mamba do not read it; remove it, or add local"),
        (
            "mixers: [mamba2], head_dim: 48",
            "model.ssm.head_dim: given 48; it must divide expand * hidden_size, 256: 32",
        ),
        ("mixers: [mamba2], num_groups: 3", "model.ssm.num_groups: given 3; it must divide the 4 heads: 2 or 4"),
        ("mixers: [s4d], state_size: 7", "model.ssm.state_size: given 7; s4d pairs them"),
        ("mixers: [stu], num_filters: 129", "a window of 128 has no more filters than tokens"),
        ("mixers: [local], num_heads: 3", "model.ssm.num_heads: given 3; it must divide hidden_size 128: 2 or 4"),
        ("mixers: [local], num_heads: 128", "a head is 1 wide; rotary positions need an even number"),
        ("mixers: [mambo]", "did you mean mamba"),
    ],
)
def test_ssm_mistakes(write, ssm, message):
    path = write(f"{{model: {{family: ssm, ssm: {{{ssm}}}}}, dataset: {{format: corpus}}, training: {{max_steps: 9}}}}")
    assert any(message in line for line in lines(path)), lines(path)


@pytest.mark.parametrize("older", [*OLDER_SPELLINGS, *(f"training.{key}" for key in OLDER_SPELLINGS if "." not in key)])
def test_older_spellings_name_the_new_place(write, older):
    section, _, name = older.rpartition(".")
    text = f"{section}: {{{name}: 1}}" if section else f"{name}: 1"
    path = write(f"extends: base\n{text}\n")
    write(MINIMAL, "base.yaml")
    new = OLDER_SPELLINGS.get(older, OLDER_SPELLINGS.get(name))
    assert one_line(path) == f"c.yaml:2: {older}: given 1; this is an older spelling, now write {new}"
    assert one_line(path.parent / "base.yaml", f"{older}=1").startswith(f"override: {older}: given 1; this is an older")


def key_paths(data, path=()):
    for key, value in data.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from key_paths(value, (*path, key))


SWEPT = ["timeseries/har", "tiny_llama"]  # of the second the keys that the first does not have


def resolved_paths(name):
    return list(key_paths(parse_value(to_yaml(load_config(name)), "resolved")))


@pytest.mark.parametrize("name", SWEPT)
def test_no_value_of_any_key_breaks_the_report(name):
    """Whatever stands at a key, the answer is a configuration or a ConfigError that names a key."""
    earlier = [path for other in SWEPT[: SWEPT.index(name)] for path in resolved_paths(other)]
    for path in resolved_paths(name):
        if path in earlier:
            continue
        for value in ("null", "[]", "{}", "[{a: 1}]", "{a: {b: 1}}", "x", "-1", "1e400", "true", "''", "[null]"):
            override = f"{'.'.join(path)}={value}"
            try:
                load_config(name, [override])
            except ConfigError as error:
                assert re.search(r"(override|\.yaml:\d+): [\w.]+: ", str(error)), override


def test_overrides_merge_as_a_file_would(minimal):
    config = load_config(
        minimal,
        [
            "training.batch_size=8",
            "training.learning_rate={encoder: 3e-4, projector: 1e-4}",
            "training.learning_rate.projector=2e-4",
            "experiment.tags=[a, b]",
            "experiment.notes=a=b",
            "experiment.name=other",
        ],
    )
    assert config.training.batch_size == 8 and config.experiment.tags == ("a", "b")
    assert config.learning_rates == {"encoder": 3e-4, "projector": 2e-4}
    assert config.experiment.notes == "a=b" and config.output_dir == "runs/other"


def test_extends_merges_beside_the_file_and_shipped(write):
    write(MINIMAL + "experiment: {seed: 7, tags: [a]}\n", "base.yaml")
    child = write("extends: base\nexperiment: {tags: [b]}\ntraining: {learning_rate: {encoder: 1, projector: 2}}\n")
    config = load_config(child)
    assert (config.experiment.seed, config.experiment.tags) == (7, ("b",))
    assert config.experiment.name == "c" and config.training.max_steps == 100
    number = write("extends: c.yaml\ntraining: {learning_rate: 5e-4}\n", "number.yaml")
    assert load_config(number).training.learning_rate == 5e-4
    shipped = write("extends: quick_test\ntraining: {max_steps: 3}\n", "mine.yaml")
    assert load_config(shipped).training.max_steps == 3
    assert load_config(shipped).experiment.name == "mine"  # a name and a place are not inherited
    assert load_config(shipped).output_dir == "runs/mine"


def test_errors_cite_the_layer_that_is_wrong(write):
    write(MINIMAL + "backend: jax\n", "base.yaml")
    found = lines(write("extends: base\n\ndevice: tpu\n"))
    assert found[1].startswith("base.yaml:4: backend: given the text 'jax'")
    assert found[2].startswith("c.yaml:3: device: given the text 'tpu'")


def test_extends_that_cannot_be_followed(write):
    write("extends: b\n", "a.yaml")
    assert "a cycle: a.yaml -> b.yaml -> a.yaml" in one_line(write("extends: a\n", "b.yaml").parent / "a.yaml")
    assert "c.yaml:1: extends: no configuration 'quick_tset'" in one_line(write("extends: quick_tset\n"))
    assert "did you mean quick_test?" in one_line(write("extends: quick_tset\n"))
    assert "c.yaml:1: extends: given ['a']" in one_line(write("extends: [a]\n"))
    with pytest.raises(ConfigError, match="did you mean timeseries/har"):
        load_config("timeseries/hra")


@pytest.mark.parametrize(
    ("family", "override", "message"),
    [
        (
            "recurrent",
            "model.recurrent={embed_size: 64, tie_word_embeddings: true}",
            "as wide as hidden_size, which is 128",
        ),
        ("recurrent", "model.recurrent.cell=rnn", "given the text 'rnn'; allowed: lstm, gru"),
        ("recurrent", "model.recurrent.num_heads=2", "model.recurrent.num_heads: unknown key"),
        ("recurrent", "model.preset=lstm-1000", "did you mean lstm-1024?"),
        ("kgram", "model.kgram.k=1", "model.kgram.k: given 1; allowed: a whole number >= 2"),
        ("kgram", "model.kgram.k=200", "a window has context_length 128 tokens only"),
        ("kgram", "model.kgram={form: onehot, embed_size: 8}", "model.kgram.embed_size: form: onehot does not read it"),
    ],
)
def test_families_without_attention(family, override, message, write):
    path = write(f"{{model: {{family: {family}}}, dataset: {{format: corpus}}, training: {{max_steps: 9}}}}")
    assert load_config(path).model.spec(300).num_parameters > 0
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_config(path, [override])


@pytest.mark.parametrize("name", shipped_configs())
def test_shipped_configurations_load_and_come_back(name, tmp_path):
    config = load_config(name)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "config.yaml") == config
    assert find_config(f"configs/{name}.yaml").samefile(shipped_configs()[name])


def test_curriculum_is_chained_and_has_the_published_numbers():
    stages = [load_config(f"timeseries/curriculum/stage{i}") for i in range(1, 6)]
    assert [s.training.num_epochs for s in stages] == [30, 20, 30, 60, 60]
    assert [s.training.init_from for s in stages] == [None, *[s.output_dir for s in stages[:-1]]]
    for number, stage in enumerate(stages, start=1):
        assert stage.learning_rates == {"encoder": 2e-4, "projector": 1e-4} | ({"lora": 1e-4} if number > 2 else {})
        assert (stage.model.lora and (stage.model.lora.rank, stage.model.lora.alpha)) == (
            (16, 32) if number > 2 else None
        )
        assert (stage.training.warmup_fraction, stage.training.schedule) == (0.03, "linear")
        assert (stage.training.batch_size, stage.training.weight_decay) == (4, 1e-2)
        assert (stage.training.early_stopping_patience, stage.training.early_stopping_min_delta) == (5, 1e-4)
        assert stage.model.layout == "opentslm" and stage.experiment.name == Path(stage.output_dir).name


def test_configurations_of_older_runs_are_read(write):
    text = "model: {family: decoder, decoder: {rms_norm_eps: 0.001}}\ndataset: {format: corpus}\n"
    assert load_config(write(text + "training: {max_steps: 1}\n")).model.decoder.norm_eps == 0.001


def test_preset_fills_what_is_not_given(minimal):
    model = load_config(minimal, ["model.preset=opentslm-sp", "model.encoder.num_layers=2"]).model
    encoder = model.encoder
    assert (encoder.patch_size, encoder.hidden_size, encoder.num_heads, encoder.ffn_size) == (4, 128, 8, 1024)
    assert (encoder.num_layers, encoder.max_patches, encoder.numeric_scale) == (2, 1024, False)
    assert model.layout == "opentslm" and not model.projector.norm_output


def test_configuration_can_be_made_without_a_file():
    config = RunConfig.model_validate(
        {"model": {"family": "decoder"}, "dataset": {"format": "corpus"}, "training": {"num_epochs": 1}}
    )
    assert config.output_dir == "runs/run" and config.dataset.num_samples_train == 100_000
    with pytest.raises(ValidationError, match="training.max_steps: neither is given"):
        RunConfig.model_validate({"model": {"family": "decoder"}, "dataset": {"format": "corpus"}})


def test_a_section_that_is_given_empty_counts(minimal):
    assert load_config(minimal).model.lora is None
    assert load_config(minimal, ["model.lora={}"]).model.lora.rank == 16


def test_dataset_section_says_what_the_data_code_reads(minimal):
    keywords = {name: tuple(inspect.signature(read).parameters)[1:] for name, read in FORMATS.items()}
    keywords["text"] = tuple(inspect.signature(read_documents).parameters)[1:]
    for name, options in keywords.items():
        assert sorted(OPTIONS.get(name, ())) == sorted({*options} - {"classes"}), name  # what other files hold
    splits = load_config("timeseries/har").dataset.splits
    spec = SplitSpec(**splits.model_dump(exclude_none=True))
    assert spec.group["test"] == (25, 26, 27, 28, 29, 30)


def conforms(value, node, schema):
    """A small JSON Schema check: types, properties, enumerations, bounds, alternatives."""
    if "$ref" in node:
        return conforms(value, schema["$defs"][node["$ref"].rpartition("/")[2]], schema)
    if "anyOf" in node:
        return any(conforms(value, option, schema) for option in node["anyOf"])
    if value not in node.get("enum", [value]) or value != node.get("const", value):
        return False
    if node.get("type") == "object":
        extra = node.get("additionalProperties", True)
        return isinstance(value, dict) and all(
            conforms(item, node["properties"][key], schema)
            if key in node.get("properties", {})
            else isinstance(extra, dict) and conforms(item, extra, schema)
            for key, item in value.items()
        )
    kinds = {"integer": int, "number": (int, float), "string": str, "boolean": bool, "null": type(None), "array": list}
    return (
        (node.get("type") is None or isinstance(value, kinds[node["type"]]))
        and (not isinstance(value, int | float) or value >= node.get("minimum", value))
        and (not isinstance(value, list) or all(conforms(v, node.get("items", {}), schema) for v in value))
    )


def test_schema_accepts_shipped_files_and_refuses_mistakes():
    schema = json_schema()
    for path in shipped_root().rglob("*.yaml"):
        assert conforms(read_yaml(path).data, schema, schema), path
    assert not conforms({"trainig": {}}, schema, schema)
    assert not conforms({"training": {"batch_size": 0}}, schema, schema)
    assert not conforms({"model": {"family": "decoder", "llm_id": "x"}}, schema, schema)
    described = schema["$defs"]["Training"]["properties"]
    assert all("description" in node or name == "optimizer" or name == "eps" for name, node in described.items())
