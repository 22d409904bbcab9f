"""`align chat`: a conversation with a policy, or with two at once."""

import argparse
import difflib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from alignment_modules.callbacks.jsonl import naming, to_json_line
from alignment_modules.cli.acting import Acting
from alignment_modules.cli.conversation import Conversation, Turn
from alignment_modules.cli.loaded_policy import (
    LoadedPolicy,
    add_policy_options,
    add_sampling_options,
    sampling_parameters,
)
from alignment_modules.cli.options import OptionParser
from alignment_modules.cli.screen import Screen, Shown
from alignment_modules.cli.tools import Actions, add_tool_options
from alignment_modules.rollouts.seeds import Seeds

_HELP = {
    "/undo": "take back the last message and its answer",
    "/retry": "answer the last message again, with other random numbers",
    "/save FILE": "append the conversation to a JSONL file to train on (SFT)",
    "/system TEXT": "begin a new conversation with this system prompt; without text: with none",
    "/temperature T": "sample at another temperature; 0: the likeliest tokens",
    "/adapter on|off": "switch the LoRA adapter of the folder on or off",
    "/help": "show this",
    "/quit": "end (so does Ctrl-D); Ctrl-C stops an answer",
}


def chat_command(arguments: list[str]) -> int:
    """Runs `align chat`.

    Args:
        arguments: What follows `align chat`.

    Returns:
        0.

    Raises:
        ValueError: If an option is out of its range or a policy cannot be loaded.
    """
    given = _parser().parse_args(arguments)
    sampling_parameters(given)  # before anything is loaded
    actions = Actions.of(given)
    if actions is not None and given.text:
        raise ValueError("text=True is not allowed with tools and environments, which need a conversation")
    paths = [given.policy, *([given.against] if given.against else [])]
    voices = [Voice(LoadedPolicy.load(path, given, merge=False), given, actions) for path in paths]
    if given.system and not all(voice.conversation.as_messages for voice in voices):
        raise ValueError(f"system={given.system!r} needs a chat template, and text is continued here")
    Chat(voices, Screen()).run()
    return 0


def _parser() -> argparse.ArgumentParser:
    commands = "\n".join(f"  {name:<16} {what}" for name, what in _HELP.items())
    parser = OptionParser(
        "chat",
        "--policy FOLDER [--against FOLDER] [options]",
        "Talk with a policy, through its tokenizer's chat template. Without one, or with --text, each line is a\n"
        "text of its own that the policy continues.",
        f"commands in the chat\n{commands}\n  //TEXT           a message that begins with /\n\n"
        "align chat --policy runs/dpo/export --against runs/sft/export",
    )
    add_policy_options(parser)
    parser.add_argument("--against", metavar="FOLDER", help="a second policy, which answers the same messages")
    parser.add_argument("--system", default="", metavar="TEXT", help="the system prompt")
    parser.add_argument("--text", action="store_true", help="continue text, though there is a chat template")
    add_sampling_options(parser, temperature=0.7)
    add_tool_options(parser)
    return parser


class Voice:
    """A policy with its own side of the conversation.

    Args:
        loaded: The policy.
        given: The command's options.
        actions: What it may call; None: nothing.
    """

    def __init__(self, loaded: LoadedPolicy, given: argparse.Namespace, actions: Actions | None = None) -> None:
        self.loaded, self.seed = loaded, given.seed
        self.parameters = sampling_parameters(given, loaded.codec.stop_token_ids)
        self.conversation = Conversation(loaded.has_template and not given.text, given.system)
        self.acting = None if actions is None else Acting(loaded, actions)
        self.conversation.tools = self.acting.schemas if self.acting else []

    def answer(self, user: str, attempt: int, show: Shown) -> list[str]:
        """Answers a message, and remembers both; says how the answer ended, where it did not stop by itself.

        Raises:
            ValueError: If the message cannot be answered; nothing is remembered then.
        """
        seeds, conversation = Seeds([len(self.conversation.turns)], self.seed, attempt), self.conversation
        if self.acting is not None:
            found = self.acting.answer(conversation.messages(), user, self.parameters, seeds, show)
            text = str(found.messages[-1]["content"]) if found.messages else ""
            conversation.turns.append(Turn(user, text, found.messages, found.added))
            return found.remarks
        text, how = self.loaded.write(conversation.prompt(user), self.parameters, seeds, show)
        conversation.turns.append(Turn(user, text))
        return [] if how == "stopped" else [how]


