"""One row alone on a way that many go together."""

from datamodules.text import chat
from datamodules.text.together import together


def alone(tokenizer, way):
    """Where a row's way ends."""
    return together(tokenizer, [way])[0]


class Chat(chat.Chat):
    """Encodes one conversation at a time."""

    def encode(self, *args, **kwargs):
        return alone(self.tokenizer, super().encode(*args, **kwargs))

    def encode_completion(self, *args, **kwargs):
        return alone(self.tokenizer, super().encode_completion(*args, **kwargs))

    def encode_prompt(self, *args, **kwargs):
        return alone(self.tokenizer, super().encode_prompt(*args, **kwargs))
