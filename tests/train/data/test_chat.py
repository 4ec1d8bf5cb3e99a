"""Chat templates: exact prompts, and a loss on the responses alone."""

import itertools
import json

import byte_level
from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest
import tokenizers
from tokenizers import models, normalizers

from train.data import chat
from train.errors import UsageError
from train.models.io import template as templates
from train.models.io.template import Message

CHATML = (
  "{% for message in messages %}"
  "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] }}"
  "{{ '<|im_end|>' + '\n' }}"
  "{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TOKENIZER = byte_level.train(
  ["### Instruction: ### Response: user assistant system the cat sat\n"] * 3,
  ["<s>", "</s>", "<|im_start|>", "<|im_end|>"],
)
IM_END = TOKENIZER.token_to_id("<|im_end|>")
END = TOKENIZER.token_to_id("</s>")
ONE_TURN = (Message("user", "the cat?"), Message("assistant", "sat"))
TWO_TURNS = (
  Message("system", "be brief"),
  *ONE_TURN,
  Message("user", "the mat?"),
  Message("assistant", "no"),
)


def _encode(conversation, template=CHATML, max_length=1000, eos=IM_END, **rest):
  if isinstance(template, str):
    template = templates.Template(template, "<s>", "</s>")
  return chat.encode(
    TOKENIZER, template, conversation, max_length, eos=eos, **rest
  )


def _pieces(ids, loss, tokenizer=TOKENIZER):
  """(whether it is learned, its text) of each run of tokens."""
  return [
    (learned, byte_level.decode(tokenizer, [token for token, _ in run]))
    for learned, run in itertools.groupby(zip(ids, loss), lambda pair: pair[1])
  ]


def test_every_turn_of_the_assistant_is_learned_up_to_its_end():
  assert _pieces(*_encode(TWO_TURNS)) == [
    (
      False,
      "<|im_start|>system\nbe brief<|im_end|>\n"
      "<|im_start|>user\nthe cat?<|im_end|>\n<|im_start|>assistant\n",
    ),
    (True, "sat<|im_end|>"),
    (
      False,
      "\n<|im_start|>user\nthe mat?<|im_end|>\n<|im_start|>assistant\n",
    ),
    (True, "no<|im_end|>"),
    (False, "\n"),
  ]


def test_the_plain_template_is_for_base_models():
  assert _pieces(*_encode(TWO_TURNS, templates.PLAIN, eos=END)) == [
    (
      False,
      "<s>be brief\n\n### Instruction:\nthe cat?\n\n### Response:\n",
    ),
    (True, "sat</s>"),
    (False, "### Instruction:\nthe mat?\n\n### Response:\n"),
    (True, "no</s>"),
  ]


def test_without_its_end_a_turn_is_learned_whole_and_the_last_is_ended():
  without = templates.Template(templates.PLAIN)
  pieces = _pieces(*_encode(TWO_TURNS, without, eos=END))
  assert [text for learned, text in pieces if learned] == [
    "sat\n\n",
    "no\n\n</s>",
  ]
  pieces = _pieces(*_encode(TWO_TURNS, without, eos=None))
  assert pieces[-1] == (True, "no\n\n")


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(
  str.strip
)


@settings(max_examples=60, deadline=None)
@given(
  asked=texts,
  answered=texts,
  template=st.sampled_from(
    [
      CHATML,
      templates.PLAIN,
      "{% for m in messages %}{{ m.content }} {% endfor %}",
    ]
  ),
)
def test_the_prompt_is_tokenized_as_it_will_be_when_it_is_asked(
  asked, answered, template
):
  conversation = Message("user", asked), Message("assistant", answered)
  ids, loss = _encode(conversation, template, 10_000, eos=None)
  prompt = templates.Template(template, "<s>", "</s>").render(
    conversation[:1], add_generation_prompt=True
  )
  alone = TOKENIZER.encode(prompt, add_special_tokens=False).ids
  assert ids[: len(alone)] == alone
  # The first token of all has nothing to be predicted from.
  assert loss == [i >= max(len(alone), 1) for i in range(len(ids))]
  assert byte_level.decode(TOKENIZER, ids[len(alone) :]).startswith(answered)


def test_a_token_across_the_boundary_is_not_used():
  # "The prompt ends in a space" and " the" is one token of this tokenizer.
  template = "{% for m in messages %}{{ m.content }}{% endfor %}"
  conversation = Message("user", "x: "), Message("assistant", "the cat")
  assert len(TOKENIZER.encode(" the").ids) == 1
  assert _pieces(*_encode(conversation, template, eos=None)) == [
    (False, "x: "),
    (True, "the cat"),
  ]


