"""Talk: a conversation with the base and the adapter of a run.

Each of the two models has a separate history with its own answers.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from transformers import TextStreamer

from pipeline.data.dataset.reader import DataIndex
from pipeline.errors import UserError
from pipeline.evaluate.generate import Generator
from pipeline.evaluate.loading import ModelLoader
from pipeline.evaluate.model_specs import ModelSpec
from pipeline.evaluate.rows import RowEncoder
from pipeline.plan.given.shape import read_shape
from pipeline.rows.examples import Completion, Conversation, Message, RowError

_CHAT_FORMATS = ("messages", "sharegpt", "alpaca")  # formats of rows for the chat template
# The text of an answer that the encoder needs at the end of a conversation. The encoder returns the
# prompt before this answer.
_PLACEHOLDER_ANSWER = "Yes."


class Talk:
    """A conversation with each of several models of one run, such as base and adapter.

    `system`: the system prompt; empty for none. `is_chat`: whether prompts are turns in the run's
    chat template. It is false if the run was trained on prompts with completions; then each prompt
    is separate and has no template.
    """

    def __init__(
        self, specs: Sequence[ModelSpec], loader: ModelLoader, max_new_tokens: int
    ) -> None:
        settings = specs[0].settings
        self._specs = {spec.name: spec for spec in specs}
        self._loader, self._encoder = loader, RowEncoder(settings)
        shape = read_shape(str(settings.model_folder), trust_remote_code=settings.trust_remote_code)
        self._generator = Generator(
            tokenizer=self._encoder.tokenizer,
            end_ids=self._encoder.end_ids,
            max_new_tokens=max_new_tokens,
            max_positions=shape.max_positions,
        )
        self.is_chat = _is_trained_on_chats(specs[0])
        self.system = ""
        self._histories: dict[str, list[Message]] = {}
        self.reset()

    def load(self) -> None:
        """Load base and adapter, which are one model; otherwise the first answer loads them."""
        with self._loader.loaded(next(iter(self._specs.values()))):
            pass

    def reset(self) -> None:
        """Forget all turns, but not the system prompt."""
        self._histories = {name: [] for name in self._specs}

    def answer(self, name: str, text: str, write: Callable[[str], None]) -> bool:
        """Stream the answer of the model `name` to `write`; False if Ctrl-C stopped it.

        The generated text, even if it was stopped, becomes part of the history. Raises UserError if
        the template refuses the conversation, or if the conversation is too long for the model.
        """
        turns = [*self._histories[name], Message("user", text)]
        prompt = self._prompt(turns, text)
        num_tokens, limit = self._encoder.num_tokens(prompt), self._generator.max_positions
        if limit is not None and num_tokens >= limit:
            raise UserError(
                f"the conversation has {num_tokens} tokens, but the model supports {limit}; /reset "
                "begins another conversation"
            )
        pieces: list[str] = []

        def write_and_store(piece: str) -> None:
            pieces.append(piece)
            write(piece)

        streamer, is_complete = _Streamer(self._encoder.tokenizer, write_and_store), True
        try:
            with self._loader.loaded(self._specs[name]) as model:
                self._generator.answers(model, [prompt], lambda: None, streamer=streamer)
        except KeyboardInterrupt:
            is_complete = False
        if self.is_chat:
            self._histories[name] = [*turns, Message("assistant", "".join(pieces))]
        return is_complete

    def _prompt(self, turns: Sequence[Message], text: str) -> str:
        """The conversation rendered with the chat template, or without a template only `text`."""
        try:
            if not self.is_chat:
                return self._encoder.prompt_of(Completion(text, _PLACEHOLDER_ANSWER))
            system = [Message("system", self.system)] if self.system else []
            messages = (*system, *turns, Message("assistant", _PLACEHOLDER_ANSWER))
            return self._encoder.prompt_of(Conversation(messages))
        except RowError as error:
            raise UserError(f"the chat template refuses this conversation: {error}") from None


class _Streamer(TextStreamer):
    """Passes generated text to a function, without the prompt and special tokens."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._write = write

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called by transformers with text that later tokens do not change."""
        del stream_end
        self._write(text)


def _is_trained_on_chats(spec: ModelSpec) -> bool:
    """Whether the run was trained on conversations; True if its prepared data does not tell."""
    assert spec.adapter is not None
    with suppress(UserError):
        index = DataIndex.load(spec.adapter.parent / "data")
        formats = {name for source in index.train.sources for name in source.formats}
        return not formats or not formats.isdisjoint(_CHAT_FORMATS)
    return True
