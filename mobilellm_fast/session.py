"""A session: prompts and conversations that grow, without reading their beginnings again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .answer import Generation, Options
from .chat_template import plain_messages
from .context import Context
from .errors import MobileLLMError
from .files import brief, checked_path
from .generate import Stream
from .interface import StoredEngine
from .prompt import chat_ids, prompt_ids


class Session:
    """Answers like its engine, but keeps the KV cache between calls. Not for concurrent use.

    What a prompt has in common with the tokens read last, from the first on, is not computed
    again; `Timings.reused_tokens` counts it. Answers are the same as the engine's.

    Args:
        engine: what answers; its weights and format are compared where a session is restored.
        messages: beginning of the conversation, such as a system message; see `generate.chat`.
    """

    def __init__(self, engine: StoredEngine, messages: Sequence[Mapping[str, Any]] = ()) -> None:
        self._engine = engine
        if not isinstance(messages, (list, tuple)):
            raise MobileLLMError(
                "[session] messages must be a list of dicts with a role and a content, "
                f"got {brief(messages)}"
            )
        self._messages: list[Mapping[str, Any]] = plain_messages(messages) if messages else []
        self._pending: tuple[dict[str, str], Stream] | None = None  # last question and answer
        self._context = Context(engine)

    @property
    def token_ids(self) -> list[int]:
        """The tokens in the cache."""
        return list(self._context.token_ids)

    @property
    def messages(self) -> list[Mapping[str, Any]]:
        """The conversation; an answer that was left early counts as far as it came."""
        if self._pending:
            question, answer = self._pending
            text = answer.generation.text
            return [*self._messages, question, {"role": "assistant", "content": text}]
        return list(self._messages)

    def stream(self, prompt: str | Sequence[int], **options: Any) -> Stream:
        """Start continuing a prompt; see `generate.stream`."""
        checked = Options.of(options)
        ids = prompt_ids(self._engine, prompt, "[generate] prompt")
        return Stream(self._engine, ids, checked, context=self._context)

    def generate(self, prompt: str | Sequence[int], **options: Any) -> Generation:
        """Continue a prompt: all of it, of which what was read before costs nothing."""
        return self.stream(prompt, **options).run_to_end()

    def stream_chat(self, message: str, **options: Any) -> Stream:
        """Start answering the next message of the conversation.

        Args:
            message: what the user says.
            **options: see `Options` and `Sampling`.

        Raises:
            MobileLLMError: a bad argument, or a conversation that fills the context; it is then
                as it was.
        """
        if not isinstance(message, str):
            raise MobileLLMError(f"[chat] message must be a string, got {type(message).__name__}")
        checked = Options.of(options)
        messages = self.messages
        question = {"role": "user", "content": message}
        ids = chat_ids(self._engine, [*messages, question])
        answer = Stream(self._engine, ids, checked, continues_prompt=False, context=self._context)
        self._messages, self._pending = messages, (question, answer)
        return answer

    def chat(self, message: str, **options: Any) -> Generation:
        """Answer the next message of the conversation. Arguments are those of `stream_chat`."""
        return self.stream_chat(message, **options).run_to_end()

    def fork(self) -> Session:
        """Return another session at the same point; memory is shared until either goes on."""
        fork = Session(self._engine, self.messages)
        fork._context = self._context.copy()
        return fork

    def save(self, path: str | Path) -> None:
        """Write the session to a file, complete or not at all; `Engine.restore_session` reads it.

        The file has about 23 kB per token of a 125M model, and the conversation's text.

        Raises:
            MobileLLMError: `path` is none.
            CheckpointError: it cannot be written.
        """
        from .session_file import save

        save(checked_path("[save] path", path), self._engine, self._context, self.messages)

    @classmethod
    def restore(cls, path: str | Path, engine: StoredEngine) -> Session:
        """Read a session that an engine with the same weights and format saved.

        Raises:
            CheckpointError: the file cannot be read, is damaged, or is of another model.
        """
        from .session_file import restore

        context, messages = restore(checked_path("[restore] path", path), engine)
        session = cls(engine, messages)
        session._context = context
        return session
