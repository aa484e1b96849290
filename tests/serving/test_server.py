"""The server, over loopback, with the client that people use."""

import functools
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import httpx
import openai
import pytest
import torch
from datasets import Dataset
from fastapi.testclient import TestClient
from transformers import GenerationConfig

from hf_gradmem import GradMemConfig, GradMemForCausalLM, MemoryStore
from hf_gradmem.commands.packaged import RETRIEVAL_ADAPTER as ADAPTER
from hf_gradmem.commands.write_dataset import write_dataset
from hf_gradmem.serving.engine import Engine, Piece, QueueFullError, Read, Recite, Sampling, Write
from hf_gradmem.serving.prompts import chat_prompt
from hf_gradmem.serving.schema import Message
from hf_gradmem.serving.serve import make_server, token_for
from hf_gradmem.serving.shelf import Shelf
from hf_gradmem.tasks import load_task
from hf_gradmem.tasks.kv_retrieval import build_tokenizer
from hf_gradmem.writing.write import write_contexts
from tests.reading.test_confidence import WHOLE
from tests.support.command_line import mistake, run
from tests.support.small_models import small_tokenizer, templated

DEFAULTS: dict[str, Any] = {
    "model_name": "kv",
    "memories": None,
    "keep": None,
    "host": "127.0.0.1",
    "port": 0,
    "token": None,
    "batch_size": 16,
    "max_waiting": 64,
    "max_body": 1 << 16,
    "max_memories": 100,
    "timeout": 60.0,
    "max_new_tokens": 8,
}


@pytest.fixture(scope="module")
def model() -> GradMemForCausalLM:
    return GradMemForCausalLM.from_pretrained(ADAPTER)


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    arguments = {"num_pairs": 4, "key_length": 1, "value_length": 1, "end_mark": False}
    found = load_task("kv_retrieval", "test", num_contexts=16, **arguments)
    # A target ends in the token that ends an answer, which is no part of its text.
    return [row | {"targets": [target.removesuffix("|") for target in row["targets"]]} for row in found]


@contextmanager
def running(model: GradMemForCausalLM, **options: Any) -> Iterator[str]:
    """The address of a server that runs for a span, and has ended after it."""
    before = set(threading.enumerate())
    server = make_server(model, **DEFAULTS | options)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()
        assert not [other for other in set(threading.enumerate()) - before if other.name == "hf-gradmem"]


@pytest.fixture(scope="module")
def address(model: GradMemForCausalLM, rows: list[dict[str, Any]]) -> Iterator[str]:
    with running(model) as address:
        for number, row in enumerate(rows):
            written = httpx.post(f"{address}/v1/memories", json={"context": row["context"], "id": f"row/{number}"})
            assert written.status_code == 201, written.text
        yield address


def client_of(address: str, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0)


def expected(model: GradMemForCausalLM, row: dict[str, Any]) -> list[str]:
    """What the model itself answers to the queries of a row."""
    memory = model.write([row["context"]])
    answers = []
    for query in row["queries"]:
        ids = model.tokenizer(query, add_special_tokens=False, return_tensors="pt").input_ids
        tokens = model.generate(ids, memory=memory, max_new_tokens=4, do_sample=False)
        answers.append(model.tokenizer.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True))
    return answers


def test_answers_are_the_models_own(model, rows, address):
    client = client_of(address)
    for number, row in enumerate(rows[:4]):
        given = [
            client.completions.create(
                model="kv", prompt=query, max_tokens=4, extra_body={"memory": f"row/{number}"}
            ).choices[0]
            for query in row["queries"]
        ]
        assert [choice.text for choice in given] == expected(model, row)
        assert {choice.finish_reason for choice in given} == {"stop"}
        assert [choice.text for choice in given] == row["targets"]


