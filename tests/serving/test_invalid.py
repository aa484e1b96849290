"""How a request that cannot be read is told what is wrong with it."""

import json
from collections.abc import Iterator

import pytest
from fastapi.testclient import TestClient

from hf_gradmem import GradMemForCausalLM
from hf_gradmem.commands.packaged import RETRIEVAL_ADAPTER
from hf_gradmem.serving.serve import make_server
from tests.serving.test_server import DEFAULTS

JSON = "application/json"


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    server = make_server(GradMemForCausalLM.from_pretrained(RETRIEVAL_ADAPTER), **DEFAULTS)
    with TestClient(server.config.app, "http://localhost") as client:
        client.post("/v1/memories", json={"context": "!a:b!", "id": "a"}).raise_for_status()
        yield client


def refused(client: TestClient, path: str, content: str, content_type: str | None = JSON) -> tuple[str, str | None]:
    """Message and field of a request that is a client's mistake."""
    headers = {} if content_type is None else {"Content-Type": content_type}
    answer = client.post(f"/v1/{path}", content=content, headers=headers)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    return error["message"], error["param"]


def test_a_body_that_is_no_json_is_told_where(client):
    told = refused(client, "memories", '{"id":"p2","context":')
    assert told == ("The body is not JSON: Expecting value at character 21.", None)


@pytest.mark.parametrize(
    ("path", "content", "message", "field"),
    [
        ("memories", '{"context": 5}', "context: Input should be a valid string", "context"),
        ("memories", '{"context": {"text": 5}}', "context: Input should be a valid string", "context"),
        ("memories", '{"context": ["!a:b!", 5]}', "context.1: Input should be a valid string", "context.1"),
        ("memories", "{}", "context: Field required", "context"),
        ("completions", '{"model": "kv", "memory": "a", "prompt": "?", "stop": [5]}', "stop.0: Input", "stop.0"),
        ("completions", '{"model": "kv", "memory": "a", "prompt": "?", "stop": 5}', "stop: Input", "stop"),
        (
            "completions",
            '{"model": "kv", "memory": "a", "prompt": "?", "stream_options": {"usage": true}}',
            "stream_options.usage: Input should be 'include_usage'",
            "stream_options.usage",
        ),
        (
            "chat/completions",
            '{"model": "kv", "memory": "a", "messages": [{"role": "user"}]}',
            "messages.0.content: Field required",
            "messages.0.content",
        ),
    ],
)
def test_a_mistake_is_told_under_the_name_of_its_field(path, content, message, field, client):
    told, param = refused(client, path, content)
    assert told.startswith(message)
    assert param == field


@pytest.mark.parametrize(
    ("content_type", "got"), [(None, "none"), ("text/plain", "text/plain"), ("application/x-www-form-urlencoded",) * 2]
)
def test_json_that_is_not_called_json_is_told_so(content_type, got, client):
    told = refused(client, "memories", '{"context": "!a:b!"}', content_type)
    assert told == (f"The header Content-Type must be application/json, got {got}.", None)


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("memories", {"context": "a\ud83d"}, "context"),
        ("memories", {"context": ["a", "a\ude00"]}, "context.1"),
        ("completions", {"prompt": "a\ud83d"}, "prompt"),
        ("completions", {"prompt": "?", "stop": "a\ud83d"}, "stop"),
        ("completions", {"prompt": "?", "stop": ["b", "a\ud83d"]}, "stop.1"),
        ("chat/completions", {"messages": [{"role": "user", "content": "a\ud83d"}]}, "messages.0.content"),
    ],
)
def test_half_a_surrogate_pair_is_the_clients_mistake(path, body, field, client):
    more = {} if path == "memories" else {"model": "kv", "memory": "a"}
    told, param = refused(client, path, json.dumps(body | more))
    assert told.startswith(f"{field}: The text is not Unicode text: at character ")
    assert "at character 1 stands half of a surrogate pair" in told
    assert param == field


def test_a_whole_surrogate_pair_is_a_character(client):
    written = client.post("/v1/memories", content='{"context": "!a:b!\\ud83d\\ude00"}', headers={"Content-Type": JSON})
    assert written.status_code == 201, written.text


def test_a_field_whose_name_is_half_a_surrogate_pair_is_refused(client):
    told, _ = refused(client, "memories", '{"context": "!a:b!", "\\ud83d": 1}')
    assert told.startswith("The name of a field is not valid Unicode")


@pytest.mark.parametrize(("content", "got"), [("[1]", "a list"), ('"a"', "a text"), ("5", "a number"), ("", "nothing")])
def test_a_body_that_is_no_object_is_told_what_it_is(content, got, client):
    assert refused(client, "memories", content) == (f"The body must be a JSON object, got {got}.", None)


def test_a_parameter_of_an_address_is_told_by_its_name(client):
    for limit in ("many", 0, 1001):
        answer = client.get("/v1/memories", params={"limit": limit})
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "limit"
