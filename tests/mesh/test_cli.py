"""The command line as a real process: through pipes, on a pseudo-terminal, under signals."""

from __future__ import annotations

import asyncio
import codecs
import json
import os
import pty
import re
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata as distributions
from typing import Any

import pytest
from autoglm.gateway.v1 import gateway_pb2

from services.chassis import errors as chassis
from tests.fakes.fake_gateway import DIGEST, REQUEST_ID, FakeGateway, Wait, delta, finish, forever, usage

COMMAND = (sys.executable, "-m", "autoglm.cli")
STARTED: list[asyncio.subprocess.Process] = []
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@pytest.fixture
async def gateway() -> AsyncIterator[FakeGateway]:
    async with FakeGateway() as running:
        yield running
        while STARTED:  # a test that failed half-way leaves its command behind
            process = STARTED.pop()
            if process.returncode is None:
                process.kill()
                await process.wait()


@dataclass(frozen=True)
class Ended:
    """A finished command."""

    code: int
    out: str
    err: str


def environment(gateway: FakeGateway) -> dict[str, str]:
    kept = {key: os.environ[key] for key in ("PATH", "HOME", "PYTHONPATH") if key in os.environ}
    return kept | {"AUTOGLM_TARGET": gateway.target, "TERM": "xterm", "COLUMNS": "110", "LC_ALL": "C.UTF-8"}


async def start(gateway: FakeGateway, *arguments: str, **streams: Any) -> asyncio.subprocess.Process:
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), asyncio.subprocess.PIPE)
    process = await asyncio.create_subprocess_exec(*COMMAND, *arguments, env=environment(gateway), **(pipes | streams))
    STARTED.append(process)
    return process


async def autoglm(gateway: FakeGateway, *arguments: str, stdin: bytes = b"") -> Ended:
    process = await start(gateway, *arguments)
    out, err = await process.communicate(stdin)
    return Ended(process.returncode or 0, out.decode(), err.decode())


class Terminal:
    """A pseudo-terminal with a command on it. `until` waits for text to appear."""

    def __init__(self) -> None:
        self.master, self.slave = pty.openpty()
        self.seen = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a read may end inside the prompt's "›"
        self._news = asyncio.Event()

    async def start(self, gateway: FakeGateway, *arguments: str) -> asyncio.subprocess.Process:
        streams = {"stdin": self.slave, "stdout": self.slave, "stderr": self.slave}
        process = await start(gateway, *arguments, **streams)
        os.close(self.slave)
        asyncio.get_running_loop().add_reader(self.master, self._read)
        return process

    async def until(self, text: str) -> None:
        while text not in self.plain:
            self._news.clear()
            await self._news.wait()

    async def at_prompt(self) -> None:
        """Waits until the prompt is the last thing written: keys typed earlier meet a terminal in another mode."""
        while not self.plain.endswith("› "):
            self._news.clear()
            await self._news.wait()

    @property
    def plain(self) -> str:
        return ESCAPES.sub("", self.seen).replace("\r\n", "\n")

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self.master)
        os.close(self.master)

    def _read(self) -> None:
        try:
            self.seen += self._decoder.decode(os.read(self.master, 65536))
        except OSError:  # the other side has gone
            asyncio.get_running_loop().remove_reader(self.master)
        self._news.set()


@pytest.fixture
async def terminal() -> AsyncIterator[Terminal]:
    made = Terminal()
    yield made
    made.close()


async def test_a_pipe_gets_the_text_and_nothing_else(gateway: FakeGateway) -> None:
    """No colours, no footer, one final newline; options arrive."""
    ended = await autoglm(
        gateway, "generate", "one twö", "--max-tokens", "5", "--seed", "3", "--stop", "a", "--stop", "b"
    )
    assert ended == Ended(0, "one twö\n", "")
    request = gateway.requests[0]
    assert (request.max_tokens, request.sampling.seed, list(request.stop)) == (5, 3, ["a", "b"])
    assert not request.sampling.HasField("temperature")


async def test_text_flows_through_a_pipe_as_it_comes(gateway: FakeGateway) -> None:
    """The first words are readable while the mesh still works on the rest."""
    gate = asyncio.Event()
    gateway.script(delta("first"), Wait(gate), delta(" last\n"), finish(), usage())
    process = await start(gateway, "generate", "x")
    assert process.stdout is not None
    assert await process.stdout.readexactly(5) == b"first"
    gate.set()
    assert (await process.communicate())[0] == b" last\n"
    assert process.returncode == 0


