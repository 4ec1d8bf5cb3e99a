"""Runs of the program on a decoder: label words, and instructions."""

import json
import math
import shutil

import jax
import numpy as np
import outcomes
from outcomes import adapters, rows
import pytest
import qwix
import safetensors

from train import __main__ as program
from train.finished import finished as finished_lib
from train.models.family import Pretrained
from train.run import memory

pytestmark = pytest.mark.slow

# Each mesh, and each part of a batch, adds up in another order.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def conversations(tmp_path_factory, snippets):
  """Questions about the snippets, and answers that can be learned."""
  path = tmp_path_factory.mktemp("jsonl") / "conversations.jsonl"
  with path.open("w") as file:
    for i, snippet in enumerate(snippets):
      words = snippet.sentence.split()[:6]
      answer = "It is good." if snippet.rating > 0 else "It is bad."
      row = {"prompt": f"{i}: {' '.join(words)}?", "response": answer}
      file.write(json.dumps(row) + "\n")
  return path


@pytest.fixture(scope="module")
def options(tiny_decoder, conversations, data_dir):
  """Of a short run on the conversations; later options win."""
  return [
    *("--task", "instructions", "--data", str(conversations)),
    *("--model", str(tiny_decoder), "--data-dir", str(data_dir)),
    *("--batch-size", "8", "--max-length", "128", "--train-rows", "160"),
    *("--epochs", "2", "--rank", "4", "--auxiliary-rank", "4"),
    *("--learning-rate", "0.03", "--log-every", "1"),
    # Kernels that are split otherwise; each one more is compiled in every run.
    *("--targets", ".*/(q_proj|down_proj)(/kernel)?"),
    "--no-compilation-cache",
  ]


@pytest.fixture(scope="module")
def run(options):
  def run_here(folder, *more):
    return outcomes.main([*options, "--run-dir", str(folder), *more])

  return run_here


@pytest.fixture(scope="module")
def finished(tmp_path_factory, run):
  folder = tmp_path_factory.mktemp("language") / "run"
  assert run(folder) == 0
  return folder


def test_instructions_are_learned_and_reported(finished):
  losses = _losses(finished)
  assert losses[-1] < 0.7 * losses[0]
  results = json.loads((finished / "results.json").read_text())
  assert results["metric"] == "perplexity"
  test = results["test"]
  assert test["perplexity"] == pytest.approx(np.exp(test["loss"]))
  assert test["unit"] == "tokens"
  assert test["accuracy_95"] is None
  report = (finished / "report.md").read_text()
  assert "test tokens" in report
  assert "Wilson" not in report


def _losses(folder):
  return [row["loss"] for row in rows(folder) if "loss" in row]


def _assert_same_run(left, right):
  np.testing.assert_allclose(
    _losses(left), _losses(right), rtol=0, atol=TOLERANCE
  )
  ours, theirs = adapters(left), adapters(right)
  for name in ours:
    np.testing.assert_allclose(
      ours[name], theirs[name], rtol=0, atol=TOLERANCE, err_msg=name
    )


def test_parts_of_a_batch_and_less_memory_do_not_change_a_run(
  run, finished, tmp_path
):
  folder = tmp_path / "run"
  assert run(folder, "--accumulate", "4", "--remat", "dots") == 0
  _assert_same_run(folder, finished)


def test_scanned_layers_train_alike_on_a_mesh(run, finished, tmp_path):
  one, mesh = (tmp_path / name for name in ("one", "mesh"))
  more = ("--scan-layers", "--remat", "full", "--epochs", "1")
  assert run(one, *more) == 0
  # New adapters are other draws, but leave the model as it is.
  np.testing.assert_allclose(_losses(one)[0], _losses(finished)[0], rtol=1e-5)
  layout = "data=2,fsdp=2,tensor=2"
  assert run(mesh, *more, "--mesh", layout, "--accumulate", "2") == 0
  _assert_same_run(mesh, one)


def test_devices_that_share_rows_train_alike_and_answer(
  run, finished, tmp_path
):
  folder = tmp_path / "run"
  more = ("--mesh", "data=2,context=2,tensor=2", "--samples", "2")
  assert run(folder, *more) == 0
  _assert_same_run(folder, finished)
  assert (folder / "samples.jsonl").read_text().splitlines()


def test_a_quantised_base_learns_the_same_on_a_mesh(run, finished, tmp_path):
  one, mesh = (tmp_path / name for name in ("one", "mesh"))
  assert run(one, "--base-dtype", "nf4") == 0
  ours, theirs = _losses(one), _losses(finished)
  # Other weights, by up to a tenth, so another loss; it falls all the same.
  assert abs(ours[0] - theirs[0]) > 1e-4
  assert ours[-1] < 0.7 * ours[0]
  layout = "data=2,fsdp=2,tensor=2"
  assert run(mesh, "--base-dtype", "nf4", "--mesh", layout) == 0
  _assert_same_run(mesh, one)