def test_sixteen_clients_at_once_are_each_given_their_own_answer(rows, address):
    wrong: list[Any] = []

    def ask(number: int) -> None:
        with client_of(address) as client:
            for turn in range(4):
                row = rows[number]
                query = turn % len(row["queries"])
                asked = {"model": "kv", "messages": [{"role": "user", "content": row["queries"][query]}]}
                if turn % 2:
                    chunks = client.chat.completions.create(
                        **asked, stream=True, max_tokens=4, extra_body={"memory": f"row/{number}"}
                    )
                    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
                else:
                    answer = client.chat.completions.create(
                        **asked, max_completion_tokens=4, extra_body={"memory": f"row/{number}"}
                    )
                    text = answer.choices[0].message.content
                if text != row["targets"][query]:
                    wrong.append((number, query, text))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_stream_is_the_answer_in_parts_with_what_it_took(rows, address):
    client = client_of(address)
    asked = {"model": "kv", "prompt": rows[0]["queries"][0], "max_tokens": 4, "extra_body": {"memory": "row/0"}}
    whole = client.completions.create(**asked)
    parts = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(part.choices[0].text for part in parts if part.choices) == whole.choices[0].text
    assert parts[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert parts[-1].usage == whole.usage
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_names_its_memory_and_how_sure_a_calibrated_adapter_is(model, rows, monkeypatch, stream):
    """As `answer` itself, of answers that run together and end at different times."""
    monkeypatch.setattr(model.config, "confidence", WHOLE | {"features": ["gain"], "weights": [0.1], "bias": -0.5})
    queries = [query for row in rows[:4] for query in row["queries"]]
    asked = [(f"row/{number}", query) for number, row in enumerate(rows[:4]) for query in row["queries"]]
    found: dict[tuple[str, str], Any] = {}

    def ask(memory: str, query: str) -> None:
        with client_of(address) as client:
            messages = [{"role": "user", "content": query}]
            more = {"stream": stream, "extra_body": {"memory": memory}}
            answer = client.chat.completions.create(model="kv", messages=messages, max_tokens=4, **more)
            chunks = list(answer) if stream else [answer]
            assert not any("confidence" in chunk.model_extra for chunk in chunks[:-1])
            found[memory, query] = chunks[-1].model_extra

    with running(model) as address:
        for number, row in enumerate(rows[:4]):
            body = {"context": row["context"], "id": f"row/{number}"}
            httpx.post(f"{address}/v1/memories", json=body).raise_for_status()
        threads = [threading.Thread(target=ask, args=pair) for pair in asked]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    memory = model.write([row["context"] for row in rows[:4]])
    index = [number for number, row in enumerate(rows[:4]) for _ in row["queries"]]
    expected = model.answer(queries, memory, context_index=index, max_new_tokens=4)
    assert len({answer.confidence for answer in expected}) > 1
    for (name, query), answer in zip(asked, expected, strict=True):
        assert found[name, query]["memory"] == name
        assert found[name, query]["confidence"] == pytest.approx(answer.confidence, abs=1e-4)


def test_an_adapter_that_is_not_calibrated_has_no_confidence(rows, address):
    client = client_of(address)
    asked = {"model": "kv", "prompt": rows[0]["queries"][0], "max_tokens": 4, "extra_body": {"memory": "row/0"}}
    beside = {"memory": "row/0", "quote": None, "confidence": None}
    assert client.completions.create(**asked).model_extra == beside
    last = list(client.completions.create(**asked, stream=True))[-1]
    assert (last.choices[0].finish_reason, last.model_extra) == ("stop", beside)


def test_an_answer_ends_at_a_stop_or_at_its_length(rows, address):
    client = client_of(address)
    asked = {"model": "kv", "prompt": rows[0]["queries"][0], "extra_body": {"memory": "row/0"}}
    target = rows[0]["targets"][0]
    stopped = client.completions.create(**asked, stop=target[1:]).choices[0]
    assert (stopped.text, stopped.finish_reason) == (target[:1], "stop")
    streamed = client.completions.create(**asked, stop=target[1:], stream=True)
    assert "".join(part.choices[0].text for part in streamed) == target[:1]
    short = client.completions.create(**asked, max_tokens=1).choices[0]
    assert (short.text, short.finish_reason) == (target[:1], "length")


def test_a_seed_repeats_what_was_drawn(rows, address):
    client = client_of(address)
    asked = {"model": "kv", "prompt": "?", "max_tokens": 8, "temperature": 2.0, "extra_body": {"memory": "row/0"}}
    drawn = [client.completions.create(**asked, seed=seed).choices[0].text for seed in (1, 1, 2, 3)]
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) > 1


