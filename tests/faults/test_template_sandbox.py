"""Chat templates written by an attacker: nothing escapes, nothing hangs, and nobody else notices.

Every attack hides behind a harmless template and springs on one message, so it passes the proof at load. All of them
are served by one real process together with the model everybody uses.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
import pytest
from autoglm.tokenizer.v1 import tokenizer_pb2 as pb
from autoglm.tokenizer.v1 import tokenizer_pb2_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.fakes.processes import Service, is_alive, running

TIME_LIMIT_S = 0.2
SECRET = "secret-in-the-environment-51c9"

ESCAPES = {
    "class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "lipsum": "{{ lipsum.__globals__['os'].environ }}",
    "self": "{{ self.__init__.__globals__.__builtins__.open('/etc/passwd').read() }}",
    "self-private": "{{ self._TemplateReference__context.environment }}",
    "attr": "{{ ''|attr('__class__')|attr('__base__') }}",
    "attr-join": "{{ ()|attr(['__cl','ass__']|join)|attr('__base__') }}",
    "attr-escape": "{{ ()|attr('\\x5f\\x5fclass\\x5f\\x5f') }}",
    "item": "{{ messages['__class__'] }}{{ ''['__class__'] }}",
    "format": "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "format-map": "{{ '{a.__class__.__mro__}'.format_map({'a': messages}) }}",
    "format-bound": "{% set f = '{0.__class__}'.format %}{{ f(1) }}",
    "map-attribute": "{{ [raise_exception]|map(attribute='__globals__')|list }}",
    "function": "{{ raise_exception.__globals__.sys.modules }}",
    "strftime": "{{ strftime_now.__closure__ }}{{ strftime_now.__code__ }}",
    "loop": "{% for x in [1] %}{{ loop.__class__ }}{{ loop._iterator.__class__ }}{% endfor %}",
    "macro": "{% macro m() %}{% endmacro %}{{ m._func.__globals__ }}{{ m._environment.loader }}",
    "namespace": "{% set n = namespace() %}{{ n.__class__.__init__.__globals__ }}",
    "mutate": "{{ messages.append(messages[0]) }}",
    "mutate-item": "{{ messages[0].update({'role': 'system'}) }}",
    "generator": "{{ (messages|map('upper')).gi_frame.f_globals }}",
    "undefined": "{{ nothing.__class__ }}",
    "undefined-init": "{{ nothing.__init__.__globals__ }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}{{ os.environ }}",
    "context": "{{ self._Context__self }}{{ get_flashed_messages }}{{ config }}",
    "mro-index": "{{ [].__class__.__base__.__subclasses__()[104].__init__.__globals__['sys'] }}",
    "debug": "{% debug %}",
    "extends": "{% extends '/etc/passwd' %}",
    "callable": "{{ messages.__len__.__self__ }}",
}
BOMBS = {
    "endless": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "range": "{% for a in range(1000000000) %}{% endfor %}",
    "power": "{{ 10 ** (messages|length * 10 ** 9) }}",
    "multiply": "{{ 'x' * 1000000000 }}",
    "gigabyte": "{% for a in range(99999) %}{{ 'x' * 10000 }}{% endfor %}",
    "double": "{% set n = namespace(s='x') %}{% for a in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}",
    "list": "{% set n = namespace(l=[1]) %}{% for a in range(60) %}{% set n.l = n.l + n.l %}{% endfor %}",
    "recursion": "{% macro m(x) %}{{ m(x + 1) }}{% endmacro %}{{ m(1) }}",
    "pad": "{{ 'x'|center(2000000000) }}",
    "format-width": "{{ '%2000000000d' % 1 }}",
    "lorem": "{{ lipsum(n=100000) }}",
    "replace": "{% set n = namespace(s='a' * 999) %}{% for i in range(9) %}"
    "{% set n.s = n.s|replace('a', 'a' * 999) %}{% endfor %}",
    "sort": "{{ (range(99999)|list * 99)|sort|length }}{{ (range(99999)|list * 99)|sort|length }}",
    "json": "{{ (['x' * 99999 * messages|length] * 9999)|tojson }}",
    "regex-ish": "{{ ('a' * 99999)|wordwrap(1)|wordwrap(1)|urlize|length }}",
}
HARMLESS = "{% for m in messages %}<|user|>{{ m.content }}{% endfor %}"
LEAKS = ("root:", "uid=", "<class", "<function", "<module", "object at 0x", "PATH", SECRET, "jinja2", "subclasses")


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    models = ["good=models/glm-tiny"]
    for name, attack in (ESCAPES | BOMBS).items():
        directory = tmp_path_factory.mktemp(name)
        shutil.copy("models/glm-tiny/tokenizer.json", directory)
        springs = "{% if messages[0].content == 'now' %}" + attack + "{% endif %}" + HARMLESS
        (directory / "chat_template.jinja").write_text(springs)
        models.append(f"{name}={directory}")
    with running(
        "services.tokenizer",
        timeout_s=50,
        AUTOGLM_MODELS=",".join(models),
        AUTOGLM_TEMPLATE_TIME_MS=str(round(TIME_LIMIT_S * 1000)),
        SECRET_OF_THE_SERVICE=SECRET,
    ) as process:
        yield process


@pytest.fixture
async def channel(service: Service) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(service.address) as channel:
        yield channel


def request(model: str, content: str = "now") -> pb.RenderChatRequest:
    return pb.RenderChatRequest(model=model, messages=[pb.ChatMessage(role="user", content=content)])


async def render(channel: grpc.aio.Channel, model: str, content: str = "now") -> str:
    """The prompt, or the words of a typed refusal."""
    stub = tokenizer_pb2_grpc.TokenizerServiceStub(channel)
    try:
        return (await stub.RenderChat(request(model, content))).text
    except grpc.aio.AioRpcError as error:
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT, (model, error.details())
        return str(error.details())


@pytest.mark.parametrize("name", ESCAPES)
async def test_no_escape_reveals_anything(channel: grpc.aio.Channel, service: Service, name: str) -> None:
    """Refused, or rendered to nothing of interest; the next caller is served."""
    text = await render(channel, name)
    assert not any(leak in text for leak in LEAKS), text[:300]
    assert await render(channel, "good") == "[gMASK]<sop><|user|>\nnow"
    assert not any(leak in json.dumps(service.lines) for leak in ("root:", "uid=", SECRET))


@pytest.mark.parametrize("name", BOMBS)
async def test_every_bomb_is_stopped_in_time(channel: grpc.aio.Channel, service: Service, name: str) -> None:
    """A typed refusal within the limit (and the way there), bounded memory, and service as usual afterwards."""
    await render(channel, "good")  # the helper is warm
    started = time.monotonic()
    text = await render(channel, name)
    took_s = time.monotonic() - started
    assert "template" in text, text[:200]
    assert took_s < TIME_LIMIT_S + 20, "it ended by its limit, not by the call's own deadline"
    assert await render(channel, name, "hello") == "<|user|>hello"
    assert len(service.children()) <= 2


async def test_others_do_not_notice(channel: grpc.aio.Channel) -> None:
    """While bombs go off without pause, health goes on answering: the event loop is never held."""
    health = health_pb2_grpc.HealthStub(channel)
    stopping = asyncio.Event()

    async def attack(name: str) -> None:
        while not stopping.is_set():
            await render(channel, name)

    async with asyncio.TaskGroup() as tasks:
        for name in ("endless", "multiply", "gigabyte", "recursion"):
            tasks.create_task(attack(name))
        for _ in range(200):
            # On the loop the first attack would run for ever; the call raises when the time is exceeded.
            answer = await health.Check(health_pb2.HealthCheckRequest(), timeout=10)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        stopping.set()


async def test_a_killed_helper_is_replaced(channel: grpc.aio.Channel, service: Service) -> None:
    """kill -9 on the helper between two renders costs at most one refused render."""
    import os
    import signal

    await render(channel, "good")
    (helper,) = service.children()
    os.kill(helper, signal.SIGKILL)
    await render(channel, "good", "lost perhaps")
    assert await render(channel, "good", "again") == "[gMASK]<sop><|user|>\nagain"
    assert helper not in service.children()


def test_no_helper_outlives_a_killed_service() -> None:
    """kill -9 on the service closes the helper's stdin, which ends it."""
    with running("services.tokenizer") as process:
        children = process.children()
        assert children
        process.kill()
        deadline = time.monotonic() + 20
        while any(is_alive(child) for child in children):
            assert time.monotonic() < deadline, "a helper was left behind"
            time.sleep(0.01)


def test_bombs_that_go_off_at_compile_time_only_cost_their_own_template(tmp_path: Path) -> None:
    """Constants that the compiler folds into gigabytes or years: that template is off, the service serves."""
    models = ["good=models/glm-tiny"]
    for name, attack in {"years": "{{ 10 ** (10 ** 9) }}", "gigabytes": "{{ ['x' * 99999] * 99999 }}"}.items():
        directory = tmp_path / name
        directory.mkdir()
        shutil.copy("models/glm-tiny/tokenizer.json", directory)
        (directory / "chat_template.jinja").write_text(HARMLESS + attack)
        models.append(f"{name}={directory}")
    with running("services.tokenizer", AUTOGLM_MODELS=",".join(models)) as process:
        off = {line["model"] for line in process.lines if line.get("message") == "chat_template_off"}
        assert off == {"years", "gigabytes"}
        with grpc.insecure_channel(process.address) as channel:
            stub = tokenizer_pb2_grpc.TokenizerServiceStub(channel)
            assert stub.RenderChat(request("good"), timeout=10).text.endswith("now")
