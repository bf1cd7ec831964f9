"""Render a chat with the model's own template, which comes with the model: untrusted code."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from .errors import MobileLLMError


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    bos_token: str = "",
    eos_token: str = "",
    add_generation_prompt: bool = True,
) -> str:
    """Render messages as the prompt the model was trained on.

    Args:
        template: jinja2 source, as in a model's `chat_template`.
        messages: at least one `{"role": str, "content": str}`; more keys of plain JSON data are
            passed on to the template.
        bos_token, eos_token: what the template inserts under these names.
        add_generation_prompt: end with the header of the assistant's next message.

    Raises:
        MobileLLMError: malformed messages, or the template is faulty, refuses them, or tries
            what the sandbox does not allow.
    """
    messages = plain_messages(messages)
    try:
        return _compile(template).render(
            messages=messages,
            tools=None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            bos_token=bos_token,
            eos_token=eos_token,
        )
    except Exception as error:  # a template is a program: whatever it raises is its own fault
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise MobileLLMError(f"[chat] the chat template failed with {reason}") from None


def plain_messages(messages: Any) -> list[dict[str, Any]]:
    """Check messages and copy them as plain data: a template may call methods of what it sees.

    Raises:
        MobileLLMError: there are none, or one lacks a role or a content, or is no JSON data.
    """
    if not isinstance(messages, (list, tuple)) or not messages:
        raise MobileLLMError(
            f"[chat] messages must be a list of at least one message, got {messages!r}"
        )
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise MobileLLMError(f"[chat] messages[{index}] must be a dict, got {message!r}")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise MobileLLMError(
                    f"[chat] messages[{index}][{key!r}] must be a string, got {message.get(key)!r}"
                )
    try:
        return json.loads(json.dumps([dict(message) for message in messages]))
    except (TypeError, ValueError) as error:
        raise MobileLLMError(f"[chat] messages must be plain JSON data: {error}") from None


@lru_cache(maxsize=8)
def _compile(template: str):
    # Imported here: jinja2 takes longer to import than everything else generating needs.
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks the assistant's words for training; here it changes nothing."""

        tags = frozenset({"generation"})

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str):
        raise jinja2.TemplateError(message)

    def strftime_now(form: str) -> str:
        from datetime import datetime

        return datetime.now().strftime(form)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
        # jinja's own filter escapes HTML, which no chat template wants
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    return environment.from_string(template)
