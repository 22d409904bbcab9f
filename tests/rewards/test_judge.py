"""A judge behind an OpenAI-compatible route, asked over HTTP of a small server: scores, retries, cache and errors."""

import copy
import json
import math
import pickle
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from alignment_modules.rewards import ChatJudge, RewardError, RewardSet


class Server:
    """Answers chat completions; the score is the number of digits of the reply unless a script says otherwise."""

    def __init__(self):
        self.seen, self.script, self.lock = [], [], threading.Lock()
        self.keys, self.busiest, self.now = [], 0, 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):  # the name that http.server calls
                body = self.rfile.read(int(self.headers["Content-Length"])).decode()
                status, answer, wait = outer.answer(self.path, self.headers, json.loads(body))
                time.sleep(wait)
                with outer.lock:
                    outer.now -= 1
                self.send_response(status)
                if status in (301, 307):
                    self.send_header("Location", "http://127.0.0.1:9/elsewhere")
                self.end_headers()
                self.wfile.write(answer.encode())

            def log_message(self, *given):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def answer(self, path, headers, body):
        with self.lock:
            self.now += 1
            self.busiest = max(self.busiest, self.now)
            self.seen.append((path, body))
            self.keys.append(headers.get("Authorization"))
            given = self.script.pop(0) if self.script else None
        if given is not None:
            return given
        reply = body["messages"][-1]["content"].split("Reply:\n")[1].split("\n\n")[0]
        return 200, said(f"Hm.\nScore: {sum(c.isdigit() for c in reply)}"), 0.0


def said(text):
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]})


@pytest.fixture
def server():
    server = Server()
    yield server
    server.server.shutdown()
    server.server.server_close()


@pytest.fixture
def judge(server, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds, sleep=time.sleep: sleep(min(seconds, 0.05)))
    return lambda **options: ChatJudge(server.url, "small", **options)


PROMPTS = ["1+1=", "2+2=", "3+3="]


def test_scores_within_a_set_of_rewards(judge, server):
    table = RewardSet([judge()])(prompts=PROMPTS, completions=["2", "a44", "none"], prompt_ids=[[]] * 3,
                                 completion_ids=[[]] * 3, columns={})  # fmt: skip
    assert table.names == ("judge",)
    assert table.total.tolist() == pytest.approx([0.1, 0.2, 0.0])
    path, body = server.seen[0]
    assert path == "/v1/chat/completions"
    assert body["model"] == "small"
    assert body["temperature"] == 0.0
    assert server.keys == [None] * 3


def test_columns_messages_and_a_system_message(judge, server):
    asked = judge(question="{prompt}|{answer}|{{x}}|Reply:\n{completion}\n\n", system="Be strict.")
    assert asked.required_columns == ("answer",)
    assert asked(["7"], [[{"role": "user", "content": "3+4"}]], answer=["7"], other=["unused"]) == [0.1]
    system, user = server.seen[0][1]["messages"]
    assert system == {"role": "system", "content": "Be strict."}
    assert user["content"].startswith("user: 3+4|7|{x}|")


def test_the_scale_and_the_last_match(judge, server):
    server.script = [(200, said("Score: 9, no: score = 2.5"), 0.0)]
    assert judge(lowest=-5, highest=5)(["x"], ["y"]) == [0.75]


def test_asks_again_while_the_server_is_busy(judge, server):
    server.script = [(503, "busy", 0), (429, "slow down", 0), (200, said("I cannot tell"), 0), (200, "no json", 0)]
    assert judge(retries=4)(["22"], ["1+1="]) == [0.2]
    assert len(server.seen) == 5


def test_does_not_ask_again_what_was_refused(judge, server):
    server.script = [(401, '{"error": "bad key"}', 0)]
    with pytest.raises(RewardError, match=r"asked 1 times: .*answered 401 Unauthorized: .*bad key"):
        judge(retries=4)(["22"], ["1+1="])
    assert len(server.seen) == 1


