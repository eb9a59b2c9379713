"""The client of the process that answers pages: whatever happens, each question has one end."""

import os
import signal
import sys
import threading
import time
from dataclasses import dataclass

import psutil
import pytest

from chipviz.errors import ChipvizError, JobError, Refusal
from chipviz.runs.model_client import Inference
from chipviz.runs.questions import LookAtColumns

FAKE_INFERENCE = """
import json, os, sys, time
print("a library says hello")
for line in sys.stdin:
    request = json.loads(line)
    if request["data"] == "die": os._exit(1)
    if request["data"] == "sleep": time.sleep(60)
    said, answer = "answer ", {"echo": request["data"], "pid": os.getpid()}
    if request["data"] == "fail":
        said, answer = "refused ", {"message": "No.", "hint": "Take 2.", "fields": ["blocks"]}
    print("noise", flush=True)
    print(said + json.dumps(answer), flush=True)
"""


@dataclass(frozen=True)
class Echo:
    echo: str
    pid: int


def ask(inference, data, timeout_s=120.0):
    return inference.ask(LookAtColumns(data, None), Echo, timeout_s)


@pytest.fixture
def inference(tmp_path):
    client = Inference(tmp_path, [sys.executable, "-c", FAKE_INFERENCE])
    yield client
    client.close()


def test_inference_answers_in_one_process_and_passes_over_what_else_it_prints(inference):
    first = ask(inference, "ä\n</script>")
    assert first.echo == "ä\n</script>"
    assert first.pid == ask(inference, "x").pid


def test_inference_passes_on_refusals_and_lives_on(inference):
    pid = ask(inference, "x").pid
    with pytest.raises(ChipvizError, match="No") as caught:
        ask(inference, "fail")
    assert caught.value.refusal == Refusal("No.", "Take 2.", ("blocks",))
    assert ask(inference, "x").pid == pid


def test_inference_that_dies_says_so_and_starts_anew_for_the_next_question(inference):
    pid = ask(inference, "x").pid
    with pytest.raises(JobError, match="ended without an answer"):
        ask(inference, "die")
    assert ask(inference, "x").pid != pid


def test_inference_that_was_killed_between_questions_is_started_again_unseen(inference):
    pid = ask(inference, "x").pid
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # dead, and not yet collected
    assert ask(inference, "x").pid != pid


def test_inference_that_takes_too_long_is_ended_and_its_late_answer_never_seen(inference):
    with pytest.raises(JobError, match=r"No answer in 0\.5 s"):
        ask(inference, "sleep", timeout_s=0.5)
    assert ask(inference, "2").echo == "2"


def test_many_threads_each_get_the_answer_to_their_own_question(inference):
    answers = {}

    def one(n):
        answers[n] = ask(inference, str(n)).echo

    threads = [threading.Thread(target=one, args=(n,)) for n in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {n: str(n) for n in range(20)}


def hang(client, timeout_s):
    with pytest.raises(JobError):
        ask(client, "sleep", timeout_s)


def test_a_question_that_hangs_keeps_nobody_else_waiting(tmp_path):
    client = Inference(tmp_path, [sys.executable, "-c", FAKE_INFERENCE], most=2)
    hanging = threading.Thread(target=hang, args=(client, 10))
    hanging.start()
    assert ask(client, "x").echo == "x"
    assert hanging.is_alive()
    hanging.join()
    client.close()


def test_who_waits_may_give_up_and_the_process_that_worked_on_it_is_ended(inference):
    pid = ask(inference, "x").pid

    def give_up():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        inference.ask(LookAtColumns("sleep", None), Echo, 60.0, give_up)
    assert not psutil.pid_exists(pid)
    assert ask(inference, "x").echo == "x"


def test_one_who_waits_for_a_busy_process_may_give_up_too(inference):
    def give_up():
        raise KeyboardInterrupt

    busy = threading.Thread(target=hang, args=(inference, 2))
    busy.start()
    while not inference._n_busy:
        time.sleep(0.01)
    with pytest.raises(KeyboardInterrupt):
        inference.ask(LookAtColumns("x", None), Echo, 60.0, give_up)
    busy.join()
    assert ask(inference, "x").echo == "x"


def test_a_process_that_nobody_asks_gives_its_memory_back(tmp_path):
    client = Inference(tmp_path, [sys.executable, "-c", FAKE_INFERENCE], idle_s=0.3)
    pid = ask(client, "x").pid
    deadline = time.monotonic() + 30
    while psutil.pid_exists(pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert ask(client, "x").pid != pid
    client.close()