def test_a_temperature_next_to_zero_is_greedy(rows, address):
    asked = {"model": "kv", "prompt": rows[0]["queries"][0], "max_tokens": 4, "extra_body": {"memory": "row/0"}}
    for temperature in (1e-40, 1e-5):
        answer = client_of(address).completions.create(**asked, temperature=temperature, seed=1)
        assert answer.choices[0].text == rows[0]["targets"][0]


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("completions", {"model": "kv", "prompt": "?", "memory": "none"}, 404, "no memory 'none'"),
        ("completions", {"model": "gpt", "prompt": "?", "memory": "row/0"}, 404, "no model 'gpt' here, but 'kv'"),
        ("completions", {"model": "kv", "prompt": "?"}, 400, "memory: Field required"),
        ("completions", {"model": "kv", "prompt": "", "memory": "row/0"}, 400, "prompt is empty"),
        ("completions", {"model": "kv", "prompt": "?", "memory": "row/0", "logprobs": 3}, 400, "no such field"),
        ("completions", {"model": "kv", "prompt": "?", "memory": "row/0", "n": 2}, 400, "n: "),
        (
            "completions",
            {"model": "kv", "prompt": "?", "memory": "row/0", "stream_options": {"include_usage": True}},
            400,
            "stream_options goes with stream: true",
        ),
        (
            "chat/completions",
            {
                "model": "kv",
                "memory": "row/0",
                "messages": [{"role": "user", "content": "?"}],
                "max_tokens": 1,
                "max_completion_tokens": 2,
            },
            400,
            "either max_completion_tokens or max_tokens",
        ),
        ("completions", {"model": "kv", "prompt": "?", "memory": "row/0", "seed": 2**63}, 400, "seed: Input should be"),
        ("completions", {"model": "kv", "prompt": "?" * 300, "memory": "row/0"}, 400, "the base takes 256"),
        ("chat/completions", {"model": "kv", "messages": [], "memory": "row/0"}, 400, "messages: "),
        (
            "chat/completions",
            {"model": "kv", "messages": [{"role": "user", "content": "?"}] * 2, "memory": "row/0"},
            400,
            "takes one question",
        ),
        ("memories", {"context": " "}, 400, "empty text"),
        ("memories", {"context": "!a:b!", "id": "../out"}, 400, "begins with a letter"),
        ("memories", {"context": "!a:b!", "id": "a/../b"}, 400, "no part . or .. between its slashes"),
        ("memories", {"context": "!a:b!", "id": "a/."}, 400, "no part . or .. between its slashes"),
        ("memories", {"context": "!a:b!", "id": "row/0"}, 409, "already"),
        ("memories", {"context": ["!a:b!", ""]}, 400, "empty text"),
        ("memories", {"context": "a" * (1 << 16)}, 413, "longer than 65536 bytes"),
    ],
)
def test_a_request_that_cannot_be_met_is_told_why(path, body, status, message, address):
    answer = httpx.post(f"{address}/v1/{path}", json=body, timeout=30)
    assert answer.status_code == status, answer.text
    assert message in answer.json()["error"]["message"]


def test_nulls_in_a_request_are_as_good_as_absent(address):
    plain = {"model": "kv", "prompt": "?!", "memory": "row/0", "max_tokens": 2}
    nulls = dict.fromkeys(["temperature", "top_p", "stop", "stream", "n", "seed", "user", "stream_options"])
    answers = [httpx.post(f"{address}/v1/completions", json=plain | more, timeout=30) for more in ({}, nulls)]
    assert [answer.status_code for answer in answers] == [200, 200]
    assert answers[0].json()["choices"] == answers[1].json()["choices"]


def test_a_failure_that_nobody_foresaw_is_told_in_the_form_of_errors(model, monkeypatch):
    def full(*arguments):
        raise OSError("No space left in /a/folder/of/this/machine")

    monkeypatch.setattr(Shelf, "add", full)
    with running(model) as address:
        answer = httpx.post(f"{address}/v1/memories", json={"context": "!a:b!"}, timeout=30)
    assert answer.status_code == 500
    error = answer.json()["error"]
    assert (error["message"], error["type"]) == ("The server failed (OSError).", "server_error")