def test_no_space_is_put_before_a_response_by_the_tokenizer():
  words = ["<unk>", "\u2581ask", "\u2581it", "\u2581say", "say", "\u2581"]
  tokenizer = tokenizers.Tokenizer(
    models.Unigram([(word, -1.0) for word in words], unk_id=0)
  )
  tokenizer.normalizer = normalizers.Sequence(
    [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
  )
  template = templates.Template(
    "{% for m in messages %}"
    "{{ m.content if m.role == 'user' else ' ' + m.content }}{% endfor %}"
  )
  conversation = Message("user", "ask it"), Message("assistant", "say it")
  ids, loss = chat.encode(tokenizer, template, conversation, 9)
  assert [words[i] for i in ids] == [
    "\u2581ask",
    "\u2581it",
    "\u2581say",
    "\u2581it",
  ]
  assert loss == [False, False, True, True]


def test_the_first_token_of_all_is_not_learned():
  template = "{{ messages[1:] | map(attribute='content') | join }}"
  ids, loss = _encode(ONE_TURN, template, eos=None)
  assert byte_level.decode(TOKENIZER, ids) == "sat"
  assert loss == [False] + [True] * (len(ids) - 1)


def test_what_is_too_long_is_cut_skipped_or_refused():
  ids, loss = _encode(ONE_TURN)
  prompt = loss.index(True)
  fits = len(ids)
  for on_long in ("cut", "skip", "error"):
    whole = _encode(ONE_TURN, max_length=fits, on_long=on_long)
    assert whole == (ids, loss)
  for length in range(prompt + 1, fits):
    cut = _encode(ONE_TURN, max_length=length)
    assert cut == (ids[:length], loss[:length])
    assert _encode(ONE_TURN, max_length=length, on_long="skip") is None
  assert _encode(ONE_TURN, max_length=prompt) is None  # no response is left
  with pytest.raises(
    ValueError,
    match=rf"has {fits} tokens, but --max-length is {fits - 1}; give a larger",
  ):
    _encode(ONE_TURN, max_length=fits - 1, on_long="error")
  with pytest.raises(ValueError, match="max_length must be at least 1; got 0"):
    _encode(ONE_TURN, max_length=0)


def test_sequences_hold_all_conversations_and_count_the_skipped():
  template = templates.Template(CHATML)
  encoded = [_encode(ONE_TURN), _encode(TWO_TURNS)]
  found = chat.tokenize(
    [ONE_TURN, TWO_TURNS, ONE_TURN], TOKENIZER, template, 1000, eos=IM_END
  )
  assert (len(found), found.skipped) == (3, 0)
  for i, (ids, loss) in enumerate([*encoded, encoded[0]]):
    row = slice(found.offsets[i], found.offsets[i + 1])
    np.testing.assert_array_equal(found.tokens[row], ids)
    np.testing.assert_array_equal(found.loss[row], loss)
  assert found.tokens.dtype == np.int32
  assert found.lengths.sum() == len(found.tokens)
  short = len(encoded[0][0])
  found = chat.tokenize(
    [ONE_TURN, TWO_TURNS, ONE_TURN], TOKENIZER, template, short, on_long="skip"
  )
  assert (len(found), found.skipped) == (2, 1)
  with pytest.raises(ValueError, match="1 were left out because they have"):
    chat.tokenize([TWO_TURNS], TOKENIZER, template, 3)


@pytest.mark.parametrize(
  "template",
  [
    "{{ messages|length }} messages" + CHATML,
    "{{ messages[-1].content }}",
    CHATML + "{% if add_generation_prompt %}<think>{% endif %}",
  ],
)
def test_a_template_that_changes_what_it_wrote_is_refused(template):
  with pytest.raises(ValueError, match="must only append"):
    _encode(TWO_TURNS, template)


@pytest.mark.parametrize(
  ("template", "message"),
  [
    ("{% for %}", "not one that Jinja can read: Expected"),
    ("{{ raise_exception('no system') }}", "system, user: no system"),
    ("{{ messages[0].content + 1 }}", "does not take a conversation of system"),
    ("{{ ''.__class__.__mro__ }}", "unsafe"),  # the sandbox
    ("{{ messages.append(1) }}", "does not take"),  # and it is immutable
    ("prompt", "writes nothing for the response 'sat'"),
  ],
)
def test_a_template_that_cannot_be_used_is_refused(template, message):
  with pytest.raises(ValueError, match=message):
    _encode(TWO_TURNS, template)


@pytest.mark.parametrize(
  ("template", "text"),
  [
    ("{% for m in messages %}{% break %}{% endfor %}x", "x"),
    ("{{ messages[0] | tojson }}", '{"role": "user", "content": "<é>"}'),
    ("{{ [1] | tojson(indent=1) }}", "[\n 1\n]"),
    ("{{ strftime_now('%d %b %Y') }}", "26 Jul 2024"),  # on any day
    ("{% generation %}{{ 1 }}{% endgeneration %}2", "12"),
    ("  {% if true %}\nx\n  {% endif %}\n", "x\n"),
    ("{% set ns = namespace(a=1) %}{% set ns.a = 2 %}{{ ns.a }}", "2"),
    ("{{ bos_token }}{% if tools %}1{% endif %}{{ eos_token }}", "<s></s>"),
    ("{% if date_string is not defined %}y{% endif %}", "y"),
  ],
)
def test_templates_find_what_they_are_published_for(template, text):
  conversation = (Message("user", "<é>"),)
  assert (
    templates.Template(template, "<s>", "</s>").render(conversation) == text
  )


@pytest.mark.parametrize(
  ("config", "expected"),
  [
    ({"chat_template": "a"}, templates.Template("a")),
    (
      {
        "chat_template": [
          {"name": "tool_use", "template": "b"},
          {"name": "default", "template": "a"},
        ],
        "bos_token": {"content": "<s>"},
        "eos_token": "</s>",
      },
      templates.Template("a", "<s>", "</s>"),
    ),
    ({"bos_token": None}, templates.Template(templates.PLAIN)),
    (None, templates.Template(templates.PLAIN)),
  ],
)
def test_a_folder_has_a_template_or_gets_the_plain_one(
  config, expected, tmp_path
):
  if config is not None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
  assert templates.load_template(tmp_path) == expected


def test_a_template_may_have_a_file_of_its_own(tmp_path):
  (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
  (tmp_path / "chat_template.jinja").write_text("é", encoding="utf-8")
  assert templates.load_template(tmp_path) == templates.Template(
    "é", "", "</s>"
  )


def test_a_processor_s_template_is_read_where_the_tokenizer_has_none(tmp_path):
  processor = tmp_path / "chat_template.json"
  processor.write_text('{"chat_template": "a"}')
  assert templates.load_template(tmp_path) == templates.Template("a")
  (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "b"}')
  assert templates.load_template(tmp_path) == templates.Template("b")
  (tmp_path / "tokenizer_config.json").unlink()
  processor.write_text("{}")
  with pytest.raises(UsageError, match=r"chat_template\.json.*chat_template"):
    templates.load_template(tmp_path)


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("{", "tokenizer_config.json is not JSON in UTF-8"),
    (
      '{"chat_template": [{"name": "rag", "template": "a"}]}',
      "has chat templates named rag; one of them must be named default",
    ),
  ],
)
def test_a_broken_tokenizer_config_is_refused(text, message, tmp_path):
  (tmp_path / "tokenizer_config.json").write_text(text)
  with pytest.raises(ValueError, match=message):
    templates.load_template(tmp_path)