async def test_the_prompt_can_come_from_standard_input(gateway: FakeGateway) -> None:
    """`-` reads all of it, as UTF-8; anything else is wrong usage."""
    assert (await autoglm(gateway, "generate", "-", stdin="ünï code".encode())).out == "ünï code\n"
    bad = await autoglm(gateway, "generate", "-", stdin=b"\xff\xfe")
    assert bad.code == 2 and "UTF-8" in bad.err


async def test_json_is_one_object_per_line(gateway: FakeGateway) -> None:
    """Every event is a line of its own, tokens included, and the last names the request."""
    token = gateway_pb2.TokenText(token_id=5, content=b"a", logprob=-0.5)
    gateway.script(delta("a", tokens=(token,)), finish(stop="X"), usage(4, 2, 1))
    ended = await autoglm(gateway, "generate", "x", "--json", "--logprobs")
    text, end, done = (json.loads(line) for line in ended.out.splitlines())
    assert (text["event"], text["text"], text["tokens"][0]["logprob"]) == ("delta", "a", -0.5)
    assert end == {"event": "finish", "choice": 0, "reason": "stop", "stop": "X"}
    assert done["usage"] == {"prompt_tokens": 4, "cached_tokens": 1, "completion_tokens": 2}
    assert (done["request_id"], done["variant_digest"]) == (REQUEST_ID, DIGEST)


async def test_several_answers_are_numbered(gateway: FakeGateway) -> None:
    """Interleaved choices are not mixed up in the output."""
    ended = await autoglm(gateway, "generate", "a b", "-n", "2")
    assert ended == Ended(0, "[0] a b\n[1] a b\n", "")


async def test_chat_flag_and_system_make_a_conversation(gateway: FakeGateway) -> None:
    """`generate` answers instead of continuing when asked to."""
    await autoglm(gateway, "generate", "hi", "--system", "be kind")
    assert [turn.role for turn in gateway.requests[0].chat.messages] == ["system", "user"]


