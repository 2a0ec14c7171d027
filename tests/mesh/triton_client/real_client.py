"""Runs where the real tritonclient is installed: uses it as its documentation says and prints what came, in JSON.

real_client.py text ADDRESS      generation: blocking, streaming, many on one stream, asyncio, errors
real_client.py tensors ADDRESS   a convolution net: metadata, chosen outputs, errors
"""

import asyncio
import json
import queue
import sys

import numpy as np
import tritonclient.grpc as client
import tritonclient.grpc.aio as aio_client
from tritonclient.utils import InferenceServerException

GREEDY = {"temperature": 0, "max_tokens": 6, "ignore_eos": True}
IDS = [1, 2, 50, 60, 70, 80]


def tensor(name, array, datatype):
    made = client.InferInput(name, list(array.shape), datatype)
    made.set_data_from_numpy(array)
    return made


def ids_tensor():
    return tensor("input_ids", np.array([IDS], np.int32), "INT32")


def text_tensor(text):
    return tensor("text_input", np.array([text.encode()], dtype=object), "BYTES")


def flag(name, value=True):
    return tensor(name, np.array([value]), "BOOL")


def sampling(values):
    return tensor("sampling_parameters", np.array([json.dumps(values).encode()], dtype=object), "BYTES")


def texts(result):
    return [element.decode() for element in result.as_numpy("text_output").reshape(-1)]


def is_final(result):
    return result.get_response().parameters["triton_final_response"].bool_param


def collect(server, requests, want):
    """Answers of all `requests`, by request id, until each had its last; errors as text."""
    answers = queue.Queue()
    server.start_stream(callback=lambda result, error: answers.put((result, error)))
    for number, inputs in enumerate(requests):
        server.async_stream_infer("glm-tiny", inputs, request_id=f"r{number}", enable_empty_final_response=True)
    found, left = {}, len(requests)
    while left:
        result, error = answers.get(timeout=60)
        if error is not None:
            found.setdefault("errors", []).append(error.message())
            left -= 1
            continue
        found.setdefault(result.get_response().id, []).append(want(result))
        left -= is_final(result)
    server.stop_stream()
    return found


async def with_asyncio(address):
    """The same through the client's asyncio face, whose stream is an iterator of (result, error)."""
    async with aio_client.InferenceServerClient(address) as server:

        async def requests():
            yield {
                "model_name": "glm-tiny",
                "inputs": [ids_tensor(), flag("stream"), sampling(GREEDY)],
                "request_id": "a",
                "enable_empty_final_response": True,
            }

        ids = []
        async for result, error in server.stream_infer(requests()):
            assert error is None, error
            ids += result.as_numpy("output_ids").reshape(-1).tolist()
        return ids


def attempt(call):
    try:
        call()
    except InferenceServerException as error:
        return [error.status(), error.message()]
    return None


def text(server, address):
    prompt = "def add(a, b):\n"
    blocking = server.infer("glm-tiny", [ids_tensor(), sampling(GREEDY)])
    whole = server.infer("glm-tiny", [text_tensor(prompt), sampling(GREEDY)])
    bare = server.infer("glm-tiny", [text_tensor(prompt), sampling(GREEDY), flag("exclude_input_in_output")])
    counted = server.infer(
        "glm-tiny",
        [
            ids_tensor(),
            sampling(GREEDY),
            *(flag(f"return_{name}") for name in ("finish_reason", "num_input_tokens", "num_output_tokens")),
        ],
    )
    by_parameters = server.infer("glm-tiny", [ids_tensor()], parameters=GREEDY)
    many = [[ids_tensor(), flag("stream"), sampling(GREEDY | {"max_tokens": 3 + n})] for n in range(5)]
    return {
        "live": server.is_server_live(),
        "ready": [server.is_server_ready(), server.is_model_ready("glm-tiny"), server.is_model_ready("other")],
        "server": server.get_server_metadata(as_json=True),
        "model": server.get_model_metadata("glm-tiny", as_json=True),
        "blocking": blocking.as_numpy("output_ids").tolist(),
        "by_parameters": by_parameters.as_numpy("output_ids").tolist(),
        "counted": {
            "finish_reason": counted.as_numpy("finish_reason")[0].decode(),
            "num_input_tokens": int(counted.as_numpy("num_input_tokens")[0]),
            "num_output_tokens": int(counted.as_numpy("num_output_tokens")[0]),
        },
        "text": {"prompt": prompt, "whole": texts(whole), "bare": texts(bare)},
        "streamed_text": collect(server, [[text_tensor(prompt), flag("stream"), sampling(GREEDY)]], texts),
        "one_answer": collect(server, [[text_tensor(prompt), sampling(GREEDY)]], texts),
        "many": collect(server, many, lambda result: result.as_numpy("output_ids").reshape(-1).tolist()),
        "asyncio": asyncio.run(with_asyncio(address)),
        "error_on_stream": collect(
            server,
            [[ids_tensor(), sampling({"temperature": 1000})], [ids_tensor(), sampling(GREEDY)]],
            lambda result: result.as_numpy("output_ids").reshape(-1).tolist(),
        ),
        "unknown_model": attempt(lambda: server.infer("other", [ids_tensor()])),
        "client_timeout": attempt(
            lambda: server.infer(
                "glm-tiny", [ids_tensor()], parameters=GREEDY | {"max_tokens": 2000}, client_timeout=0.3
            )
        ),
    }


def tensors(server, address):
    image = np.arange(32, dtype=np.float32).reshape(2, 1, 4, 4)
    inputs = [tensor("image", image, "FP32")]
    every = server.infer("net", inputs, request_id="7")
    mean = server.infer("net", inputs, outputs=[client.InferRequestedOutput("mean")])
    answers = queue.Queue()
    server.start_stream(callback=lambda result, error: answers.put((result, error)))
    for number in range(4):
        server.async_stream_infer("net", [tensor("image", image * number, "FP32")], request_id=str(number))
    order = [answers.get(timeout=60)[0] for _ in range(4)]
    server.stop_stream()
    done = queue.Queue()
    server.async_infer("net", inputs, callback=lambda result, error: done.put((result, error)))
    later, error = done.get(timeout=60)
    wrong = tensor("image", image[0], "FP32")
    return {
        "ready": server.is_model_ready("net"),
        "model": server.get_model_metadata("net", as_json=True),
        "id": every.get_response().id,
        "features": every.as_numpy("features").tolist(),
        "mean": mean.as_numpy("mean").reshape(-1).tolist(),
        "names": [output.name for output in mean.get_response().outputs],
        "stream_order": [result.get_response().id for result in order],
        "stream_scales": [float(result.as_numpy("features").max()) for result in order],
        "async_infer": later.as_numpy("mean").reshape(-1).tolist() if error is None else str(error),
        "wrong_shape": attempt(lambda: server.infer("net", [wrong])),
        "wrong_output": attempt(lambda: server.infer("net", inputs, outputs=[client.InferRequestedOutput("nope")])),
        "not_here": attempt(lambda: server.get_inference_statistics("net")),
    }


if __name__ == "__main__":
    verb, where = sys.argv[1:]
    with client.InferenceServerClient(where) as connected:
        json.dump({"text": text, "tensors": tensors}[verb](connected, where), sys.stdout)
