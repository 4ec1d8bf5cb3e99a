"""Instructions: three forms of a row, a split by text, errors with a line."""

import gzip
import json

import pyarrow as pa
from pyarrow import parquet
import pytest
import tensorflow_datasets as tfds

from train.data import hashing, instructions
from train.models.io.template import Message


def _write(folder, *lines, name="rows.jsonl"):
  path = folder / name
  text = "".join(
    (line if isinstance(line, str) else json.dumps(line)) + "\n"
    for line in lines
  )
  data = text.encode()
  path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
  return path


def _load(path, split="train", held_out=0.0, **changes):
  return instructions.load(path, split, held_out=held_out, **changes)


def _many(folder, count=1000):
  rows = ({"prompt": f"{i}", "response": f"It is {i}."} for i in range(count))
  return _write(folder, *rows)


def _turns(asked, answered):
  return Message("user", asked), Message("assistant", answered)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_every_form_of_a_row_is_read(name, tmp_path):
  messages = [
    {"role": "system", "content": "s", "name": "left alone"},
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"},
    {"role": "assistant", "content": "d"},
  ]
  path = _write(
    tmp_path,
    {"messages": messages, "id": 7},
    "",
    {"prompt": "ask", "response": " answer "},
    {"instruction": "add", "input": "1 2", "output": "3"},
    {"instruction": "add", "input": "", "output": "3"},
    {"instruction": "add", "output": "3"},
    "   ",
    {"instruction": "why", "context": None, "response": "é"},
    {"instruction": "why", "context": "so", "response": "é"},
    name=name,
  )
  assert _load(path) == [
    tuple(Message(item["role"], item["content"]) for item in messages),
    _turns("ask", " answer "),
    _turns("add\n\n1 2", "3"),
    _turns("add", "3"),
    _turns("add", "3"),
    _turns("why", "é"),
    _turns("why\n\nso", "é"),
  ]


def test_the_splits_part_the_rows_in_the_shares_asked_for(tmp_path):
  path = _many(tmp_path)
  parts = {
    split: _load(path, split, held_out=0.1) for split in instructions.SPLITS
  }
  rows = [row for part in parts.values() for row in part]
  assert sorted(rows) == sorted(_load(path))
  # Three standard deviations of a share of 0.1 of 1,000 rows are 28.
  assert abs(len(parts["validation"]) - 100) < 28
  assert abs(len(parts["test"]) - 100) < 28


def test_the_split_of_a_row_is_that_of_its_words(tmp_path):
  (tmp_path / "other").mkdir()
  path = _many(tmp_path)
  shouted = _write(
    tmp_path / "other",
    *({"prompt": f" {i}?", "response": f"IT is\n{i}"} for i in range(1000)),
  )
  for split in instructions.SPLITS:
    words, same_words = (
      {
        hashing.normalise(" ".join(turn.content for turn in row))
        for row in rows
      }
      for rows in (
        _load(path, split, held_out=0.2),
        _load(shouted, split, held_out=0.2),
      )
    )
    assert words == same_words


def test_a_limit_chooses_by_its_seed_and_nests(tmp_path):
  path = _many(tmp_path)
  few, more = (_load(path, limit=n, seed=1) for n in (10, 30))
  assert (len(few), more[:10]) == (10, few)
  assert few == _load(path, limit=10, seed=1)
  assert few != _load(path, limit=10, seed=2)


def _messages(*roles, content="x"):
  return {"messages": [{"role": role, "content": content} for role in roles]}


