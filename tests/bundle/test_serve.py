"""The service: many clients at once get what the bundle says, bad requests get a sentence."""

import http.client
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest

from chipviz.bundle.batcher import Batcher, BusyError
from chipviz.bundle.classifier import load
from chipviz.errors import ChipvizError
from chipviz.files import PROJECT
from chipviz.results.answers import Prediction
from tests.bundle.test_save import built, finished  # noqa: F401
from tests.families import planted_rows

TEXTS = [text for text, _ in planted_rows(80)]


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def start(bundle, *words, **environment):
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "chipviz", "serve", str(bundle), "--port", str(port), *words],
        cwd=PROJECT,
        env=os.environ | environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    until = time.monotonic() + 120
    while time.monotonic() < until and process.poll() is None:
        try:
            if ask(port, "GET", "/health")[0] == 200:
                return process, port
        except OSError:
            time.sleep(0.1)
    process.kill()
    raise AssertionError(process.communicate()[1])


def ask(port, method, path, body=None, **headers):
    """Status, body and headers of one request on a connection of its own."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    try:
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        connection.request(method, path, data, {"Content-Type": "application/json"} | headers)
        reply = connection.getresponse()
        return reply.status, reply.read(), reply.headers
    finally:
        connection.close()


@pytest.fixture(scope="module")
def bundle(finished, tmp_path_factory):  # noqa: F811
    return built(finished, tmp_path_factory.mktemp("served"), "mean", fresh=False)[1]


@pytest.fixture(scope="module")
def truth(bundle):
    classifier = load(bundle)
    return {text: classifier.predict([text])[0] for text in TEXTS}


@pytest.fixture(scope="module")
def port(bundle):
    process, port = start(bundle)
    yield port
    process.terminate()
    process.communicate(timeout=30)
    assert process.returncode in (0, -signal.SIGTERM)


def test_own_shape_rows_and_those_of_other_servers(port, bundle, truth):
    status, body, _ = ask(port, "POST", "/predict", {"texts": TEXTS[:3]})
    assert status == 200
    for one, text in zip(json.loads(body)["predictions"], TEXTS[:3], strict=True):
        assert one["label"] == truth[text].label
        assert one["probabilities"] == pytest.approx(truth[text].probabilities, abs=1e-5)
    rows = [{"text": TEXTS[0], "other": 1}]
    assert json.loads(ask(port, "POST", "/predict", {"rows": rows})[1]) == {
        "predictions": json.loads(body)["predictions"][:1]
    }
    single = json.loads(ask(port, "POST", "/predict", {"inputs": TEXTS[0]})[1])
    several = json.loads(ask(port, "POST", "/predict", {"inputs": [[t] for t in TEXTS[:3]]})[1])
    assert several[0] == single
    assert [one[0]["label"] for one in several] == [truth[t].label for t in TEXTS[:3]]
    assert [s["score"] for s in single] == sorted((s["score"] for s in single), reverse=True)
    vllm = json.loads(ask(port, "POST", "/classify", {"model": "x", "input": TEXTS[:2]})[1])
    names = load(bundle).metadata.task.label_names
    for one, text in zip(vllm["data"], TEXTS[:2], strict=True):
        assert one["label"] == truth[text].label
        assert dict(zip(names, one["probs"], strict=True)) == pytest.approx(
            truth[text].probabilities, abs=1e-5
        )
    assert vllm["data"][1]["num_classes"] == 3


BAD = [
    ({}, 422, "either"),
    ({"texts": []}, 422, "no text"),
    ({"texts": ["a"], "inputs": "b"}, 422, "either"),
    ({"texts": ["a"], "text_pairs": ["b"]}, 422, "one text a row"),
    ({"inputs": ["a", "b"]}, 422, "one text a row"),
    ({"inputs": ["a", "b", "c"]}, 422, "lists of one"),
    ({"inputs": "a", "raw_scores": True}, 422, "Raw scores"),
    ({"texts": "a"}, 422, "malformed"),
    ({"texts": ["a"], "txet": 1}, 422, "malformed"),
    ({"rows": [{"words": "a"}]}, 422, "no column 'text'"),
    ({"rows": [{"text": None}]}, 422, "no value"),
    ({"texts": ["a"] * 513}, 413, "512 texts"),
    ({"texts": ["a" * 1_000_001]}, 413, "characters"),
    (b"{", 422, "malformed"),
    (b"\xff\xfe", 422, "malformed"),
]


@pytest.mark.parametrize(("body", "status", "said"), BAD)
def test_bad_requests_get_a_sentence(port, body, status, said):
    found, answer, _ = ask(port, "POST", "/predict", body)
    assert found == status, answer
    assert said in json.loads(answer)["error"]


def test_a_request_without_a_stated_length_has_a_limit_too(port):
    def chunks():
        yield b'{"texts": ["'
        for _ in range(20):
            yield b"a" * (1 << 20)
        yield b'"]}'

    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    kind = {"Content-Type": "application/json"}
    try:
        with suppress(OSError):  # it need not read to the end
            connection.request("POST", "/predict", chunks(), kind, encode_chunked=True)
        reply = connection.getresponse()
        assert reply.status == 413
        assert "bytes" in json.loads(reply.read())["error"]
    finally:
        connection.close()


def test_another_name_of_this_machine_is_not_answered(port):
    assert ask(port, "POST", "/predict", {"texts": ["a"]}, Host="evil.example")[0] == 400
    assert ask(port, "GET", "/health", None, Host=f"localhost:{port}")[0] == 200


def test_errors_of_the_web_have_the_same_shape(port):
    for method, path, status in (("GET", "/nosuch", 404), ("GET", "/predict", 405)):
        found, answer, _ = ask(port, method, path)
        assert (found, set(json.loads(answer))) == (status, {"error", "hint"})


def test_a_thousand_mixed_requests_are_each_answered_right(port, truth):
    draw = random.Random(0)
    wanted = []
    for _ in range(1_000):
        if draw.random() < 0.2:
            wanted.append(draw.choice(BAD[:11]))
        else:
            texts = draw.sample(TEXTS, draw.randint(1, 4))
            wanted.append(({"texts": texts}, 200, texts))

    def one(case):
        return ask(port, "POST", "/predict", case[0])[:2]

    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(one, wanted))
    for (status, answer), (_, expected, said) in zip(found, wanted, strict=True):
        assert status == expected, answer
        if status != 200:
            assert said in json.loads(answer)["error"]
            continue
        predictions = json.loads(answer)["predictions"]
        for prediction, text in zip(predictions, said, strict=True):
            assert prediction["label"] == truth[text].label
            assert prediction["score"] == pytest.approx(truth[text].score, abs=1e-5)
    metrics = ask(port, "GET", "/metrics")[1].decode()
    assert 'chipviz_requests_total{path="/predict",status="200"}' in metrics
    passes = float(metrics.split("chipviz_pass_requests_count ")[1].split()[0])
    asked = float(metrics.split("chipviz_pass_requests_sum ")[1].split()[0])
    assert passes < asked, "some shared a pass"


def test_a_key_is_wanted_where_one_is_set(bundle):
    process, port = start(bundle, "--api-key-env", "THE_KEY", THE_KEY="s3cret")
    try:
        body = {"texts": [TEXTS[0]]}
        assert ask(port, "GET", "/health")[0] == 200
        assert ask(port, "POST", "/predict", body)[0] == 401
        assert ask(port, "POST", "/predict", body, Authorization="Bearer no")[0] == 401
        assert ask(port, "POST", "/predict", body, Authorization="Bearer s3cret")[0] == 200
        assert ask(port, "POST", "/classify", {"input": "a"}, **{"X-API-Key": "s3cret"})[0] == 200
    finally:
        process.terminate()
        process.communicate()


def test_a_term_signal_under_load_loses_no_accepted_request(bundle, truth):
    process, port = start(bundle)
    stop, found, lost = threading.Event(), [], []

    def client(seed):
        draw = random.Random(seed)
        while not stop.is_set():
            text = draw.choice(TEXTS)
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            try:
                connection.connect()
            except OSError:  # it listens no more: nothing was accepted
                return
            try:
                body = json.dumps({"texts": [text]})
                connection.request("POST", "/predict", body, {"Content-Type": "application/json"})
                reply = connection.getresponse()
                found.append((reply.status, json.loads(reply.read()), text))
            except (OSError, http.client.HTTPException) as error:
                lost.append(error)
            finally:
                connection.close()

    clients = [threading.Thread(target=client, args=(seed,)) for seed in range(12)]
    for one in clients:
        one.start()
    time.sleep(1.5)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) in (0, -signal.SIGTERM)
    stop.set()
    for one in clients:
        one.join(60)
    process.communicate()
    assert len(found) > 20
    assert not lost
    for status, answer, text in found:
        assert status == 200
        assert answer["predictions"][0]["label"] == truth[text].label


# the line before the model


def said(texts, pairs=None):
    return [Prediction(f"{text}+{(pairs or texts)[i]}", 1.0, {}) for i, text in enumerate(texts)]


def test_a_pass_answers_each_request_with_its_own():
    batcher = Batcher(lambda: said)
    asked = [batcher.ask([f"{i}", f"{i}b"], None) for i in range(50)]
    for i, one in enumerate(asked):
        assert [p.label for p in one.result(10)] == [f"{i}+{i}", f"{i}b+{i}b"]
    batcher.close()


def test_a_bad_text_fails_its_own_request_alone():
    gate = threading.Event()

    def predict(texts, _pairs):
        gate.wait(10)
        if "bad" in texts:
            raise ChipvizError("A bad text.", "Mend it.")
        if "worse" in texts:
            raise ValueError("secret text")
        return said(texts)

    batcher = Batcher(lambda: predict)
    asked = {text: batcher.ask([text], None) for text in ("a", "b", "bad", "worse", "c")}
    gate.set()
    assert [asked[text].result(10)[0].label for text in "abc"] == ["a+a", "b+b", "c+c"]
    assert "A bad text." in str(asked["bad"].exception(10))
    assert "secret" not in str(asked["worse"].exception(10))
    batcher.close()


def test_a_full_line_refuses_and_says_when_to_come_again():
    gate = threading.Event()

    def predict(texts, _pairs):
        gate.wait(10)
        return said(texts)

    batcher = Batcher(lambda: predict, max_waiting=4)
    first = batcher.ask(["a"], None)
    while batcher.n_waiting:  # taken up: it is computed now
        time.sleep(0.001)
    waiting = [batcher.ask(["b"], None) for _ in range(4)]
    with pytest.raises(BusyError) as busy:
        batcher.ask(["c"], None)
    assert busy.value.retry_s >= 1
    assert waiting[0].cancel(), "who waits may give up"
    gate.set()
    assert first.result(10)
    assert [one.result(10)[0].label for one in waiting[1:]] == ["b+b"] * 3
    batcher.close()
    with pytest.raises(BusyError):
        batcher.ask(["d"], None)


def test_a_model_that_cannot_be_loaded_is_said_at_once():
    def opening():
        raise ChipvizError("It is broken.", "Mend it.")

    with pytest.raises(ChipvizError, match="It is broken"):
        Batcher(opening).ready()