@pytest.fixture(scope="module")
def in_four_bits(tmp_path_factory, run):
  """A run in bfloat16 on a quantised base, with samples and a profile."""
  folder = tmp_path_factory.mktemp("four_bits") / "run"
  dtypes = ("--base-dtype", "nf4", "--dtype", "bfloat16")
  more = ("--eval-rows", "4", "--samples", "2", "--profile", "2")
  assert run(folder, *dtypes, "--epochs", "1", *more) == 0
  return folder


def test_what_generates_is_stored_and_computed_in_as_the_run_was(
  in_four_bits, monkeypatch, capsys
):
  samples = (in_four_bits / "samples.jsonl").read_text().splitlines()
  assert len(samples) == 2 and json.loads(samples[0])["answer"]
  made = []
  variables = Pretrained.variables

  def recorded(self, model, *args, **kwargs):
    made.append((model, variables(self, model, *args, **kwargs)))
    return made[-1][1]

  monkeypatch.setattr(Pretrained, "variables", recorded)
  _says(capsys, "--run", str(in_four_bits), "--prompt", "7: a film?")
  ((model, found),) = made
  assert model.dtype == "bfloat16"
  layer = found["params"]["layers_0"]["mlp"]["down_proj"]["kernel"]
  assert isinstance(layer, qwix.QArray)
  assert found["params"]["norm"]["scale"].dtype == "bfloat16"


def test_a_profile_is_written_when_asked_for(in_four_bits):
  assert list((in_four_bits / "profile").rglob("*.xplane.pb"))


@pytest.fixture(scope="module")
def of_snippets(tmp_path_factory, run):
  """A run on a labelled task, validated before the first step."""
  folder = tmp_path_factory.mktemp("snippets") / "run"
  more = ("--task", "snippets", "--data", "", "--max-length", "96")
  more += ("--train-rows", "64", "--epochs", "4")
  assert run(folder, *more, "--eval-rows", "8", "--eval-first") == 0
  return folder


def test_a_decoder_answers_snippets_in_words(of_snippets):
  losses = _losses(of_snippets)
  assert np.mean(losses[-4:]) < np.mean(losses[:4])
  results = json.loads((of_snippets / "results.json").read_text())
  assert results["metric"] == "accuracy"
  assert results["baseline"] is not None


def test_what_is_held_out_can_be_few_rows_and_seen_before_training(of_snippets):
  results = json.loads((of_snippets / "results.json").read_text())
  assert results["test"]["rows"] == 8
  validated = [x["step"] for x in rows(of_snippets) if "validation_loss" in x]
  assert validated == [0, 8, 16, 24, 32]


@pytest.mark.parametrize(
  ("line", "part"),
  [
    ("{", "line 3, is not JSON"),
    ('{"prompt": "a"}', "line 3"),
    ('{"prompt": "a", "response": ""}', "line 3"),
  ],
)
def test_a_row_that_cannot_be_is_named_by_its_line(
  run, tmp_path, capsys, line, part
):
  path = tmp_path / "bad.jsonl"
  good = '{"prompt": "a", "response": "b"}\n'
  path.write_text(2 * good + line + "\n")
  assert run(tmp_path / "run", "--data", str(path)) == 2
  (error,) = capsys.readouterr().err.splitlines()
  assert part in error
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
  ("more", "part"),
  [
    (("--data", ""), "--data gives the rows"),
    (("--task", "snippets"), "no other task takes it"),
    (("--data", "no/such.jsonl"), "no/such.jsonl"),
    (("--method", "full"), "--rank is an option of adapters"),
    (
      ("--max-length", "24", "--on-long", "error"),
      "tokens, but --max-length is 24",
    ),
    (("--max-length", "8"), "160 were left out because they have more than 8"),
    (("--accumulate", "3"), "multiple of --accumulate; got 8 and 3"),
    (("--max-length", "2048"), "2048"),
  ],
  ids=lambda x: " ".join(x) if isinstance(x, tuple) else None,
)
def test_what_cannot_be_run_is_refused_in_a_sentence(
  run, tmp_path, capsys, more, part
):
  assert run(tmp_path / "run", *more) == 2
  (error,) = capsys.readouterr().err.splitlines()
  assert part in error
  assert not (tmp_path / "run").exists()


def test_a_missing_shard_is_named(run, tmp_path, tiny_decoder, capsys):
  folder = shutil.copytree(tiny_decoder, tmp_path / "model")
  (folder / "model-00002-of-00002.safetensors").unlink()
  assert run(tmp_path / "run", "--model", str(folder)) == 2
  assert "model-00002-of-00002" in capsys.readouterr().err


def test_an_encoder_cannot_respond(run, tmp_path, tiny_model, capsys):
  assert run(tmp_path / "run", "--model", str(tiny_model)) == 2
  assert "holds conversations (decoder)" in capsys.readouterr().err


