"""The client of the process that answers pages: whatever happens, each question has one end."""

import os
import signal
import sys
import threading

import pytest

from chipviz.errors import ChipvizError, JobError
from chipviz.runs import model_client
from chipviz.runs.model_client import Inference

FAKE_INFERENCE = """
import json, os, sys, time
print("a library says hello")
for line in sys.stdin:
    request = json.loads(line)
    if request["op"] == "die": os._exit(1)
    if request["op"] == "sleep": time.sleep(60)
    if request["op"] == "fail": answer = {"error": "No such layer.", "hint": "Take 0 to 2."}
    else: answer = {"echo": request, "pid": os.getpid()}
    print("noise", flush=True)
    print(json.dumps(answer), flush=True)
"""


@pytest.fixture
def inference(tmp_path, monkeypatch):
    monkeypatch.setattr(
        model_client, "inference_command", lambda _home: [sys.executable, "-c", FAKE_INFERENCE]
    )
    client = Inference(tmp_path)
    yield client
    client.close()


def test_inference_answers_in_one_process_and_passes_over_what_else_it_prints(inference):
    first = inference.ask({"op": "predict", "texts": ["ä\n</script>"]})
    second = inference.ask({"op": "predict"})
    assert first["echo"] == {"op": "predict", "texts": ["ä\n</script>"]}
    assert first["pid"] == second["pid"]


def test_inference_passes_on_errors_and_lives_on(inference):
    pid = inference.ask({"op": "predict"})["pid"]
    with pytest.raises(ChipvizError, match="No such layer") as caught:
        inference.ask({"op": "fail"})
    assert caught.value.hint == "Take 0 to 2."
    assert inference.ask({"op": "predict"})["pid"] == pid


def test_inference_that_dies_says_so_and_starts_anew_for_the_next_question(inference):
    pid = inference.ask({"op": "predict"})["pid"]
    with pytest.raises(JobError, match="ended without an answer"):
        inference.ask({"op": "die"})
    assert inference.ask({"op": "predict"})["pid"] != pid


def test_inference_that_was_killed_between_questions_is_started_again_unseen(inference):
    pid = inference.ask({"op": "predict"})["pid"]
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # dead, and not yet collected
    assert inference.ask({"op": "predict"})["pid"] != pid


def test_inference_that_takes_too_long_is_ended_and_its_late_answer_never_seen(inference):
    with pytest.raises(JobError, match=r"No answer in 0\.5 s"):
        inference.ask({"op": "sleep"}, timeout_s=0.5)
    assert inference.ask({"op": "predict", "n": 2})["echo"] == {"op": "predict", "n": 2}


def test_many_threads_each_get_the_answer_to_their_own_question(inference):
    answers = {}

    def ask(n):
        answers[n] = inference.ask({"op": "predict", "n": n})["echo"]["n"]

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {n: n for n in range(20)}
