"""A conversation on the terminal, or line by line from a pipe.

Ctrl-C ends the answer that is being written, not the program; what had come stays in the conversation. The talk so far
lives here and is sent with each turn; its length is limited by the mesh, which says so.
"""

from __future__ import annotations

import sys
from contextlib import suppress

from autoglm import AutoglmError, Client, GenerateOptions, InvalidRequestError, Message
from autoglm.cli.answers import show
from autoglm.cli.output import Output

MAX_LINE_CHARACTERS = 2**20
HELP = "/reset starts over · /system TEXT sets the system message · /quit leaves · Ctrl-C stops an answer"


class Conversation:
    """The turns so far. An exchange is added as a whole: what was asked and what was answered."""

    def __init__(self, system: str | None) -> None:
        self.system = system
        self._turns: list[Message] = []

    def with_question(self, text: str) -> list[Message]:
        """The messages to send for the next answer."""
        head = [Message("system", self.system)] if self.system else []
        return [*head, *self._turns, Message("user", text)]

    def add(self, question: str, answer: str) -> None:
        """Remembers one exchange."""
        self._turns += [Message("user", question), Message("assistant", answer)]

    def __bool__(self) -> bool:
        return bool(self._turns)

    def reset(self) -> None:
        """Forgets all exchanges; the system message stays."""
        self._turns.clear()


def talk(client: Client, output: Output, system: str | None, options: GenerateOptions) -> None:
    """Runs until /quit or the end of input. In a pipe the first failure ends it; a person may go on."""
    conversation = Conversation(system)
    if output.is_person:
        with suppress(ImportError):
            import readline  # noqa: F401  # gives input() history and editing
    output.note(HELP)
    while (line := _next_line(output)) is not None:
        text = line.strip()
        command, _, argument = text.partition(" ")
        if not text:
            continue
        if command == "/quit":
            return
        if command == "/reset":
            conversation.reset()
            output.note("forgotten")
        elif command == "/system":
            conversation.system = argument.strip() or None
            output.note("system message " + ("set" if conversation.system else "removed"))
        elif command.startswith("/"):
            output.note(HELP)
        else:
            _turn(client, output, conversation, text, options)
    output.note("")


def _turn(client: Client, output: Output, conversation: Conversation, text: str, options: GenerateOptions) -> None:
    try:
        with client.stream(messages=conversation.with_question(text), **options) as stream:
            try:
                for _ in show(stream, output, choices=1):
                    pass
            except KeyboardInterrupt:
                if not output.is_person:
                    raise
                stream.cancel()
                output.note("(stopped)")
    except AutoglmError as error:
        if not output.is_person:
            raise
        output.failure(error)
        if conversation and isinstance(error, InvalidRequestError):  # most likely the talk has outgrown the context
            output.note(HELP)
        return
    conversation.add(text, stream.choices[0].text if stream.choices else "")


def _next_line(output: Output) -> str | None:
    """The next line, None at the end of input. Ctrl-C at the prompt only clears the line."""
    is_interrupted = False
    while True:
        try:
            if is_interrupted:
                is_interrupted = False
                output.note("\n/quit or Ctrl-D leaves")
            if output.is_person and sys.stdin.isatty():
                return input("› ")
            line = sys.stdin.readline(MAX_LINE_CHARACTERS + 1)
            if len(line) > MAX_LINE_CHARACTERS:
                raise InvalidRequestError(f"a line of input is longer than {MAX_LINE_CHARACTERS} characters")
            return line or None
        except EOFError:
            return None
        except KeyboardInterrupt:
            if not output.is_person:
                raise
            is_interrupted = True
