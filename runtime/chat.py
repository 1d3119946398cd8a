"""A conversation in the model's own chat template, keeping the state between turns.

The lightning state cannot be rewound, so a new turn must be a continuation of the tokens already fed. The template
is rendered as text; what it adds after the last reply is encoded and fed, nothing else. Where a template rewrites
earlier turns, the conversation is fed again from its beginning.
"""

from typing import Any

from minibble.quantize.errors import CheckpointError
from minibble.runtime.generation import GenerationResult, OnText, Sampling, generate_text, require_tokenizer

_MARK = "minibble"


class Conversation:
    """Turns of user and assistant; `reply` adds one of each."""

    def __init__(self, model: Any, sampling: Sampling | None = None, max_new_tokens: int = 256):
        self.model, self.sampling, self.max_new_tokens = model, sampling, max_new_tokens
        self.tokenizer = require_tokenizer(model)
        self._template = ChatTemplate(self.tokenizer)
        self.messages: list[tuple[str, str]] = []
        self._ids: list[int] = []
        self._rendered = ""
        self._state: Any = None

    def reply(self, text: str, on_text: OnText | None = None) -> GenerationResult:
        """The assistant's answer to `text`; its `prompt_tokens` are only those that were new."""
        messages = [*self.messages, ("user", text)]
        rendered = self._template.render(messages, add_generation_prompt=True)
        ids, state = self._continue(rendered)
        result = generate_text(
            self.model,
            ids,
            max_new_tokens=self.max_new_tokens,
            sampling=self.sampling,
            on_text=on_text,
            state=state,
            stop_ids=self._template.stop_ids,
        )
        self.messages = [*messages, ("assistant", result.text)]
        self._rendered = rendered + result.text
        # The last token is not in the state yet; if it ended the turn, the template writes the end itself.
        said = result.token_ids[:-1] if result.ended else result.token_ids
        self._ids = [*ids, *said]
        self._state = result.state
        return result

    def tokens_with(self, text: str) -> int:
        """The most tokens that the conversation can have after a reply to `text`."""
        rendered = self._template.render([*self.messages, ("user", text)], add_generation_prompt=True)
        return len(self._continue(rendered)[0]) + self.max_new_tokens

    def _continue(self, rendered: str) -> tuple[list[int], Any]:
        """Ids of `rendered` and the state of their beginning: those already fed, if it continues what was said."""
        if self._state is not None and not self._state.broken and rendered.startswith(self._rendered):
            return self._ids + self._encode(rendered[len(self._rendered) :]), self._state
        return self._encode(rendered), None

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))


class ChatTemplate:
    """The tokenizer's chat template: its way of writing messages, and the token that ends a reply."""

    def __init__(self, tokenizer: Any):
        if getattr(tokenizer, "chat_template", None) is None:
            raise CheckpointError("the checkpoint has no chat template: give a prompt instead of chatting")
        self.tokenizer = tokenizer
        self._in_parts = False
        probe = [("user", "x"), ("assistant", _MARK)]
        rendered = self._try(probe)
        if _MARK not in rendered:
            # MiniMax-Text-01's template reads message['content'][0]['text'].
            self._in_parts = True
            rendered = self._try(probe)
        if _MARK not in rendered:
            raise CheckpointError("the chat template of the checkpoint leaves out what the messages say")
        tail = tokenizer.encode(rendered.rsplit(_MARK, 1)[1], add_special_tokens=False)
        special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
        self.stop_ids = special.intersection(tail[:1])

    def render(self, messages: list[tuple[str, str]], add_generation_prompt: bool = False) -> str:
        """The conversation as text."""
        content = [
            {"role": role, "content": [{"type": "text", "text": text}] if self._in_parts else text}
            for role, text in messages
        ]
        return self.tokenizer.apply_chat_template(content, tokenize=False, add_generation_prompt=add_generation_prompt)

    def _try(self, messages: list[tuple[str, str]]) -> str:
        from jinja2 import TemplateError

        try:
            return self.render(messages)
        except (TemplateError, TypeError):
            return ""