def _widen(folder, inner):
  """Gives a tiny decoder an inner width; its files have holes for weights."""
  config = json.loads((folder / "config.json").read_text())
  narrow, config["intermediate_size"] = config["intermediate_size"], inner
  (folder / "config.json").write_text(json.dumps(config))
  for path in folder.glob("*.safetensors"):
    with safetensors.safe_open(path, "np") as file:
      shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    header, end = {}, 0
    for name, shape in shapes.items():
      wide = [inner if size == narrow else size for size in shape]
      start, end = end, end + 4 * math.prod(wide)
      header[name] = {
        "dtype": "F32",
        "shape": wide,
        "data_offsets": [start, end],
      }
    text = json.dumps(header).encode()
    with path.open("wb") as file:
      file.write(len(text).to_bytes(8, "little") + text)
      file.truncate(8 + len(text) + end)


def test_a_model_that_cannot_fit_is_refused_before_it_is_read(
  run, tmp_path, tiny_decoder, capsys, monkeypatch
):
  monkeypatch.setattr(memory, "_room", lambda: 2**28)
  folder = shutil.copytree(tiny_decoder, tmp_path / "model")
  _widen(folder, 2**21)
  assert run(tmp_path / "run", "--model", str(folder)) == 2
  (error,) = capsys.readouterr().err.splitlines()
  # Two layers, three kernels of width 16, in float32.
  size = 2 * 3 * 16 * 2**21 * 4 / 2**30
  assert f"the model does not fit: its weights take {size:,.2f} GiB" in error
  assert not (tmp_path / "run").exists()


def _says(capsys, *arguments):
  assert program.main(["generate", *arguments, "--max-new-tokens", "8"]) == 0
  return capsys.readouterr().out


def test_a_run_is_heard_with_its_adapters(finished, tiny_decoder, capsys):
  prompt = ("--prompt", "7: a film?", "8: another film, much longer?")
  model = ("--model", str(tiny_decoder))
  plain = _says(capsys, *model, *prompt)
  tuned = _says(capsys, "--run", str(finished), *prompt)
  assert plain.count("> ") == tuned.count("> ") == 2
  assert plain != tuned
  # Prompts are answered together as each would be alone.
  alone = _says(capsys, *model, *prompt[:2])
  assert plain.startswith(alone.rstrip())


@pytest.mark.parametrize(
  ("arguments", "part"),
  [
    ((), "--model or --run must name the weights"),
    (("--run", "no/such"), "no/such does not exist"),
    (("--model", "no-such"), "There is no folder 'no-such'"),
    (
      ("--model", "{model}", "--top-p", "0", "--max-new-tokens", "4"),
      "--top-p must be in (0",
    ),
    (("--model", "{model}", "--max-new-tokens", "1000"), "positions"),
    (("--model", "{encoder}"), "an encoder does not generate"),
  ],
)
def test_what_cannot_be_said_is_refused(
  tiny_decoder, tiny_model, capsys, arguments, part
):
  names = {"model": tiny_decoder, "encoder": tiny_model}
  arguments = [x.format(**names) for x in arguments]
  assert program.main(["generate", "--prompt", "a", *arguments]) == 2
  (error,) = capsys.readouterr().err.splitlines()
  assert part in error


def test_conversations_are_evaluated_and_have_no_labels(
  finished, conversations, tmp_path, capsys
):
  run = ("--run", str(finished))
  out = tmp_path / "found.json"
  assert program.main(["evaluate", *run, "--json", str(out)]) == 0
  results = json.loads((finished / "results.json").read_text())
  assert json.loads(out.read_text()) == results["test"]
  capsys.readouterr()
  assert program.main(["evaluate", *run, "--data", str(conversations)]) == 0
  assert "perplexity" in capsys.readouterr().out
  assert program.main(["predict", *run, "--text", "a"]) == 2
  (error,) = capsys.readouterr().err.splitlines()
  assert "generate --run" in error
  base = ("--out", str(tmp_path / "out"), "--base-model", "some/base")
  assert program.main(["export", *run, *base]) == 0
  card = (tmp_path / "out" / "README.md").read_text()
  assert "AutoModelForCausalLM" in card and "apply_chat_template" in card


def test_a_run_is_heard_in_its_own_dtypes(in_four_bits, capsys):
  opened = finished_lib.open_run(in_four_bits)
  params = opened.variables["params"]
  assert params["embed_tokens"]["embedding"].dtype == "bfloat16"
  kernel = params["layers_0"]["mlp"]["down_proj"]["kernel"]
  assert not isinstance(kernel, jax.Array)  # but one in four bits
  capsys.readouterr()
  run = ("--run", str(in_four_bits))
  assert "> hello" in _says(capsys, *run, "--prompt", "hello")
