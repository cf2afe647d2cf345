"""web_server.py --backend: the page and the API before an engine. The engine is another web_server.py, or one that is made up."""

import openai
import pytest
from flask import Flask, request
from helpers import ROOT, RawClient, ask, data_url, eventually, question, run_python, say, serving

from model.errors import BadInput
from web_server import create_app


@pytest.fixture
def engine(flags, monkeypatch):
    monkeypatch.chdir(ROOT)
    return create_app(*flags, "--seed", "1")


@pytest.fixture
def other_engine():
    """An engine of another make: it keeps what it was sent in `asked`, and answers with `reply`, a body and its status."""
    app = Flask("engine")
    app.asked = []

    @app.get("/v1/models")
    def models():
        return app.models if request.headers.get("Authorization") == "Bearer key" else ("key?", 401)

    @app.post("/v1/chat/completions")
    def completions():
        app.asked.append(request.get_json())
        return app.reply

    app.models, app.reply = {"data": [{"id": "org/other"}]}, {"choices": []}
    return app


def test_openai_client_gets_the_engines_answer(engine, pictures):
    body = {"messages": question("颜色？", data_url(pictures[0])), "max_tokens": 15, "temperature": 1, "seed": 3}
    expected = ask(engine.test_client(), **body).get_json()["choices"][0]["message"]["content"]
    with serving(engine) as address, serving(create_app("--backend", f"{address}/v1/")) as front:
        client = openai.OpenAI(base_url=f"{front}/v1", api_key="none", max_retries=0)
        assert [model.id for model in client.models.list()] == ["64_vlm_sft"]
        assert client.models.retrieve("64_vlm_sft").owned_by == "minimind-v"
        create = client.chat.completions.create
        whole = create(model="64_vlm_sft", **body)
        assert whole.choices[0].message.content == expected and whole.usage.completion_tokens == 15
        *chunks, last = create(model="64_vlm_sft", **body, stream=True, stream_options={"include_usage": True})
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected and len(chunks) > 5
        assert last.usage.completion_tokens == 15
        with pytest.raises(openai.BadRequestError, match="temperature should be a number from 0 to 2"):
            create(model="64_vlm_sft", messages=question("?"), temperature=7)
        with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-4'; this server has '64_vlm_sft'"):
            create(model="gpt-4", messages=question("?"), stream=True)


