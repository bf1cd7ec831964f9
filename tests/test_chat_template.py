"""Chat templates: transformers' rendering, and what the sandbox must not allow."""

import pytest

from mobilellm_fast.chat_template import render
from mobilellm_fast.errors import MobileLLMError

USER = {"role": "user", "content": "What is <b>2+2</b>?"}
CHAT = [
    {"role": "system", "content": "Be brief."},
    USER,
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "And\n3+3? é🙂"},
]

SMOLLM = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = """\
{% if messages[0]['role'] == 'system' %}
    {% set loop_messages = messages[1:] %}
    {% set system_message = messages[0]['content'] %}
{% else %}
    {% set loop_messages = messages %}
    {% set system_message = false %}
{% endif %}
{% for message in loop_messages %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('Conversation roles must alternate') }}
    {% endif %}
    {% if message['role'] == 'user' %}
        {{ bos_token + '[INST] ' + message['content'].strip() + ' [/INST]' }}
    {% else %}
        {%- generation -%}
        {{ ' ' + message['content'] + ' ' + eos_token }}
        {%- endgeneration -%}
    {% endif %}
{% endfor %}
"""
ODDS = """\
{%- set ns = namespace(count=0) -%}
{%- for m in messages -%}{%- set ns.count = ns.count + 1 -%}
{%- if m.role == 'assistant' %}{% continue %}{% endif -%}
{{ m | tojson }}{{ m.missing }}{{ m.content | length }}
{% endfor -%}
{{ ns.count }} {{ tools is none }} {{ documents is none }} {{ strftime_now('%Y') | length }}
"""


@pytest.mark.parametrize("template", [SMOLLM, LLAMA2, ODDS], ids=["smollm", "llama2", "odds"])
@pytest.mark.parametrize("messages", [CHAT, CHAT[1:], [USER]])
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_renders_as_transformers_does(template, messages, add_generation_prompt):
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    options = {
        "add_generation_prompt": add_generation_prompt,
        "bos_token": "<s>",
        "eos_token": "</s>",
    }
    expected, _ = utils.render_jinja_template([messages], chat_template=template, **options)
    assert render(template, messages, **options) == expected[0]


def test_a_template_refuses_with_its_own_words():
    with pytest.raises(MobileLLMError, match="Conversation roles must alternate"):
        render(LLAMA2, [USER, USER])


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.__class__.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ raise_exception.__globals__ }}",
        "{{ '{0.__class__.__mro__}'.format('') }}",
        "{{ messages | attr('__class__') | attr('__mro__') }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{% include '/etc/passwd' %}",
        "{{ open('/etc/passwd').read() }}",
    ],
)
def test_the_sandbox_holds(template):
    messages = [dict(USER)]
    try:
        assert render(template, messages) == ""  # an attribute that is not there
    except MobileLLMError as error:
        assert "chat template failed" in str(error)
        assert "\n" not in str(error)
    assert messages == [USER]


@pytest.mark.parametrize(
    "template", ["{% if %}", "{{ messages[0] + 1 }}", "{{ 1 // 0 }}", "{{ x.y.z }}"]
)
def test_a_faulty_template_is_one_line(template):
    with pytest.raises(MobileLLMError) as caught:
        render(template, [USER])
    assert str(caught.value).startswith("[chat] the chat template failed with ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages must be a list of at least one message, got []"),
        ("hello", "messages must be a list"),
        (None, "messages must be a list"),
        (["hello"], r"messages[0] must be a dict, got 'hello'"),
        ([USER, {"role": "user"}], "messages[1]['content'] must be a string, got None"),
        ([{"content": "x"}], "messages[0]['role'] must be a string, got None"),
        ([{"role": "user", "content": ["x"]}], "messages[0]['content'] must be a string"),
        ([{**USER, "file": open}], "messages must be plain JSON data"),
    ],
)
def test_malformed_messages_are_named(messages, message):
    with pytest.raises(MobileLLMError) as caught:
        render(SMOLLM, messages)
    assert message in str(caught.value)