def test_memories_are_listed_described_and_forgotten(address):
    assert httpx.post(f"{address}/v1/memories", json={"context": ["!a:b!", "!c:d!"], "id": "mine"}).status_code == 201
    described = httpx.get(f"{address}/v1/memories/mine").json()
    assert described["num_context_tokens"] == 10
    assert len(described["write_losses"]) == described["write_steps"] == 2
    first = httpx.get(f"{address}/v1/memories", params={"limit": 2}).json()
    assert len(first["data"]) == 2
    assert first["has_more"]
    rest = httpx.get(f"{address}/v1/memories", params={"after": first["data"][-1]["id"]}).json()
    listed = [memory["id"] for memory in first["data"] + rest["data"]]
    assert "mine" in listed
    assert len(listed) == len(set(listed)) == 17
    assert httpx.delete(f"{address}/v1/memories/mine").json()["deleted"]
    assert httpx.delete(f"{address}/v1/memories/mine").status_code == 404
    assert httpx.get(f"{address}/v1/memories/mine").status_code == 404


def test_a_text_beyond_the_window_is_cut_into_segments(address):
    written = httpx.post(f"{address}/v1/memories", json={"context": "!a:b!" * 100, "id": "long"}, timeout=60)
    assert written.status_code == 201, written.text
    assert written.json()["num_context_tokens"] == 500
    httpx.delete(f"{address}/v1/memories/long").raise_for_status()


def test_what_clients_wrote_is_there_after_a_restart(model, rows, tmp_path):
    with running(model, keep=tmp_path / "kept") as address:
        assert (
            httpx.post(f"{address}/v1/memories", json={"context": rows[0]["context"], "id": "a/b c"}).status_code == 201
        )
    (tmp_path / "kept" / "half").mkdir()  # as a kill in the middle of a write would leave it
    with running(model, keep=tmp_path / "kept") as address:
        assert [memory["id"] for memory in httpx.get(f"{address}/v1/memories").json()["data"]] == ["a/b c"]
        answer = client_of(address).completions.create(
            model="kv", prompt=rows[0]["queries"][1], extra_body={"memory": "a/b c"}
        )
        assert answer.choices[0].text == rows[0]["targets"][1]
        assert httpx.delete(f"{address}/v1/memories/a%2Fb%20c").status_code == 200
    assert not list((tmp_path / "kept").glob("*/memory.safetensors"))


def test_others_need_the_token_and_the_name_of_this_machine(model):
    with running(model, token="secret") as address:
        assert httpx.get(f"{address}/v1/models").status_code == 401
        assert client_of(address, "secret").models.list().data[0].id == "kv"
        with pytest.raises(openai.AuthenticationError):
            client_of(address, "guess").models.list()
    with running(model) as address:
        refused = httpx.get(f"{address}/v1/models", headers={"Host": "page.example"})
        assert refused.status_code == 400
        assert "is called by 127.0.0.1, localhost" in refused.json()["error"]["message"]
    with TestClient(make_server(model, **DEFAULTS | {"host": "127.0.0.2"}).config.app, "http://127.0.0.2") as client:
        assert client.get("/v1/models").status_code == 200
        assert client.get("/v1/models", headers={"Host": "page.example"}).status_code == 400
    assert token_for("127.0.0.1", None) is None
    assert token_for("::1", None) is None
    assert len(token_for("0.0.0.0", None) or "") >= 24
    assert token_for("0.0.0.0", "mine") == "mine"


@pytest.mark.parametrize(
    ("token", "known", "unknown"),
    [
        ("gehört", ["gehört".encode(), "gehört".encode("latin-1")], [b"gehort", "gehört".encode("cp437")]),
        ("ключ", ["ключ".encode()], ["ключ".encode("koi8-r")]),
        ("\udcff", [b"\xff"], ["ÿ".encode()]),  # as Python reads a variable of the environment that is not UTF-8
        ("plain", [b"plain"], ["plaín".encode()]),
    ],
)
def test_a_token_may_have_any_letters(token, known, unknown, model):
    with running(model, token=token) as address:
        for status, sent in ((200, known), (401, unknown)):
            for each in sent:
                headers = {b"Authorization": b"Bearer " + each}
                assert httpx.get(f"{address}/v1/models", headers=headers).status_code == status, each