def test_a_request_gets_the_settings_of_the_command_line_and_the_key(other_engine, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("OPENAI_API_KEY", "key")
    with serving(other_engine) as address:
        # what a request leaves open is filled in
        flags = ["--backend", f"{address}/v1", "--top_k", "5"]
        client = create_app(*flags).test_client()
        ask(client, messages=[], temperature=None, top_p=0.5, guided_choice=["a"])
        ask(create_app(*flags, "--max_new_tokens", "9", "--seed", "2").test_client(), messages=[], model="mine")

        # errors of every form reach the client in OpenAI's
        for reply, status, says in (
            ({"error": {"message": "no room", "code": 400}}, 400, "no room"),
            ({"object": "error", "message": "no room"}, 422, "no room"),
            ({"detail": "Not Found"}, 404, "Not Found"),
            ("<h1>?</h1>", 500, "INTERNAL SERVER ERROR"),
            ("[" * 10**5, 500, "INTERNAL SERVER ERROR"),
            ({"error": {"message": "there is no key 'key'"}}, 401, "UNAUTHORIZED"),
        ):
            other_engine.reply = reply, status
            response = ask(client, messages=[], stream=True)
            assert response.status_code == status and response.get_json()["error"]["message"] == says

        # what isn't JSON doesn't get as far as the engine
        for body, says in (("{", "the request is not valid JSON"), ("[]", "the request should be a JSON object")):
            response = client.post("/v1/chat/completions", data=body, content_type="application/json")
            assert response.status_code == 400 and says in response.get_json()["error"]["message"]

        # an engine that can't be used
        other_engine.models = {"data": []}
        with pytest.raises(BadInput, match="/v1/models lists no model, as OpenAI's API does: correct --backend"):
            create_app(*flags)
        monkeypatch.setenv("OPENAI_API_KEY", "密钥")
        with pytest.raises(BadInput, match="OPENAI_API_KEY has characters that no key has"):
            create_app(*flags)
        monkeypatch.setenv("OPENAI_API_KEY", "wrong")
        with pytest.raises(
            BadInput, match=r"/v1/models answers 401 \(UNAUTHORIZED\): correct the key in OPENAI_API_KEY"
        ):
            create_app(*flags)

    defaults = {
        "messages": [],
        "model": "org/other",
        "temperature": 0.5,
        "top_k": 5,
        "top_p": 1,
        "repetition_penalty": 1,
    }
    first, second = other_engine.asked[:2]
    assert first == {**defaults, "top_p": 0.5, "guided_choice": ["a"]}
    assert second == {**defaults, "model": "mine", "max_tokens": 9, "seed": 2}


def test_the_engine_stops_when_a_client_hangs_up(engine):
    say(engine.chat, "左上角红色大圆形" * 40, seconds=0.05)
    with serving(engine) as address, serving(create_app("--backend", f"{address}/v1")) as front:
        for stream in (True, False):
            client = RawClient(front, messages=question("？"), stream=stream)
            if stream:
                client.read_pieces(3)
            before = engine.api.generated_tokens
            eventually(lambda before=before: engine.api.generated_tokens > before + 2)
            client.hang_up()
            eventually(lambda: not engine.api.queue.tickets)
        assert engine.api.generated_tokens < 60  # one answer to its end is twice as long


def test_an_engine_that_stops_in_the_middle_is_an_error(engine):
    written = []

    def fail(*_):
        written.append(1)
        assert len(written) < 5, "the engine of the test breaks here"

    engine.chat.model.tok_embeddings.register_forward_pre_hook(fail)
    with serving(engine) as address, serving(create_app("--backend", f"{address}/v1")) as front:
        client = openai.OpenAI(base_url=f"{front}/v1", api_key="none", max_retries=0)
        stream = client.chat.completions.create(model="64_vlm_sft", messages=question("？"), stream=True, seed=1)
        with pytest.raises(openai.APIError, match="the engine stopped in the middle of its answer"):
            list(stream)


def test_an_engine_that_has_gone_is_502_and_the_page_stays(engine):
    with serving(engine) as address:
        client = create_app("--backend", f"{address}/v1").test_client()
        assert client.get("/health").get_json() == {"status": "ok", "model": "64_vlm_sft"}
    for response, status in (
        (ask(client, messages=question("?")), 502),
        (ask(client, messages=question("?"), stream=True), 502),
        (client.get("/v1/models"), 502),
        (client.get("/health"), 503),
    ):
        says = response.get_json()["error"]["message"]
        assert response.status_code == status and says.startswith(f"no engine answers at {address}/v1 (")
    assert client.get("/").status_code == client.get("/training").status_code == 200
    assert client.post("/attention", json={}).status_code == 404
    assert client.get("/info", headers={"Host": "evil.example"}).status_code == 403
    assert "default-src 'self'" in client.get("/info").headers["Content-Security-Policy"]


def test_what_can_be_no_engine_is_one_sentence(engine, capsys):
    code, out, err = run_python("web_server.py", "--backend", "http://127.0.0.1:9/v1")
    assert (code, out) == (1, "") and err.count("\n") == 1
    assert err.startswith("error: no engine answers at http://127.0.0.1:9/v1 (")
    assert "start one, for example with `vllm serve FOLDER`, or correct --backend" in err

    with pytest.raises(BadInput, match=r"no engine answers at http://127.0.0.1:80a/v1 \(nonnumeric port: '80a'\)"):
        create_app("--backend", "http://127.0.0.1:80a/v1")
    with (
        serving(engine) as address,
        pytest.raises(BadInput, match=r"/models answers 404 \(.*\): does --backend end in /v1\?"),
    ):
        create_app("--backend", address)
    for bad in ("127.0.0.1:8000/v1", "ftp://a/v1", "http:///v1", "http://a/v1?x=1", "http://[", ""):
        with pytest.raises(SystemExit):
            create_app("--backend", bad)
        assert repr(bad) in capsys.readouterr().err
    for flag in (["--weights", "a.pth"], ["--watch"], ["--quantize", "int8"]):
        with pytest.raises(BadInput, match=f"leave out --backend or {flag[0]}$"):
            create_app("--backend", "http://127.0.0.1:9/v1", *flag)