@pytest.mark.parametrize(
  ("line", "message"),
  [
    ("{no", "is not JSON in UTF-8"),
    ("[" * 100_000, "nested more than 100 levels"),
    ("[1]", "is not an object; a row must be"),
    ("null", "is not an object; a row must be"),
    ('{"texts": "a"}', "has the keys texts; a row must have messages, or conv"),
    ("{}", "has the keys none; a row must have"),
    ('{"prompt": "a", "output": "b"}', "has the keys prompt, output; a row"),
    ('{"text": " "}', "text is empty"),
    (
      '{"prompt": "a", "response": " "}',
      "response is empty; it must have at least one character",
    ),
    ('{"prompt": "", "response": "a"}', "prompt is empty"),
    (
      '{"prompt": ["a"], "response": "a"}',
      "prompt must be a string; got a list",
    ),
    (
      '{"instruction": "a", "input": 3, "output": "b"}',
      "input must be a string; got a number",
    ),
    (
      r'{"prompt": "a", "response": "\ud800"}',
      "half of a surrogate pair",
    ),
    ('{"messages": "a"}', "messages must be a list of objects with the keys"),
    ('{"messages": [{"role": "user"}]}', "the keys role and content .*; got"),
    ('{"messages": []}', "has no assistant message, so there is nothing to"),
    (_messages("user"), r"nothing to learn; its roles are \['user'\]"),
    (_messages("assistant"), "a conversation may begin with one system"),
    (_messages("user", "assistant", "user"), "has the roles"),
    (
      _messages("user", "tool", "assistant"),
      "'tool'.* the assistant must be last",
    ),
    (_messages("user", "system", "assistant"), "has the roles"),
    (_messages("user", "user", "assistant"), "has the roles"),
    (
      _messages("user", "assistant", content=None),
      "the user's content must be a string; got null",
    ),
    (_messages("user", "assistant", content=""), "the user's content is empty"),
  ],
)
def test_a_malformed_row_is_refused_with_its_line(line, message, tmp_path):
  good = {"prompt": "a", "response": "b"}
  path = _write(tmp_path, good, "", good, line, good)
  with pytest.raises(ValueError, match=rf"rows\.jsonl, line 4.*{message}"):
    _load(path)


def test_bytes_that_are_not_utf_8_are_refused_with_their_line(tmp_path):
  path = tmp_path / "rows.jsonl"
  path.write_bytes(b'\n{"prompt": "\xff", "response": "a"}\n')
  with pytest.raises(ValueError, match="line 2, is not JSON in UTF-8"):
    _load(path)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"split": "dev"}, "no split 'dev'; the splits are train, validation, te"),
    ({"held_out": 0.6}, "held_out must be from 0 to 0.5; got 0.6"),
    ({"limit": 0}, "limit must be at least 1; got 0"),
    ({"split": "test"}, "has 0 rows in test at held_out 0.0, but at least one"),
    (
      {"name": "rows.json"},
      r"is not a file of rows; rows must be a \.csv, .*tfds:NA",
    ),
  ],
)
def test_arguments_that_do_not_fit_are_refused(changes, message, tmp_path):
  name = changes.pop("name", "rows.jsonl")
  path = _write(tmp_path, *[{"prompt": "a", "response": "b"}] * 3, name=name)
  with pytest.raises(ValueError, match=message):
    _load(path, **changes)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
  with pytest.raises(
    ValueError, match=r"no\.jsonl is not there; rows must be a"
  ):
    _load(tmp_path / "no.jsonl")
  path = _write(tmp_path, {"prompt": "a", "response": "b"}, name="a.jsonl.gz")
  path.write_bytes(path.read_bytes()[:-9])
  with pytest.raises(ValueError, match=r"a\.jsonl\.gz cannot be read"):
    _load(path)