def test_a_request_that_fails_for_good(judge, server, caplog):
    server.script = [(500, "broken", 0)] * 2
    with pytest.raises(RewardError, match=r"asked 2 times: RequestError: .*answered 500"):
        judge(retries=1)(["22"], ["1+1="])
    server.script = [(500, "broken", 0)]
    found = judge(retries=0, on_failure="none", max_workers=1)(["22", "3"], ["1+1=", "1+2="])
    assert math.isnan(found[0])
    assert found[1] == 0.1
    assert "no answer" in caplog.text


def test_a_server_that_is_not_there():
    with pytest.raises(RewardError, match=r"127.0.0.1:9/v1/chat/completions cannot be reached"):
        ChatJudge("http://127.0.0.1:9/v1", "small", retries=0)(["1"], ["2"])


def test_a_late_answer(server):
    server.script = [(200, said("Score: 1"), 3.0)]
    started = time.monotonic()
    with pytest.raises(RewardError, match=r"cannot be reached: timed out|no answer within"):
        ChatJudge(server.url, "small", timeout=0.3, retries=0)(["1"], ["2"])
    assert time.monotonic() - started < 2.5


def test_an_answer_is_asked_for_once(judge, server, tmp_path):
    file = tmp_path / "kept" / "scores.jsonl"
    first = judge(cache=str(file))
    assert first(["2", "2", "33"], ["1+1=", "1+1=", "1+1="]) == [0.1, 0.1, 0.2]
    assert first(["2"], ["1+1="]) == [0.1]
    assert len(server.seen) == 2
    with open(file, "a") as lines:
        lines.write('{"request": "cut sho')
    assert judge(cache=str(file))(["33"], ["1+1="]) == [0.2]
    assert len(server.seen) == 2
    assert judge(cache=str(file), highest=20)(["33"], ["1+1="]) == [0.1]  # another scale, another score
    assert len(server.seen) == 3


def test_several_requests_at_once(judge, server):
    server.script = [(200, said("Score: 1"), 0.05) for _ in range(8)]
    assert judge(max_workers=4)([str(i) for i in range(8)], ["?"] * 8) == [0.1] * 8
    assert 1 < server.busiest <= 4


def test_the_key_is_sent_and_kept_nowhere(judge, server, monkeypatch, tmp_path):
    monkeypatch.setenv("JUDGE_KEY", "a-secret")
    asked = judge(api_key_env="JUDGE_KEY", cache=str(tmp_path / "scores.jsonl"))
    asked(["1"], ["2"])
    assert server.keys == ["Bearer a-secret"]
    server.script = [(403, "no", 0)]
    with pytest.raises(RewardError) as error:
        asked(["11"], ["2"])
    held = [repr(vars(asked)), str(error.value), (tmp_path / "scores.jsonl").read_text(), repr(pickle.dumps(asked))]
    assert not any("a-secret" in text for text in held)
    assert copy.deepcopy(asked)(["1"], ["2"]) == [0.1]


def test_a_redirect_is_not_followed(judge, server, monkeypatch):
    """It would take the key to another host."""
    server.script = [(307, "", 0)]
    with pytest.raises(RewardError, match="answered 307"):
        judge(retries=0)(["1"], ["2"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "localhost:8000"}, "url='localhost:8000' must begin with http"),
        ({"url": "file:///etc"}, "url='file:///etc' must begin with http"),
        ({"question": "How good is {prompt}?"}, r"must have \{completion\}"),
        ({"question": "{completion} {"}, "literal braces are doubled"),
        ({"question": "{completion} {0}"}, "names of columns"),
        ({"pattern": "Score"}, "has 0 groups"),
        ({"pattern": "("}, "is no regular expression"),
        ({"lowest": 5.0, "highest": 5.0}, "highest=5 must be above lowest=5"),
        ({"timeout": 0.0}, "timeout=0.0 must be"),
        ({"retries": -1}, "retries=-1 must be"),
        ({"on_failure": "zero"}, "on_failure='zero'"),
        ({"api_key_env": "NO_SUCH_VARIABLE"}, "api_key_env='NO_SUCH_VARIABLE': this environment variable is not set"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        ChatJudge(**({"url": "http://localhost", "model_name": "small"} | options))