def test_the_command_says_that_it_serves_once_it_listens_and_refuses_a_port_that_is_taken(monkeypatch):
    def ask(sockets: list[socket.socket]) -> None:
        ports.extend({each.getsockname()[1] for each in sockets})
        socket.create_connection(("localhost", ports[0])).close()

    ports: list[int] = []
    monkeypatch.setattr("hf_gradmem.serving.serve.make_server", lambda *_, **__: SimpleNamespace(run=ask))
    served = run("serve", ADAPTER, "--host", "localhost", "--port", 0)
    assert served.exit_code == 0, served.output
    assert f"http://localhost:{ports[0]}/v1 until interrupted" in served.output
    monkeypatch.setattr("hf_gradmem.commands.opening.load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert f"127.0.0.1:{port} cannot be listened at: Address already in use" in mistake(
            run("serve", ADAPTER, "--port", port)
        )
    assert "no.such.host.invalid:8000 cannot be listened at" in mistake(
        run("serve", ADAPTER, "--host", "no.such.host.invalid")
    )


def test_a_folder_is_served_under_its_name_however_it_is_given(monkeypatch, tmp_path):
    names = []
    server = SimpleNamespace(run=lambda sockets: None)
    monkeypatch.setattr(
        "hf_gradmem.serving.serve.make_server", lambda *_, model_name, **__: names.append(model_name) or server
    )
    (tmp_path / "latest").symlink_to(ADAPTER)
    for folder, given in ((ADAPTER, "."), (ADAPTER / "..", f"{ADAPTER.name}/"), (tmp_path, "latest")):
        monkeypatch.chdir(folder)
        assert run("serve", given, "--port", 0).exit_code == 0
    assert names == [ADAPTER.name, ADAPTER.name, "latest"]


@pytest.mark.parametrize("given", [[], ["--token", ""], ["--token", "mine"]])
def test_a_token_that_was_made_up_is_shown(monkeypatch, given):
    needed = []
    server = SimpleNamespace(run=lambda sockets: None)
    monkeypatch.setattr("hf_gradmem.serving.serve.make_server", lambda *_, token, **__: needed.append(token) or server)
    served = run("--quiet", "serve", ADAPTER, "--host", "0.0.0.0", "--port", 0, *given)
    assert served.exit_code == 0, served.output
    assert served.output == ("" if "mine" in given else f"Requests need this token: {needed[0]}\n")
    assert needed[0]


def test_more_than_the_queue_holds_are_told_to_come_again(model, rows, monkeypatch):
    entered, leave = threading.Event(), threading.Event()

    def slow(*arguments: Any, **options: Any) -> Any:
        entered.set()
        assert leave.wait(20)
        return write_contexts(*arguments, **options)

    monkeypatch.setattr("hf_gradmem.serving.engine.write_contexts", slow)
    statuses: list[int] = []

    def post(name: str) -> None:
        body = {"context": rows[0]["context"], "id": name}
        statuses.append(httpx.post(f"{address}/v1/memories", json=body, timeout=30).status_code)

    with running(model, max_waiting=1) as address:
        first = threading.Thread(target=post, args=("one",))
        first.start()
        assert entered.wait(20)
        second = threading.Thread(target=post, args=("two",))
        second.start()
        while (health := httpx.get(f"{address}/health").json())["waiting"] < 1:
            time.sleep(0.01)
        assert health == {"status": "ok", "waiting": 1, "running": 1}
        refused = httpx.post(f"{address}/v1/memories", json={"context": rows[0]["context"], "id": "three"})
        assert refused.status_code == 503
        assert refused.headers["Retry-After"] == "1"
        leave.set()
        first.join()
        second.join()
    assert statuses == [201, 201]


def test_requests_that_were_given_up_leave_room_in_the_queue(model):
    entered, leave = threading.Event(), threading.Event()
    engine = Engine(model, max_waiting=2)
    try:
        engine.submit(Write(lambda _: entered.set() or leave.wait(20), "ab"))
        assert entered.wait(20)
        given_up, waiting, late = (Write(lambda _: None, "ab") for _ in range(3))
        engine.submit(given_up)
        engine.submit(waiting)
        given_up.cancelled.set()
        engine.submit(late)
        with pytest.raises(QueueFullError):
            engine.submit(Write(lambda _: None, "ab"))
        assert engine.num_waiting == 2
        waiting.cancelled.set()
        assert engine.num_waiting == 1
    finally:
        leave.set()
        engine.close()


