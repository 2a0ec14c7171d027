"""An endpoint picker in a process of its own, so that a test can kill or stop it.

    python -m tests.fakes.picker_process PORT LABELS;IP:PORT …

It sends every request to the endpoint named for the request's subset labels (labels may be
empty). Unary requests are decided on the body, the method `Echo` (a bidirectional stream) on the headers. Each
stream prints what it was told, as JSON, when the response headers have come.
"""

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Self

import grpc
from autoglm.third_party import ext_proc_pb2 as pb
from autoglm.third_party import ext_proc_pb2_grpc

REPOSITORY = Path(__file__).resolve().parents[2]
KEY = "x-gateway-destination-endpoint"
BUFFERED = 2
SEND = 1


class _Picker(ext_proc_pb2_grpc.ExternalProcessorServicer):
    def __init__(self, targets: dict[str, str]) -> None:
        self._targets = targets

    async def Process(self, requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        labels = dict(context.invocation_metadata()).get("x-autoglm-subset-labels", "")
        target = self._targets[labels]
        seen: dict[str, Any] = {"labels": labels, "parts": []}
        async for request in requests:
            part = request.WhichOneof("request")
            seen["parts"].append(part)
            answer = pb.ProcessingResponse()
            if part == "request_headers":
                headers = {h.key: h.raw_value.decode() or h.value for h in request.request_headers.headers.headers}
                seen["headers"] = headers
                if headers[":path"].endswith("/Echo"):
                    _choose(answer, answer.request_headers.response, target)
                else:
                    answer.request_headers.SetInParent()
                    answer.mode_override.request_body_mode = BUFFERED
                    answer.mode_override.response_header_mode = SEND
            elif part == "request_body":
                seen["body_bytes"] = len(request.request_body.body)
                _choose(answer, answer.request_body.response, target)
            else:
                served = request.metadata_context.filter_metadata["envoy.lb"]
                seen["served"] = dict(served).get(KEY + "-served")
                answer.response_headers.SetInParent()
                print(json.dumps(seen), flush=True)
            yield answer


def _choose(answer: Any, common: Any, target: str) -> None:
    option = common.header_mutation.set_headers.add()
    option.header.key = KEY
    option.header.raw_value = target.encode()
    option.append_action = 2
    answer.dynamic_metadata.update({"envoy.lb": {KEY: target}})


class PickerProcess:
    """Starts the picker and waits until it listens. Use with `async with`."""

    def __init__(self, port: int, targets: dict[str, str]) -> None:
        self._arguments = [str(port), *(f"{labels};{target}" for labels, target in targets.items())]
        self.process: asyncio.subprocess.Process

    async def __aenter__(self) -> Self:
        self.process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "tests.fakes.picker_process",
            *self._arguments,
            cwd=REPOSITORY,
            stdout=asyncio.subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join((str(REPOSITORY), str(REPOSITORY / "sdk")))},
        )
        assert await self._line() == b"listening\n"
        return self

    async def __aexit__(self, *_: object) -> None:
        if self.process.returncode is None:
            self.process.kill()
        await self.process.wait()

    async def seen(self) -> dict[str, Any]:
        """What the next request told the picker."""
        found: dict[str, Any] = json.loads(await asyncio.wait_for(self._line(), 10))
        return found

    async def _line(self) -> bytes:
        assert self.process.stdout is not None
        return await self.process.stdout.readline()


async def _main(port: str, *targets: str) -> None:
    server = grpc.aio.server()
    picker = _Picker(dict(target.split(";", 1) for target in targets))  # type: ignore[arg-type]  # two parts each
    ext_proc_pb2_grpc.add_ExternalProcessorServicer_to_server(picker, server)  # type: ignore[no-untyped-call]
    assert server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    print("listening", flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(_main(*sys.argv[1:]))
