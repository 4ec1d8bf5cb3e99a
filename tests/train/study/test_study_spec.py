"""What a study may not be, and the sentence that says so."""

import pytest

from train.errors import UsageError
from train.study import main, spec

LORA = {"name": "LoRA", "method": "lora"}
SAM = {"name": "SAM", "method": "lora_sam"}
RATES = {"learning_rate": [0.1, 0.2]}

BAD = {
  "a table": ({"tunning": {}}, "no table 'tunning'; perhaps tuning"),
  "one of many": ({"task": {"name": "snippets"}}, "written as [[task]]"),
  "a key": ({"defaults": {"rhoo": 1.0}}, "[defaults] has no key 'rhoo'"),
  "a type": (
    {"defaults": {"epochs": 1.5}},
    "epochs must be a whole number; got",
  ),
  "a choice": (
    {"method": [LORA | {"clip": "some"}]},
    "[[method]] 'LoRA': clip must be one of",
  ),
  "a range": (
    {"method": [LORA | {"learning_rate": -1.0}]},
    "'LoRA' on the task 'snippets': --learning-rate must be in [0",
  ),
  "a point": (
    {"method": [LORA | {"tune": {"learning_rate": [0.1, -1.0]}}]},
    "tuned with {'learning_rate': -1.0}: --learning-rate must be in [0",
  ),
  "no task": ({"task": []}, "there is no [[task]]"),
  "no method": ({"method": []}, "there is no [[method]]"),
  "a name": (
    {"method": [{"method": "lora"}]},
    "[[method]] name must be a text",
  ),
  "twice": (
    {"method": [LORA, LORA]},
    "LoRA/snippets: these are there more than once",
  ),
  "the task of a method": (
    {"method": [LORA | {"tasks": ["other"]}]},
    "tasks must be a list of some of snippets; got ['other']",
  ),
  "what the study sets": (
    {"method": [LORA | {"seed": 3}]},
    "seed cannot be set in a study: the study gives the seeds",
  ),
  "the budget": (
    {"method": [LORA | {"tune": {"learning_rate": [0.1, 0.2, 0.3]}}]},
    "tune has 3 points, and [tuning] gives each method 2 trials",
  ),
  "no budget": (
    {"method": [LORA | {"tune": RATES}], "tuning": None},
    "'LoRA' has a tune, but there is no [tuning]",
  ),
  "the tuning's seeds": (
    {
      "method": [LORA | {"tune": RATES}],
      "tuning": {"trials": 2, "seeds": [1, 100]},
    },
    "the seeds [1] are both final seeds and [tuning] seeds",
  ),
  "whose point": (
    {
      "method": [
        LORA | {"tune": {"learning_rate": [0.1, 0.2]}},
        SAM | {"point_of": "L"},
      ]
    },
    "point_of must name a tuned method, as METHOD or METHOD/TASK (here: "
    "LoRA/snippets); got 'L'",
  ),
  "a point of nobody's": (
    {"method": [LORA, SAM | {"point_of": "LoRA"}]},
    "(here: none); got 'LoRA'",
  ),
  "a point of another's, and its own": (
    {"method": [SAM | {"tune": RATES, "point_of": "LoRA"}]},
    "'SAM' may have tune or point_of; got both",
  ),
  "seeds": (
    {"method": [LORA | {"seeds": [1, 1]}]},
    "'LoRA' seeds must be their number, at most 100,000, or a list of dif",
  ),
  "the spaces": (
    {"sharpness": {"spaces": ["half"]}},
    "[sharpness] spaces must be some of full, lora; got ['half']",
  ),
  "the radii": (
    {"sharpness": {"radii": [0.0]}},
    "radii must be greater than 0",
  ),
  "a list": ({"sharpness": {"radii": 0.1}}, "radii must be a list of numbers"),
  "a label": (
    {"method": [LORA, SAM], "recovery": [{"reference": "LoRA"}]},
    "[[recovery]] target must be the name of a [[method]]: LoRA, SAM; got None",
  ),
  "the points": (
    {"landscape": {"points": 1}},
    "points must be at least 2, and at most 100,000; got 1",
  ),
  "the radius": (
    {"landscape": {"radius": 0.0}},
    "radius must be greater than 0",
  ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_run_is_refused_by_a_sentence(tables, tmp_path, name):
  change, sentence = BAD[name]
  # Without what would be refused for another reason.
  plain = {"recovery": None, "landscape": None, "method": [LORA]}
  with pytest.raises(UsageError) as error:
    spec.parse(tables(tmp_path, **(plain | change)))
  assert sentence in str(error.value)
  assert str(error.value).endswith(("?", "."))


def test_a_cell_has_the_fields_of_the_method_over_the_task_s(tables, tmp_path):
  found = spec.parse(
    tables(
      tmp_path,
      recovery=None,
      landscape=None,
      task=[
        {"name": "short", "task": "snippets", "epochs": 1, "seeds": [7]},
        {"name": "snippets", "rank": 2},
      ],
      method=[LORA | {"rank": 3}, SAM | {"tasks": ["snippets"], "seeds": 3}],
    )
  )
  cells = {
    x.name: (x.config.optimisation.epochs, x.config.adapter.rank, x.seeds)
    for x in found.cells
  }
  assert cells == {
    "LoRA/short": (1, 3, (7,)),
    "LoRA/snippets": (2, 3, (0, 1)),
    "SAM/snippets": (2, 2, (0, 1, 2)),
  }
  names = [x.name for x in main.select(found, "LoRA/,/snippets")]
  assert names == list(cells)
  with pytest.raises(UsageError, match="--only must name some of LoRA/short"):
    main.select(found, "SAM/short")


def test_only_knows_labels_with_commas(tables, tmp_path):
  wide = LORA | {"name": "LoRA, wide", "rank": 5}
  plain = {"recovery": None, "landscape": None}
  found = spec.parse(tables(tmp_path, method=[LORA, wide, SAM], **plain))
  for only, wanted in {
    "LoRA, wide": ["LoRA, wide"],
    "SAM,LoRA, wide/snippets": ["SAM", "LoRA, wide"],
    "LoRA,SAM": ["LoRA", "SAM"],
  }.items():
    assert [x.label for x in main.select(found, only)] == wanted
  for wrong in ("LoRA,", "LoRA, wider", "wide"):
    with pytest.raises(
      UsageError, match="--only must name some of LoRA/snippets"
    ):
      main.select(found, wrong)