def test_a_request_that_takes_too_long_is_given_up(model, monkeypatch):
    monkeypatch.setattr("hf_gradmem.serving.engine.write_contexts", lambda *_, **__: time.sleep(1.0))
    with running(model, timeout=0.2) as address:
        answer = httpx.post(f"{address}/v1/memories", json={"context": "!a:b!"}, timeout=30)
    assert answer.status_code == 504
    assert "0.2 seconds" in answer.json()["error"]["message"]


def test_the_time_of_a_request_is_that_of_all_it_has_done(monkeypatch, tmp_path):
    model = templated(build_tokenizer(), {"context": "{context}|", "query": "{context}?{query}:"})
    model.write("abc").save_pretrained(tmp_path / "a")
    for name in ("reconstruct", "generate"):
        done = getattr(model, name)
        monkeypatch.setattr(model, name, lambda *given, done=done, **more: time.sleep(0.7) or done(*given, **more))
    body = {"model": "kv", "memory": "a", "messages": [{"role": "user", "content": "k"}], "max_tokens": 1}
    with running(model, timeout=1.0, keep=tmp_path) as address:
        assert httpx.post(f"{address}/v1/chat/completions", json=body, timeout=30).status_code == 504


def test_a_server_that_ends_stops_answers_in_the_middle(model, rows):
    told: list[Any] = []

    def ask() -> None:
        try:
            parts = client_of(address).completions.create(
                model="kv", prompt="?", max_tokens=200, stream=True, temperature=1.0, extra_body={"memory": "a"}
            )
            for part in parts:
                told.append(part)
                begun.set()
        except (openai.APIError, httpx.HTTPError) as error:
            told.append(error)

    begun = threading.Event()
    with running(model) as address:
        httpx.post(f"{address}/v1/memories", json={"context": rows[0]["context"], "id": "a"})
        thread = threading.Thread(target=ask)
        thread.start()
        assert begun.wait(20)
    thread.join(20)
    assert not thread.is_alive()


def test_a_memory_is_recited_in_the_thread_that_owns_the_model(monkeypatch):
    torch.manual_seed(0)
    model = templated(build_tokenizer(), {"context": "{context}|", "query": "{context}?{query}:"})
    threads, reconstruct = [], model.reconstruct

    def record(*given, **options):
        threads.append(threading.current_thread().name)
        return reconstruct(*given, **options)

    monkeypatch.setattr(model, "reconstruct", record)
    with running(model) as address:
        memory = httpx.post(f"{address}/v1/memories", json={"context": "abc", "id": "a"})
        assert memory.status_code == 201, memory.text
        asked = {"model": "kv", "messages": [{"role": "user", "content": "k"}], "max_tokens": 2}
        chats = [client_of(address).chat.completions.create(**asked, extra_body={"memory": "a"}) for _ in range(2)]
    assert threads == ["hf-gradmem"]
    (answer,) = model.answer("k", model.write("abc"), max_new_tokens=2)
    assert [chat.choices[0].message.content.strip() for chat in chats] == [answer.text] * 2
    assert chats[0].usage.prompt_tokens == 3 + len("|?k:")


def told_by(jobs: list[Any], model: GradMemForCausalLM) -> list[list[Piece]]:
    """What an engine tells jobs that wait while it writes: those of one kind run as one batch."""
    pieces: list[list[Piece]] = [[] for _ in jobs]
    entered, leave = threading.Event(), threading.Event()
    engine = Engine(model)
    try:
        engine.submit(Write(lambda _: entered.set() or leave.wait(20), "ab"))
        assert entered.wait(20)
        for job, told in zip(jobs, pieces, strict=True):
            engine.submit(job(told.append))
        leave.set()
        while not all(told and (told[-1].finish_reason or told[-1].error or told[-1].memory) for told in pieces):
            assert engine._thread.is_alive()
            time.sleep(0.01)
    finally:
        engine.close()
    return pieces


def test_a_request_that_fails_fails_alone(model, rows):
    bad, good = told_by([lambda tell: Write(tell, ""), lambda tell: Write(tell, rows[0]["context"])], model)
    assert "has no tokens" in str(bad[0].error)
    torch.testing.assert_close(good[0].memory.embeddings, model.write([rows[0]["context"]]).embeddings)


