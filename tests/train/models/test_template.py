"""Chat templates of strangers: limits that hold, and texts that stay."""

import json

from jinja2 import ext, sandbox
import pytest

from train.models.io import renderer, rendering
from train.models.io.template import Message, Template

TALK = (
  Message("system", "Be brief."),
  Message("user", "  What is <b>é</b>?"),
  Message("assistant", "A letter.\n"),
  Message("user", "And \\?"),
)
_CALLS = (
  "{% macro f(n) %}{% if n %}{{ f(n-1) ~ f(n-1) }}{% endif %}{% endmacro %}"
)


@pytest.mark.parametrize(
  ("source", "fault"),
  [
    (
      "{% for a in range(9999) %}" * 3 + "{% endfor %}" * 3,
      "takes more than 2 seconds",
    ),
    (_CALLS + "{{ f(60) }}", "takes more than 2 seconds"),
    (
      "{% set n = namespace(x=[1]) %}{% for i in range(60) %}"
      "{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}",
      "takes more than 2 seconds",
    ),
    (
      "{{ f }}{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
      "without an end",
    ),
    ("{{ 'a' * 3000000000 }}", r"'a' \* 3000000000 is too large"),
    ("{{ (9**999)**999 }}", "is too large"),
    ("{{ 'a'.center(3000000000) }}", "too much memory"),
    ("{{ 'a' | center(3000000000) }}", "too much memory"),
    ("{{ '%3000000000d' % 1 }}", "too much memory"),
    (
      "{% set n = namespace(x='ab') %}{% for i in range(60) %}"
      "{% set n.x = n.x ~ n.x %}{% endfor %}",
      "(too much memory|more than 2 seconds)",
    ),
    (
      "{% for a in range(9999) %}{{ 'aaaaaaaa' * 9999 }}{% endfor %}",
      "more than 16,777,216 characters",
    ),
    ("{{ range(10**9) | list }}", "Range too big"),
    ("{{ 1 / 0 }}", "division by zero"),
    ("{{ '\\ud800' }}", "half of a surrogate pair"),
    ("{% include 'x' %}", "no loader"),
    ("{{ messages | nothing }}", "No filter named 'nothing'"),
  ],
)
def test_what_a_template_may_not_do_is_one_sentence(source, fault):
  with pytest.raises(
    ValueError, match=f"does not take a conversation of system, user.*{fault}"
  ):
    Template(source).render(TALK)
  assert Template("{{ messages | length }}").render(TALK) == "4"


@pytest.mark.parametrize(
  ("source", "fault"),
  [
    ("{{ " + "(" * 10_000 + "1" + ")" * 10_000 + " }}", "too deep"),
    ("a" * 2_000_000, "2,000,000 characters; at most 1,048,576 are read"),
  ],
)
def test_a_template_that_is_too_large_is_not_read(source, fault):
  with pytest.raises(ValueError, match=fault):
    Template(source)


# ruff: noqa: E501
# As they are published, the tools of the last two left out.
_PUBLISHED = {
  "SmolLM2": (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] !="
    " 'system' %}{{ '<|im_start|>system\nYou are a helpful AI assistant named"
    " SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>'"
    " + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{%"
    " endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%"
    " endif %}"
  ),
  "Llama 3": (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set"
    " content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n"
    "\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{%"
    " set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{{"
    " '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
  ),
  "Gemma": (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set messages ="
    " messages[1:] %}{% endif %}{% for message in messages %}{% if"
    " (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{"
    " raise_exception('Conversation roles must alternate') }}{% endif %}{% if"
    " (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{%"
    " set role = message['role'] %}{% endif %}{{ '<start_of_turn>' + role + '\n'"
    " + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}{% if"
    " add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
  ),
  "Qwen 2.5": (
    "{%- if messages[0]['role'] == 'system' %}\n    {{- '<|im_start|>system\\n'"
    " + messages[0]['content'] + '<|im_end|>\\n' }}\n{%- else %}\n    {{-"
    " '<|im_start|>system\\nYou are Qwen.<|im_end|>\\n' }}\n{%- endif %}\n{%- for"
    ' message in messages %}\n    {%- if (message.role == "user") or'
    ' (message.role == "system" and not loop.first) or (message.role =='
    " \"assistant\" and not message.tool_calls) %}\n        {{- '<|im_start|>' +"
    " message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}\n    {%-"
    " endif %}\n{%- endfor %}\n{%- if add_generation_prompt %}\n    {{-"
    " '<|im_start|>assistant\\n' }}\n{%- endif %}\n"
  ),
}


@pytest.mark.parametrize("name", _PUBLISHED)
@pytest.mark.parametrize("prompt", [False, True])
def test_published_templates_write_what_jinja_writes(name, prompt):
  plain = sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[ext.loopcontrols]
  )
  expected = plain.from_string(_PUBLISHED[name]).render(
    messages=[{"role": x.role, "content": x.content} for x in TALK],
    add_generation_prompt=prompt,
    bos_token="<s>",
    eos_token="</s>",
  )
  assert "é</b>?" in expected
  template = Template(_PUBLISHED[name], "<s>", "</s>")
  assert template.render(TALK, prompt) == expected


def test_texts_are_rendered_up_to_the_first_that_fails():
  source = "{{ 1 / (messages | length - 2) }}"
  variables = [{"messages": [0] * n} for n in (1, 3, 2, 4)]
  texts, fault = rendering.render(source, variables)
  assert texts == ["-1.0", "1.0"]
  assert "division by zero" in fault


def test_a_process_that_is_gone_is_started_again():
  template = Template("{{ messages[0].content }}")
  assert template.render(TALK) == "Be brief."
  rendering._renderer._process.kill()
  rendering._renderer._process.wait()
  assert template.render(TALK) == "Be brief."


def test_an_answer_that_nobody_read_is_not_the_next_ones(monkeypatch):
  template = Template("{{ messages[0].content }}")

  def interrupted(text):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(rendering.json, "loads", interrupted)
    with pytest.raises(KeyboardInterrupt):
      template.render((Message("user", "first"),))
  assert template.render((Message("user", "second"),)) == "second"


def test_the_process_imports_nothing_of_the_program():
  text = Template("{{ messages | length }}").render(TALK)
  assert text == "4"
  with open(renderer.__file__) as file:
    assert "from ." not in file.read()


def test_a_run_with_such_a_template_says_so_and_writes_nothing(
  run, tiny_decoder, tmp_path, capsys
):
  rows = tmp_path / "rows.jsonl"
  row = {"prompt": "what is {}?", "response": "it is {}."}
  rows.write_text(
    "\n".join(json.dumps(row).replace("{}", str(i)) for i in range(40))
  )
  template = tmp_path / "template.jinja"
  template.write_text("{{ 'a' * 3000000000 }}")
  code = run(
    tmp_path / "run",
    *("--task", "instructions", "--data", str(rows), "--max-length", "64"),
    *("--model", str(tiny_decoder), "--chat-template", str(template)),
  )
  assert code == 2
  assert capsys.readouterr().err == (
    "error: The chat template does not take a conversation of user:"
    " 'a' * 3000000000 is too large.\n"
  )
  assert not (tmp_path / "run").exists()