def test_a_prepared_tfds_dataset_is_read(tmp_path):
  features = {"instruction", "input", "output"}

  class TinyInstructions(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
      return tfds.core.DatasetInfo(
        builder=self,
        features=tfds.features.FeaturesDict(
          {name: tfds.features.Text() for name in features}
        ),
      )

    def _split_generators(self, dl_manager):
      return {"train": self._generate_examples()}

    def _generate_examples(self):
      for i in range(4):
        yield i, {"instruction": f"é{i}", "input": "", "output": f"{i}"}

  with pytest.raises(
    RuntimeError, match=r"'tiny_instructions' cannot be read from .* Prepare it"
  ):
    _load("tfds:tiny_instructions", data_dir=tmp_path)
  TinyInstructions(
    data_dir=tmp_path, file_format="array_record"
  ).download_and_prepare()
  rows = _load("tfds:tiny_instructions", data_dir=tmp_path)
  assert sorted(rows) == [_turns(f"é{i}", f"{i}") for i in range(4)]


def _saved(role, content, **more):
  return {"role": role, "content": content, **more}


CALLS = [{"function": {"name": "clock", "arguments": {}}}]


@pytest.mark.parametrize(
  ("row", "wanted"),
  [
    ({"prompt": "a", "completion": "b"}, _turns("a", "b")),
    (
      {
        "prompt": [_saved("user", "a")],
        "completion": [_saved("assistant", "b")],
      },
      _turns("a", "b"),
    ),
    (
      {
        "conversations": [
          {"from": "system", "value": "s"},
          {"from": "human", "value": "a"},
          {"from": "gpt", "value": "b", "weight": 1},
        ]
      },
      (Message("system", "s"), *_turns("a", "b")),
    ),
    ({"text": "All of it.", "id": 3}, (Message("text", "All of it."),)),
    (
      {
        "messages": [
          _saved(
            "user",
            [{"type": "text", "text": "a"}, {"type": "text", "text": "!"}],
          ),
          _saved("assistant", "b"),
        ]
      },
      _turns("a!", "b"),
    ),
    (
      {
        "messages": [
          _saved("user", "a"),
          _saved("assistant", None, tool_calls=CALLS),
          _saved("tool", "noon", name="clock"),
          _saved("assistant", "b", tool_calls=None),
        ]
      },
      (
        Message("user", "a"),
        Message("assistant", "", (("tool_calls", CALLS),)),
        Message("tool", "noon", (("name", "clock"),)),
        Message("assistant", "b"),
      ),
    ),
  ],
)
def test_published_forms_of_a_row_are_read(row, wanted, tmp_path):
  assert _load(_write(tmp_path, row)) == [wanted]


@pytest.mark.parametrize(
  ("row", "message"),
  [
    (
      {"messages": [_saved("user", [{"type": "image_url"}])]},
      "no assistant message",
    ),
    (
      {
        "messages": [
          _saved("user", [{"type": "image_url"}]),
          _saved("assistant", "b"),
        ]
      },
      "the user's content has a part of the type 'image_url'; a part must be",
    ),
    ({"conversations": [{"from": "human"}]}, "conversations must be a list of"),
    (
      {
        "messages": [
          _saved("user", "a"),
          _saved("assistant", "", tool_calls=CALLS),
        ]
      },
      None,
    ),
    (
      {
        "messages": [
          _saved("user", "a"),
          _saved("assistant", "b"),
          _saved("tool", "c"),
          _saved("assistant", "b"),
        ]
      },
      "has the roles",
    ),
  ],
)
def test_forms_that_are_not_whole_are_refused(row, message, tmp_path):
  path = _write(tmp_path, row)
  if message is None:
    assert len(_load(path)) == 1  # a call is an answer to be learned
    return
  with pytest.raises(ValueError, match=rf"rows\.jsonl, line 1.*{message}"):
    _load(path)


def test_tables_of_other_forms_hold_conversations(tmp_path):
  rows = [{"prompt": f"{i}", "response": f"It is {i}."} for i in range(9)]
  wanted = _load(_write(tmp_path, *rows))
  parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
  assert _load(tmp_path / "rows.parquet") == wanted
  messages = json.dumps([_saved("user", "a"), _saved("assistant", "b")])
  path = tmp_path / "rows.csv"
  path.write_text('messages\n"' + messages.replace('"', '""') + '"\n')
  assert _load(path) == [_turns("a", "b")]


def test_few_rows_are_in_all_splits_and_that_is_said(tmp_path):
  rows = [{"prompt": f"{i}", "response": f"It is {i}."} for i in range(20)]
  found, notes = instructions.splits(str(_write(tmp_path, *rows)))
  assert {k: len(v) for k, v in found.items()} == {
    "train": 16,
    "validation": 2,
    "test": 2,
  }
  assert notes == [
    "Of 20 rows, 2 for validation and 2 for the test are held out, by a hash of"
    " the text; 16 remain for training."
  ]
  assert len({row for part in found.values() for _, row in part}) == 20


def test_the_splits_of_many_rows_are_those_of_a_share_of_hashes(tmp_path):
  path = _many(tmp_path)
  found, _ = instructions.splits(str(path))
  for split, rows in found.items():
    assert [row for _, row in rows] == _load(path, split, held_out=0.02)
    drawn = instructions.drawn(rows, 5, seed=3)
    assert drawn == _load(path, split, held_out=0.02, limit=5, seed=3)
  (tmp_path / "other").mkdir()
  own = _write(tmp_path / "other", {"prompt": "a", "response": "b"})
  found, notes = instructions.splits(
    str(path), validation=str(own), test=str(own)
  )
  assert (len(found["train"]), len(found["test"]), notes) == (1000, 1, [])