@pytest.mark.parametrize("job", [Recite, functools.partial(Read, prompt=[5, 6], max_new_tokens=3, sampling=Sampling())])
def test_a_memory_of_several_contexts_is_refused_and_does_not_shift_what_others_are_told(job, model):
    several, one = model.write(["!a:b!", "!c:d!"]), model.write("!e:f!")
    bad, good = told_by([lambda tell: job(tell, memory=several), lambda tell: job(tell, memory=one)], model)
    assert [str(piece.error) for piece in bad] == ["A request reads the memory of one context, got 2. Give memory[0]."]
    (alone,) = told_by([lambda tell: job(tell, memory=one)], model)
    assert [piece.text for piece in good] == [piece.text for piece in alone]


def test_requests_with_a_seed_are_drawn_as_if_each_were_alone(model):
    memory, sampling = model.write("!a:b!"), Sampling(temperature=2.0, seed=3)
    both = told_by([lambda tell: Read(tell, memory, [5, 6], 6, sampling)] * 2, model)
    texts = ["".join(piece.text for piece in told) for told in both]
    assert texts[0] == texts[1]


def test_a_seed_leaves_the_draws_of_other_requests_alone(model):
    memory = model.write("!a:b!")
    drawn = []
    for seed in (1, None, 1, None):
        read = functools.partial(
            Read, memory=memory, prompt=[5, 6], max_new_tokens=20, sampling=Sampling(2.0, seed=seed)
        )
        drawn.append(["".join(piece.text for piece in told) for told in told_by([read] * 8, model)])
    assert drawn[0] == drawn[2]
    assert drawn[1] != drawn[3]


def test_a_confidence_does_not_depend_on_the_requests_beside(model, monkeypatch):
    monkeypatch.setattr(model.config, "confidence", WHOLE | {"features": ["write_loss"]})
    memories = [model.write("!a:b!", measure_final_loss=True), model.write("!c:d!")]
    reads = [
        lambda tell, memory=memory: Read(tell, memory, model.tokenizer("?!a:").input_ids, 3, Sampling())
        for memory in memories
    ]
    together = [told[-1].confidence for told in told_by(reads, model)]
    assert together == [told_by([read], model)[0][-1].confidence for read in reads]
    assert together[0] != together[1] == 0.5  # as the mean, of which nothing is known


def test_an_answer_ends_where_the_window_does(model):
    window = model.decoder.window
    prompt = "?" * (window - model.read_phase.prefix_length - 2)
    with running(model) as address:
        httpx.post(f"{address}/v1/memories", json={"context": "!a:b!", "id": "a"})
        asked = {"model": "kv", "max_tokens": 500, "temperature": 2.0, "extra_body": {"memory": "a"}}
        answer = client_of(address).completions.create(prompt=prompt, **asked)
        with pytest.raises(openai.BadRequestError, match=f"takes {window} with the memory"):
            client_of(address).completions.create(prompt=prompt + "??", **asked)
    assert answer.usage.completion_tokens <= 2


def test_an_id_is_given_once_though_two_ask_for_it_at_once(model):
    shelf, memory = Shelf(None, None, max_memories=1), model.write("!a:b!")
    shelf.check_new("a")
    shelf.check_new("b")
    shelf.add("a", memory)
    with pytest.raises(ValueError, match="already"):
        shelf.add("a", memory)
    with pytest.raises(ValueError, match="no room"):
        shelf.add("b", memory)


def test_an_id_that_is_too_long_for_the_name_of_a_folder_is_refused_before_anything_is_written(model, tmp_path):
    too_long, longest = "a" + "/" * 99, "a" * 30 + "/" * 70
    with pytest.raises(ValueError, match="Give a shorter id"):
        Shelf(None, tmp_path, max_memories=1).check_new(too_long)
    Shelf(None, None, max_memories=1).check_new(too_long)  # which names no folder
    Shelf(None, tmp_path, max_memories=1).add(longest, model.write("!a:b!"))
    assert Shelf(None, tmp_path, max_memories=1).ids() == [longest]