@pytest.mark.parametrize(
    ("failure", "code"),
    [
        (chassis.Unavailable("draining"), 3),
        (chassis.TooBusy("full", retry_after_s=2), 3),
        (chassis.OutOfTime("late"), 3),
        (chassis.InvalidRequest("top_k too large"), 4),
        (chassis.NotFound("no such model"), 4),
        (chassis.Interrupted("worker died"), 5),
        (chassis.Internal("internal error"), 1),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
async def test_exit_codes_tell_what_to_do(gateway: FakeGateway, failure: chassis.ServiceError, code: int) -> None:
    """One line on standard error with the mesh's text and the request's name, no traceback; JSON tells the same."""
    gateway.script(failure)
    gateway.script(failure)
    ended = await autoglm(gateway, "generate", "x")
    assert ended.code == code and ended.out == ""
    assert ended.err.count("\n") == 1 and failure.message in ended.err and REQUEST_ID in ended.err
    as_json = await autoglm(gateway, "generate", "x", "--json")
    assert as_json.code == code and json.loads(as_json.out)["message"] == failure.message


async def test_when_to_come_back_is_said_once(gateway: FakeGateway) -> None:
    """A full mesh says when to try again; a message that already names the time is left as it is. JSON has it too."""
    gateway.script(chassis.TooBusy("the queue is full", retry_after_s=2.5))
    gateway.script(chassis.TooBusy("3 tokens are left; come back in 2.5 s", retry_after_s=2.5))
    plain, named = [await autoglm(gateway, "generate", "x") for _ in range(2)]
    assert "the queue is full; try again in 2.5 s [request" in plain.err
    assert "come back in 2.5 s [request" in named.err
    gateway.script(chassis.TooBusy("3 tokens are left; come back in 2.5 s", retry_after_s=2.5))
    as_json = await autoglm(gateway, "generate", "x", "--json")
    assert json.loads(as_json.out)["retry_after_s"] == 2.5


async def test_a_cut_answer_is_shown_and_exits_5(gateway: FakeGateway) -> None:
    """What had come is printed, its line is ended, and the code says that it is not whole."""
    gateway.script(delta("half an ans"))
    ended = await autoglm(gateway, "generate", "x")
    assert (ended.code, ended.out) == (5, "half an ans\n") and "without" in ended.err


async def test_nobody_there_exits_3(gateway: FakeGateway) -> None:
    """Every command says where it looked."""
    await gateway.stop()
    for arguments in (("generate", "x"), ("models",), ("count", "x"), ("status",)):
        ended = await autoglm(gateway, *arguments)
        assert ended.code == 3 and gateway.target in ended.out + ended.err and "Traceback" not in ended.err


@pytest.mark.parametrize(
    "arguments",
    [(), ("nonsense",), ("generate",), ("generate", "x", "--top-k", "a"), ("generate", "x", "--logprobs")],
    ids=" ".join,
)
async def test_wrong_usage_exits_2(gateway: FakeGateway, arguments: tuple[str, ...]) -> None:
    """Nothing is sent for a command that cannot be meant."""
    ended = await autoglm(gateway, *arguments)
    assert ended.code == 2 and "Traceback" not in ended.err
    assert gateway.requests == []


async def test_a_limit_of_the_client_is_a_refusal(gateway: FakeGateway) -> None:
    """What the SDK refuses before sending has the code of a refused request."""
    ended = await autoglm(gateway, "generate", "x", "--seed", "-1")
    assert ended.code == 4 and "seed" in ended.err


async def test_ctrl_c_exits_130_and_stops_the_mesh(gateway: FakeGateway) -> None:
    """The call is cancelled, the written line is ended, and no traceback is shown."""
    gateway.script(delta("so far"), forever())
    process = await start(gateway, "generate", "x")
    assert process.stdout is not None and process.stderr is not None
    await process.stdout.readexactly(6)
    process.send_signal(signal.SIGINT)
    await gateway.cancelled.wait()
    out, err = await process.communicate()
    assert (process.returncode, out) == (130, b"\n")
    assert b"Traceback" not in err


async def test_a_closed_pipe_is_quiet(gateway: FakeGateway) -> None:
    """`autoglm … | head -1` ends without a word, and the mesh stops working."""
    gate = asyncio.Event()
    gateway.script(delta("line\n"), Wait(gate), *[delta("more\n")] * 3, forever())
    reader, writer = os.pipe()
    process = await start(gateway, "generate", "x", stdout=writer)
    os.close(writer)
    assert await asyncio.to_thread(os.read, reader, 5) == b"line\n"
    os.close(reader)
    gate.set()
    _, err = await process.communicate()
    assert (process.returncode, err) == (141, b"")
    await gateway.cancelled.wait()


async def test_models_and_count(gateway: FakeGateway) -> None:
    """Tab-separated for pipes, objects for JSON."""
    assert (await autoglm(gateway, "models")).out == f"glm-tiny\t2048\t7\t{DIGEST}\n"
    listed = json.loads((await autoglm(gateway, "models", "--json")).out)
    assert listed == {"name": "glm-tiny", "context_tokens": 2048, "parameters": 7, "variant_digest": DIGEST}
    assert (await autoglm(gateway, "count", "a b c")).out == "3\n"
    counted = json.loads((await autoglm(gateway, "count", "-", "--json", stdin=b"a b")).out)
    assert counted == {"tokens": 2, "tokenizer_digest": DIGEST}


async def test_status_tells_what_a_client_sees(gateway: FakeGateway) -> None:
    """Health, latency and digests; exit code 3 when no model would answer."""
    seen = json.loads((await autoglm(gateway, "status", "--json")).out)
    assert (seen["health"], seen["models"][0]["variant_digest"]) == ("serving", DIGEST)
    assert seen["latency_ms"] > 0 and seen["error"] is None
    gateway.models.clear()
    assert (await autoglm(gateway, "status")).code == 3


async def test_status_reads_the_proxy(gateway: FakeGateway) -> None:
    """With an admin address: the proxy's state and its healthy hosts; without an answer there, a line that says so."""
    hosts = [{"health_status": {"eds_health_status": state}} for state in ("HEALTHY", "UNHEALTHY")]
    pages = {
        "/server_info": {"state": "LIVE", "version": "abc/1.40.0/Clean/RELEASE"},
        "/clusters?format=json": {"cluster_statuses": [{"name": "gateway", "host_statuses": hosts}]},
    }

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        body = json.dumps(pages[head.split()[1]]).encode()
        writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        ended = await autoglm(gateway, "status", "--admin", address)
    assert "proxy\tLIVE 1.40.0\n" in ended.out and "cluster gateway\t1/2 hosts healthy\n" in ended.out
    ended = await autoglm(gateway, "status", "--admin", address)
    assert ended.code == 0 and f"proxy\tno answer from http://{address}" in ended.out


async def test_chat_through_a_pipe_takes_a_line_per_turn(gateway: FakeGateway) -> None:
    """The conversation grows, /reset forgets it, /system changes who speaks, /quit ends before the rest."""
    lines = b"hello\nagain\n/reset\n/system be kind\nfresh\n/quit\nnever\n"
    ended = await autoglm(gateway, "chat", stdin=lines)
    assert ended == Ended(0, "hello\nagain\nfresh\n", "")
    talks = [[(turn.role, turn.content) for turn in request.chat.messages] for request in gateway.requests]
    assert talks[1] == [("user", "hello"), ("assistant", "hello"), ("user", "again")]
    assert talks[2] == [("system", "be kind"), ("user", "fresh")]


async def test_chat_through_a_pipe_stops_at_the_first_failure(gateway: FakeGateway) -> None:
    """A script must notice."""
    gateway.script(chassis.TooBusy("full", retry_after_s=1))
    ended = await autoglm(gateway, "chat", stdin=b"hello\nagain\n")
    assert ended.code == 3 and "try again in 1 s" in ended.err and len(gateway.requests) == 1


async def test_a_terminal_gets_speed_and_colour(gateway: FakeGateway, terminal: Terminal) -> None:
    """A person sees the footer; the escape codes are ours."""
    process = await terminal.start(gateway, "generate", "one two three")
    await terminal.until("tokens/s")
    assert await process.wait() == 0
    assert "one two three\n3 tokens · " in terminal.plain and "\x1b[" in terminal.seen


async def test_a_model_cannot_command_the_terminal(gateway: FakeGateway, terminal: Terminal) -> None:
    """Escape sequences in generated text are shown, not obeyed; a pipe gets them as they are."""
    attack = "\x1b]0;owned\x07\x9b31m"
    for _ in range(2):
        gateway.script(delta(attack), finish(), usage())
    process = await terminal.start(gateway, "generate", "x")
    await terminal.until("tokens")
    assert await process.wait() == 0
    assert "␛]0;owned␇" in terminal.seen and "\x1b]0;" not in terminal.seen and "\x9b" not in terminal.seen
    assert (await autoglm(gateway, "generate", "x")).out == attack + "\n"


async def test_ctrl_c_in_a_chat_ends_the_answer_not_the_program(gateway: FakeGateway, terminal: Terminal) -> None:
    """The mesh stops, the partial answer stays in the conversation, and the next turn works."""
    gateway.script(delta("partial"), forever())
    process = await terminal.start(gateway, "chat")
    await terminal.at_prompt()
    terminal.type("question\n")
    await terminal.until("partial")
    process.send_signal(signal.SIGINT)
    await gateway.cancelled.wait()
    await terminal.until("(stopped)")
    await terminal.at_prompt()
    terminal.type("what now\n")
    await terminal.until("2 tokens")
    await terminal.at_prompt()
    assert [turn.content for turn in gateway.requests[1].chat.messages] == ["question", "partial", "what now"]
    gateway.script(chassis.Unavailable("draining"))
    terminal.type("more\n")
    await terminal.until("draining")
    await terminal.at_prompt()
    terminal.type("/quit\n")
    assert await process.wait() == 0
    assert "Traceback" not in terminal.plain


async def test_a_chat_that_is_refused_recalls_its_commands(gateway: FakeGateway, terminal: Terminal) -> None:
    """A talk that has outgrown the context is refused for ever: a person is told of /reset, which helps."""
    process = await terminal.start(gateway, "chat")
    await terminal.at_prompt()
    terminal.type("one\n")
    await terminal.until("tokens · ")
    await terminal.at_prompt()
    gateway.script(chassis.InvalidRequest("the prompt is too long"))
    told = len(terminal.plain)
    terminal.type("two\n")
    await terminal.until("the prompt is too long")
    await terminal.at_prompt()
    assert "/reset starts over" in terminal.plain[told:]
    terminal.type("/quit\n")
    assert await process.wait() == 0


async def test_the_version_is_told(gateway: FakeGateway) -> None:
    """`--version` says it and asks nobody."""
    ended = await autoglm(gateway, "--version")
    assert (ended.code, ended.out) == (0, f"{distributions.version('autoglm')}\n") and gateway.requests == []


async def test_ctrl_c_and_ctrl_d_at_the_chat_prompt(gateway: FakeGateway, terminal: Terminal) -> None:
    """Ctrl-C only clears the line and says how to leave; Ctrl-D leaves with code 0."""
    process = await terminal.start(gateway, "chat")
    await terminal.at_prompt()
    while "Ctrl-D leaves" not in terminal.plain:
        # readline misses a signal that falls between its prompt and its wait for keys; a person presses again
        process.send_signal(signal.SIGINT)
        with suppress(TimeoutError):
            await asyncio.wait_for(terminal.until("Ctrl-D leaves"), 1)
    await terminal.at_prompt()
    terminal.type("\x04")
    assert await process.wait() == 0
    assert "Traceback" not in terminal.plain