def test_a_plain_text_is_learned_whole():
  ids, loss = _encode((Message("text", "the cat sat"),))
  assert byte_level.decode(TOKENIZER, ids) == "the cat sat<|im_end|>"
  assert loss == [False, *[True] * (len(ids) - 1)]
  ids, loss = _encode((Message("text", "the cat sat"),), max_length=2)
  assert loss == [False, True]


CALL = (("tool_calls", [{"function": {"name": "clock"}}]),)
WITH_TOOLS = (
  Message("user", "when?"),
  Message("assistant", "", CALL),
  Message("tool", "noon"),
  Message("assistant", "At 12."),
)
TOOLS = CHATML.replace(
  "{{ '<|im_end|>'",
  "{% for call in message.tool_calls %}[{{ call.function.name }}]{% endfor %}"
  "{{ '<|im_end|>'",
)


def test_calls_of_tools_are_learned_and_their_answers_are_not():
  assert _pieces(*_encode(WITH_TOOLS, TOOLS)) == [
    (False, "<|im_start|>user\nwhen?<|im_end|>\n<|im_start|>assistant\n"),
    (True, "[clock]<|im_end|>"),
    (False, "\n<|im_start|>tool\nnoon<|im_end|>\n<|im_start|>assistant\n"),
    (True, "At 12.<|im_end|>"),
    (False, "\n"),
  ]


@pytest.mark.parametrize(
  ("template", "lost"),
  [
    (CHATML, "clock"),
    (
      TOOLS.replace(
        "message['content']",
        "(message.content if message.role != 'tool' else '')",
      ),
      "noon",
    ),
  ],
)
def test_a_template_without_tools_is_refused(template, lost):
  with pytest.raises(
    ValueError, match=rf"leaves out a part .*'{lost}'.*--chat-templ"
  ):
    _encode(WITH_TOOLS, template)