def test_a_kept_memory_with_the_id_of_one_of_the_store_is_refused_at_the_start(model, tmp_path):
    write_dataset(model, Dataset.from_dict({"id": ["a/b", "c"], "context": ["!a:1!", "!c:1!"]}), tmp_path / "store")
    store, kept = MemoryStore.from_pretrained(tmp_path / "store"), tmp_path / "kept"
    Shelf(None, kept, max_memories=9).add("a/b", model.write("!a:b!"))
    with pytest.raises(ValueError, match=r"has a memory 'a/b', and .*kept/a%2Fb holds another.* Move that folder away"):
        make_server(model, **DEFAULTS | {"memories": store, "keep": kept})
    (kept / "a%2Fb").rename(kept / "mine")
    assert Shelf(store, kept, max_memories=9).ids() == ["a/b", "c", "mine"]


@pytest.mark.parametrize("adds_begin", [False, True])
def test_a_token_that_begins_every_turn_begins_the_first_of_several(adds_begin, monkeypatch):
    tokenizer = small_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}<s>{{ message['content'] }}{% endfor %}</s>"
    monkeypatch.setattr("hf_gradmem.template.leading_tokens", lambda tokenizer: [1] if adds_begin else [])
    model = templated(tokenizer, "chat")
    turns = [Message(role=role, content=text) for role, text in (("system", "a"), ("user", "b"))]
    first = "" if adds_begin else "<s>"
    for sent, text in ((turns[1:], f"{first}b</s>"), (turns, f"{first}a<s>b</s>")):
        assert tokenizer.decode(chat_prompt(model, sent)).replace(" ", "") == text


def test_turns_that_the_chat_template_refuses_are_the_clients_mistake():
    tokenizer = small_tokenizer()
    tokenizer.chat_template = (
        "{% for message in messages %}{% if message['role'] == 'system' %}{{ raise_exception('No system role') }}"
        "{% elif (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}"
        "{% endif %}{{ message['content'] }}{% endfor %}"
    )
    asked, user = {"model": "kv", "memory": "a", "max_tokens": 1}, {"role": "user", "content": "b"}
    with TestClient(make_server(templated(tokenizer, "chat"), **DEFAULTS).config.app, "http://localhost") as client:
        client.post("/v1/memories", json={"context": "ab", "id": "a"}).raise_for_status()
        for turns, reason in (
            ([user, user], "refuses turns of user, user: Roles must alternate"),
            ([user | {"role": "system"}, user], "refuses turns of system, user: No system role"),
        ):
            answer = client.post("/v1/chat/completions", json=asked | {"messages": turns})
            assert answer.status_code == 400
            assert reason in answer.json()["error"]["message"]


def test_folders_of_any_name_are_opened_and_deleted_where_they_lie(model, tmp_path, monkeypatch):
    memory = model.write("!a:b!")
    memory.save_pretrained(tmp_path / "my notes")
    shelf = Shelf(None, tmp_path, max_memories=9)
    shelf.add("a/b", memory)
    assert shelf.ids() == ["a/b", "my notes"]
    assert shelf["my notes"] == shelf["a/b"] == memory
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", Mock(side_effect=PermissionError("no")))
        with pytest.raises(PermissionError):
            shelf.delete("my notes")
    assert shelf.ids() == ["a/b", "my notes"]  # as after a restart
    for name in shelf.ids():
        shelf.delete(name)
    assert not shelf.ids()
    assert list(tmp_path.iterdir()) == []


def test_a_begun_stop_is_held_back_behind_which_half_a_character_stands(model):
    class Bytes:
        eos_token_id = pad_token_id = 0

        def decode(self, tokens, **_):
            return bytes(tokens).decode("utf-8", errors="replace")

    class Speller:
        """Says what it is to say, byte by byte."""

        tokenizer, config, generation_config, device = Bytes(), GradMemConfig(), GenerationConfig(), "cpu"

        def generate(self, *_, stopping_criteria, **__):
            for byte in "yes a\u00e9 no".encode():
                stopping_criteria[0](torch.tensor([[byte]]), None)

    job = functools.partial(Read, memory=model.write("!a:b!"), prompt=[1], max_new_tokens=100, sampling=Sampling())
    ((*_, last),) = told = told_by([functools.partial(job, stop=("a\u00e9",))], Speller())
    assert "".join(piece.text for piece in told[0]) == "yes "
    assert last.finish_reason == "stop"