class Chat:
    """Reads messages and commands, and answers them.

    Args:
        voices: Who answers, in order.
        screen: Where.
    """

    def __init__(self, voices: list[Voice], screen: Screen) -> None:
        self.voices, self.screen = voices, screen
        self.attempt = 0
        self.commands: dict[str, Callable[[str], None]] = {
            "/undo": self.undo,
            "/retry": self.retry,
            "/save": self.save,
            "/system": self.system,
            "/temperature": self.temperature,
            "/adapter": self.adapter,
            "/help": self.help,
        }

    def run(self) -> None:
        """Talks until the user ends it."""
        self._greet()
        while True:
            try:
                line = self.screen.read()
                if line is None or line.strip() == "/quit":
                    return
                self._take(line)
            except KeyboardInterrupt:
                self.screen.note("\n(Ctrl-D or /quit ends the chat)")

    def _take(self, line: str) -> None:
        if line.startswith("/") and not line.startswith("//"):
            self._command(line)
        elif line.strip():
            self.attempt = 0
            self._say(line.removeprefix("/") if line.startswith("//") else line)

    def _greet(self) -> None:
        for voice in self.voices:
            loaded, as_messages = voice.loaded, voice.conversation.as_messages
            size = sum(parameter.numel() for parameter in loaded.policy.parameters())
            adapter = ", adapter on" if loaded.has_adapter else ""
            how = "chat" if as_messages else "text is continued, each line on its own"
            self.screen.note(f"{loaded.path}: {size:,} parameters on {loaded.device}{adapter}; {how}")
        if acting := self.voices[0].acting:
            self.screen.note(acting.actions.describe(acting.name))
        self.screen.note("/help lists the commands, /quit ends")

    def _say(self, user: str) -> bool:
        """Has a message answered; whether it was, by all."""
        remarks: list[str] = []
        said = len(self.voices[0].conversation.turns)
        try:
            with self.screen.answers([voice.loaded.path for voice in self.voices]) as begin:
                for number, voice in enumerate(self.voices):
                    with begin(number) as show:
                        remarks += voice.answer(user, self.attempt, show)
        except ValueError as error:
            self.screen.error(str(error))
        for remark in dict.fromkeys(remarks):
            self.screen.note("(cut at max_completion_length)" if remark == "cut" else f"({remark})")
        answered = all(len(voice.conversation.turns) > said for voice in self.voices)
        for voice in [] if answered else self.voices:  # what only one has heard is not said
            del voice.conversation.turns[said:]
        return answered

    def _command(self, line: str) -> None:
        name, _, rest = line.strip().partition(" ")
        command = self.commands.get(name)
        if command is not None:
            return command(rest.strip())
        near = difflib.get_close_matches(name, [*self.commands, "/quit"], n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        return self.screen.error(f"{name} is no command{hint} (/help lists them; // begins a message with /)")

    def undo(self, rest: str) -> None:
        """Takes back the last turn."""
        if not self._spoken():
            return
        self.attempt = 0
        for voice in self.voices:
            voice.conversation.turns.pop()
        left = len(self.voices[0].conversation.turns)
        self.screen.note(f"(taken back; {left} {'message is' if left == 1 else 'messages are'} left)")

    def retry(self, rest: str) -> None:
        """Answers the last message again."""
        if not self._spoken():
            return
        last = [voice.conversation.turns.pop() for voice in self.voices]
        self.attempt += 1
        if not self._say(last[0].user):
            for voice, turn in zip(self.voices, last, strict=True):
                voice.conversation.turns.append(turn)
        elif last == [voice.conversation.turns[-1] for voice in self.voices]:
            self.screen.note("(the same as before)")

    def save(self, rest: str) -> None:
        """Appends the conversation to a file."""
        if not rest:
            return self.screen.error("/save needs a file, as in /save chats.jsonl")
        if not self._spoken():
            return None
        path = Path(rest).expanduser()
        rows = [row for voice in self.voices for row in voice.conversation.rows()]
        try:
            with naming(path), path.open("a", encoding="utf-8") as file:
                file.writelines(map(to_json_line, rows))
        except OSError as error:
            return self.screen.error(str(error))
        return self.screen.note(f"(appended {len(rows)} {'row' if len(rows) == 1 else 'rows'} to {path})")

    def system(self, rest: str) -> None:
        """Sets the system prompt; what was answered under another one is no part of the conversation from then on."""
        if not all(voice.conversation.as_messages for voice in self.voices):
            return self.screen.error("/system needs a chat template; here text is continued")
        anew = "; a new conversation begins" if self.voices[0].conversation.turns else ""
        self.attempt = 0
        for voice in self.voices:
            voice.conversation.system = rest
            voice.conversation.turns.clear()
        return self.screen.note(f"({'system prompt set' if rest else 'no system prompt'}{anew})")

    def temperature(self, rest: str) -> None:
        """Sets the temperature."""
        try:
            value = float(rest)
            made = [replace(voice.parameters, temperature=value, greedy=not value) for voice in self.voices]
        except ValueError as error:
            return self.screen.error(f"/temperature {rest}: {error}")
        for voice, parameters in zip(self.voices, made, strict=True):
            voice.parameters = parameters
        return self.screen.note(f"(temperature {value:g})")

    def adapter(self, rest: str) -> None:
        """Switches adapters on or off."""
        adapted = [voice.loaded for voice in self.voices if voice.loaded.has_adapter]
        if rest not in ("on", "off"):
            return self.screen.error(f"/adapter {rest}: must be on or off".replace("  ", " "))
        if not adapted:
            return self.screen.error(
                "/adapter: no folder here holds an adapter; one exported merged is not to be split"
            )
        for loaded in adapted:
            loaded.adapter = rest == "on"
        return self.screen.note(f"(adapter {rest}: {', '.join(loaded.path for loaded in adapted)})")

    def help(self, rest: str) -> None:
        """Shows the commands."""
        self.screen.note("\n".join(f"  {name:<16} {what}" for name, what in _HELP.items()))

    def _spoken(self) -> bool:
        """Whether there is a last message; says so where there is none."""
        if not self.voices[0].conversation.turns:
            self.screen.error("nothing was said yet")
        return bool(self.voices[0].conversation.turns)
