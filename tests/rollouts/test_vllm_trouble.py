"""A server over HTTP that is busy, slow, gone, restarted, or answers what it should not."""

import os
import signal

import pytest
import torch

from alignment_modules.rollouts import NonFiniteLogits
from alignment_modules.rollouts.codec import Codec
from alignment_modules.rollouts.engines import EngineError, InProcessEngine, VLLMEngine
from alignment_modules.rollouts.engines.answers import completions_of, read_answer
from tests.rollouts.served import FILTERED, GENERATE, PARAMETERS, PROMPTS, SEEDS, assert_equal, changed, written


class TestTrouble:
    def test_a_busy_server_is_asked_again_and_what_was_answered_is_kept(self, engine, server, tiny_llama):
        engine.push(tiny_llama)
        before = len(server.asked(GENERATE))
        server.wrong(busy={"route": GENERATE, "times": 2})
        assert_equal(written(engine, tiny_llama), written(InProcessEngine(Codec()), tiny_llama))
        assert len(server.asked(GENERATE)) - before == 6 + 2

    def test_a_slow_server(self, server, tiny_llama, tmp_path):
        engine = VLLMEngine(server.url, str(tmp_path), timeout=1.0, retries=0)
        engine.push(tiny_llama)
        server.wrong(slow={"route": GENERATE, "seconds": 2.0})
        with pytest.raises(EngineError, match=rf"{GENERATE} gave no answer within timeout=1 seconds; asked 1 times"):
            written(engine, tiny_llama)

    def test_a_server_that_is_gone(self, engine, server, tiny_llama):
        engine.push(tiny_llama)
        server.kill()
        with pytest.raises(EngineError, match=r"cannot be reached: .*; asked 3 times. Is the server running\? The run"):
            engine.generate(PROMPTS, PARAMETERS, seeds=SEEDS)

    def test_a_server_that_was_restarted_before_a_push_gets_the_weights_again(self, engine, server, tiny_llama):
        engine.push(changed(tiny_llama))
        server.kill()
        server.start()
        assert_equal(written(engine, tiny_llama), written(InProcessEngine(Codec()), tiny_llama))
        assert engine.version() == 1

    def test_a_server_that_was_restarted_after_a_push_gets_them_again_and_writes_anew(self, engine, server, tiny_llama):
        engine.push(changed(tiny_llama))
        server.kill()
        server.start()
        found = engine.generate(PROMPTS, PARAMETERS, num_samples=2, seeds=SEEDS)
        assert_equal(found, written(InProcessEngine(Codec()), tiny_llama))

    def test_a_server_that_stops_for_a_while(self, engine, server, tiny_llama):
        engine.push(tiny_llama)
        os.kill(server.pid, signal.SIGSTOP)
        try:
            import threading

            threading.Timer(0.5, os.kill, [server.pid, signal.SIGCONT]).start()
            found = engine.generate(PROMPTS, PARAMETERS, num_samples=2, seeds=SEEDS)
        finally:
            os.kill(server.pid, signal.SIGCONT)
        assert_equal(found, written(InProcessEngine(Codec()), tiny_llama))

    def test_answers_of_another_version_are_refused(self, engine, server, tiny_llama):
        engine.push(tiny_llama)
        server.wrong(version="of another run")
        with pytest.raises(EngineError, match="answers with the weights 'of another run' again, though 'policy-"):
            engine.generate(PROMPTS, PARAMETERS, seeds=SEEDS)

    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            ({"no_logps": True}, "answered without tokens and their log-probabilities"),
            ({"no_mask": True}, "start it with --return-sampling-mask"),
            ({"finish_reason": "abort"}, r"ended request '3\.1\.1.*' with finish_reason='abort'"),
        ],
    )
    def test_half_an_answer(self, engine, server, tiny_llama, wrong, message):
        engine.push(tiny_llama)
        server.wrong(**wrong)
        with pytest.raises(EngineError, match=message):
            engine.generate(PROMPTS, FILTERED, seeds=SEEDS)

    def test_what_an_answer_must_hold(self):
        request = {"request_id": "x"}
        choice = {"finish_reason": "stop", "token_ids": [1, 2], "logprobs": {"content": [{"logprob": -1.0}]}}
        with pytest.raises(EngineError, match="2 tokens, 1 log-probabilities"):
            read_answer(choice, request)
        choice["logprobs"]["content"].append({"logprob": float("nan")})
        choice["sampling_mask"] = [[1, 4], [4, 5]]
        answer = read_answer(choice, request)
        device = torch.device("cpu")
        with pytest.raises(NonFiniteLogits):
            completions_of([answer], FILTERED, None, pad_token_id=0, device=device)
        choice["logprobs"]["content"][1]["logprob"] = -2.0
        with pytest.raises(EngineError, match="drew token 2 from a set without it"):
            completions_of([read_answer(choice, request)], FILTERED, None, pad_token_id=0, device=device)
