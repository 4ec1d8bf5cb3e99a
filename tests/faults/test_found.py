"""Files that ended in a traceback once, or were taken in silence."""

import json
import re
from typing import Any

import pytest
import trial

_DEEP = "[" * 100_000
_LONG = "9" * 5000

# The format, its file, what is in it instead (of a JSON object, the keys that
# are others), and what is said.
_FOUND: list[tuple[str, str, Any, str]] = [
  ("bert", "config.json", {"hidden_act": []}, "hidden_act must be one of"),
  ("bert", "config.json", {"model_type": {}}, "model_type must be one of"),
  ("bert", "config.json", {"layer_norm_eps": 10**400}, "must be a positive"),
  ("bert", "config.json", {"is_decoder": "no"}, "is_decoder must be false"),
  (
    "bert",
    "config.json",
    {"max_position_embeddings": 3},
    "config.json|whole: ",
  ),
  (
    "bert",
    "config.json",
    b'{"a": ' + _LONG.encode() + b"}",
    "Exceeds the limit",
  ),
  ("bert", "config.json", _DEEP.encode(), "more than 100 levels"),
  ("bert", "config.json", [], "must hold an object .* got"),
  ("decoder", "config.json", {"layer_types": 3}, "layer_types must be a list"),
  ("decoder", "config.json", {"layer_types": [[]]}, "layer_types must be a l"),
  ("decoder", "config.json", {"rope_scaling": [1]}, "rope_scaling, must be an"),
  ("decoder", "config.json", {"rope_scaling": "a"}, "rope_scaling, must be an"),
  ("decoder", "config.json", {"tie_word_embeddings": "no"}, "true or false"),
  ("decoder", "config.json", {"rms_norm_eps": 10**400}, "positive number"),
  ("decoder", "tokenizer_config.json", [], "must hold an object"),
  (
    "decoder",
    "tokenizer_config.json",
    {"chat_template": 5},
    "chat_template must be",
  ),
  ("decoder", "tokenizer_config.json", {"chat_template": [5]}, "a list of obj"),
  (
    "decoder",
    "tokenizer_config.json",
    {"chat_template": [{"name": "default", "template": 5}]},
    "template must be a text",
  ),
  (
    "decoder",
    "tokenizer_config.json",
    {"eos_token": 3},
    "eos_token must be a text",
  ),
  (
    "decoder",
    "tokenizer_config.json",
    {"eos_token": {}},
    "eos_token, lacks con",
  ),
  (
    "decoder",
    "model.safetensors.index.json",
    {"weight_map": 3},
    "a weight_map",
  ),
  ("t5", "config.json", {"layer_norm_epsilon": True}, "positive number"),
  ("t5", "config.json", {"tie_word_embeddings": []}, "must be true or false"),
  ("adapters", "adapters.json", {"spec": 3}, "spec is a JSON object; got 3"),
  ("adapters", "adapters.json", {"scales": []}, "scales is a JSON object"),
  ("adapters", "adapters.json", {"scales": {"a": "x"}}, "positive numbers"),
  ("adapters", "adapters.json", {"version": [1]}, r"its version is \[1\]"),
  (
    "peft",
    "adapter_config.json",
    {"lora_alpha": 10**400},
    "lora_alpha is a pos",
  ),
  (
    "peft",
    "adapter_config.json",
    {"lora_dropout": "a"},
    "lora_dropout is a num",
  ),
  (
    "peft",
    "adapter_config.json",
    {"lora_dropout": {}},
    "lora_dropout is a numb",
  ),
  (
    "peft",
    "adapter_config.json",
    {"use_rslora": "yes"},
    "use_rslora is true",
  ),
  ("peft", "adapter_config.json", {"task_type": [3]}, "task_type is a name or"),
  (
    "peft",
    "adapter_config.json",
    {"rank_pattern": {"(": 1}},
    "rank_pattern goes",
  ),
  (
    "peft",
    "adapter_config.json",
    {"rank_pattern": {"a{99999999999}": 1}},
    "rank_pattern goes from",
  ),
  ("texts of a run", "results.json", [], "results.json must hold an object"),
  ("texts of a run", "results.json", {"test": 3}, "test must be an object"),
  ("texts of a run", "results.json", {"test": {}}, "test, lacks loss"),
  ("texts of a run", "results.json", {"metric": "x"}, "test, lacks x"),
  ("texts of a run", "results.json", {"baseline": {"a": 1}}, "baseline, lacks"),
  (
    "texts of a run",
    "results.json",
    {"command": [3]},
    "command must be a list",
  ),
  (
    "texts of a run",
    "results.json",
    {"config": {"method": "x"}},
    "config, lac",
  ),
  (
    "texts of a run",
    "metrics.jsonl",
    b"\xff\n",
    "line 1, is not JSON in UTF-8",
  ),
  (
    "texts of a run",
    "metrics.jsonl",
    b'{"loss": 1}\n',
    "metrics.jsonl lacks st",
  ),
  ("texts of a run", "metrics.jsonl", b"[1]\n", "line 1, must be an object"),
  (
    "texts of a run",
    "metrics.jsonl",
    b'{"step": "a"}\n',
    "step must be a whole",
  ),
  (
    "texts of a run",
    "metrics.jsonl",
    b'{"step": 1, "a": []}\n',
    "a must be a number",
  ),
  (
    "texts of a run",
    "task.json",
    {"texts": ["{0.__class__}"]},
    "texts cannot be",
  ),
  ("texts of a run", "task.json", {"texts": ["{a"]}, "texts cannot be"),
  ("texts of a run", "task.json", {"texts": 3}, "texts must be a list"),
  ("texts of a run", "task.json", {"labels": 3}, "labels must be a list of"),
  ("texts of a run", "task.json", {"labels": ["a"]}, "labels cannot be"),
  (
    "texts of a run",
    "task.json",
    {"metrics": ["x"]},
    "metrics must be some of",
  ),
  ("texts of a run", "task.json", {"kind": "x"}, "kind must be one of"),
  ("texts of a run", "task.json", {"spread": 0}, "spread cannot be"),
  ("texts of a run", "config.json", [], "config.json must hold an object"),
  (
    "texts of a run",
    "config.json",
    {"optimisation": {"epochs": "x"}},
    "epochs",
  ),
  (
    "texts of a run",
    "config.json",
    {"adapter": {"alpha": 0}},
    "config.json: --al",
  ),
  ("texts of a run", "config.json", {"method": 3}, "method must be"),
  ("saved", "dataset_dict.json", {"splits": 3}, "splits must be a list"),
  ("saved", "dataset_dict.json", {"splits": ["/"]}, "in the same folder by"),
  (
    "saved",
    "train/state.json",
    {"_data_files": [3]},
    "_data_files must be a list",
  ),
  ("saved", "train/state.json", {"_data_files": []}, "lists no files of rows"),
  (
    "saved",
    "train/state.json",
    {"_data_files": [{"filename": "../../a"}]},
    "in the same folder by their names; got '../../a'",
  ),
  ("rows of a study", "out/runs.jsonl", b"[1]\n", "line 1, must be an object"),
  (
    "rows of a study",
    "out/runs.jsonl",
    b'{"key": 1}\n',
    "key must be a text; got 1",
  ),
  ("rows of a study", "out/landscapes.jsonl", b'{"a": 1}\n', "lacks key"),
  (
    "rows of a study",
    "out/landscapes.jsonl",
    b'{"key": "a", "line": [[]]}\n',
    "line must be a list of a number or null",
  ),
  ("study", "study.toml", f"a = {'[' * 5000}".encode(), "nested too deeply"),
  ("study", "study.toml", f"a = {_LONG}".encode(), "is not TOML"),
  (
    "study",
    "study.toml",
    b"[defaults]\nplugins = 3",
    "plugins must be a text; got 3",
  ),
  (
    "study",
    "study.toml",
    b"[study]\nname = 'a'\nseeds = 1000000000000",
    "seeds",
  ),
  ("yaml", "run.yaml", b"[" * 5000, "nested too deeply"),
  ("yaml", "run.yaml", f"seed: 0x{'f' * 9999}".encode(), "seed must be below"),
  ("yaml", "run.yaml", b"seed: 2026-13-45", "is not YAML"),
  ("yaml", "run.yaml", b"seed: 2026-01-01", "seed must be a whole number; got"),
  ("yaml", "run.yaml", b"? [a]\n: 1", "is not YAML"),
  ("conversations", "rows.jsonl", _DEEP.encode(), "more than 100 levels"),
  (
    "conversations",
    "rows.jsonl",
    b'{"text": "\\ud800"}',
    "half of a surrogate",
  ),
  (
    "jsonl",
    "rows.jsonl",
    b'{"text": "a", "label": 1e999}\n',
    "a finite number",
  ),
  (
    "jsonl",
    "rows.jsonl",
    f'{{"text": "a", "label": {"9" * 400}}}\n'.encode(),
    "a finite number",
  ),
  (
    "jsonl",
    "rows.jsonl",
    b'{"text": "a", "label": 1e308}\n{"text": "b", "label": -1e308}\n',
    "rows.jsonl",
  ),
  (
    "classes in jsonl",
    "rows.jsonl",
    b'{"text": "a", "label": "--5"}\n',
    "one la",
  ),
  ("csv", "rows.csv", b"image,label\na\x00b,1\nb,2\n", "null byte"),
]


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, trial.Seed]:
  """The whole folder of each format."""
  return {
    name: trial.Seed(name, tmp_path_factory.mktemp("found") / "whole")
    for name in dict.fromkeys(name for name, *_ in _FOUND)
  }


@pytest.mark.parametrize(("name", "file", "change", "told"), _FOUND)
def test_what_was_found_once_is_a_sentence(name, file, change, told, seeds):
  seed = seeds[name]
  if not isinstance(change, bytes):
    whole = json.loads((seed.folder / file).read_bytes())
    change = whole | change if isinstance(change, dict) else change
    change = json.dumps(change).encode()
  outcome = seed.tried(file, change)
  assert not outcome.fault
  assert not outcome.accepted
  assert re.search(told, outcome.said), outcome.said


@pytest.mark.parametrize("number", [0, 1, 2, 3, 4, 5, 6, 7])
def test_arrow_s_offsets_are_looked_at_before_they_are_followed(
  number, tmp_path
):
  seed = trial.Seed("saved", tmp_path / "whole")
  file = "train/data.arrow"
  content = bytearray((seed.folder / file).read_bytes())
  # The offsets of the texts, of 4 bytes each.
  place = content.find(bytes([0, 0, 0, 0, 13, 0, 0, 0])) + 4 * (number + 1)
  content[place : place + 4] = (2**31 - 1 - number).to_bytes(4, "little")
  outcome = seed.tried(file, bytes(content))
  assert not outcome.fault
  assert not outcome.accepted
