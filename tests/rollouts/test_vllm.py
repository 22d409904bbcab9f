"""The engine over HTTP against a server process that has its routes: the same completions, and changed weights sent."""

from pathlib import Path

import pytest
import torch

from alignment_modules.policies import build_policy
from alignment_modules.rollouts import SamplingParameters
from alignment_modules.rollouts.codec import Codec
from alignment_modules.rollouts.engines import EngineError, InProcessEngine, VLLMEngine, vllm
from alignment_modules.rollouts.engines.server import UNFINISHED
from alignment_modules.rollouts.prompts import Prompts
from alignment_modules.rollouts.seeds import Seeds
from tests.rollouts.served import FILTERED, GENERATE, PARAMETERS, PROMPTS, SEEDS, assert_equal, changed, written


@pytest.mark.parametrize("parameters", [PARAMETERS, FILTERED, SamplingParameters(6, greedy=True, stop_token_ids=(5,))])
def test_completions_are_those_of_the_engine_in_process(engine, server, tiny_llama, parameters):
    policy = changed(tiny_llama)
    wanted = written(InProcessEngine(Codec()), policy, parameters)
    assert_equal(written(engine, policy, parameters), wanted)
    assert 0 < int(wanted.truncated.sum()) < len(wanted.truncated) or parameters is not PARAMETERS
    rows = server.asked(GENERATE)[1:]  # the first is the probe
    assert sorted(row["token_ids"] for row in rows) == sorted(2 * [[3, 8, 1, 9], [11], [2, 6, 4, 4, 21, 30]])
    assert len({row["sampling_params"]["seed"] for row in rows}) == len({row["request_id"] for row in rows}) == 6


def test_a_prompts_own_limit_ends_its_completions(engine, server, tiny_llama):
    limited, limits = PROMPTS.limited((2, None, 4)), {(3, 8, 1, 9): 2, (11,): 6, (2, 6, 4, 4, 21, 30): 4}
    wanted = written(InProcessEngine(Codec()), tiny_llama, FILTERED, limited)
    assert_equal(written(engine, tiny_llama, FILTERED, limited), wanted)
    rows = server.asked(GENERATE)[1:]
    assert {row["sampling_params"]["max_tokens"] for row in rows} == {2, 4, 6}
    assert all(row["sampling_params"]["max_tokens"] == limits[tuple(row["token_ids"])] for row in rows)


def test_a_turn_has_limits_of_its_own(engine, server, tiny_llama):
    turns = []
    for made in (engine, InProcessEngine(Codec())):
        made.push(tiny_llama)
        session = made.open(PROMPTS.limited((2, None, 4)), FILTERED, num_samples=2, seeds=SEEDS)
        made.extend(session, [1, 2, 5], [[3], [4, 5], [6]], limits=[1, 9, 3])
        turns.append(made.close(session))
    assert_equal(*turns)
    assert sorted(row["sampling_params"]["max_tokens"] for row in server.asked(GENERATE)[-3:]) == [1, 3, 6]


def test_a_samples_seed_is_its_own_whatever_else_is_asked_for(engine, server, tiny_llama):
    written(engine, tiny_llama)
    alone = Prompts.from_rows([[11]], torch.device("cpu"))
    written(engine, tiny_llama, prompts=alone, seeds=Seeds([2], seed=3, step=1, draw=1), num_samples=1)
    *rows, last = server.asked(GENERATE)
    [same] = [row for row in rows if row["request_id"].startswith("3.1.1.2.0.0-")]
    assert same["sampling_params"] == last["sampling_params"]
    assert same["request_id"] != last["request_id"]


def test_stop_strings(stand_in, model_folder, tmp_path):
    server = stand_in(model_folder)
    policy = build_policy(model_folder)
    from transformers import AutoTokenizer

    codec = Codec(AutoTokenizer.from_pretrained(model_folder))
    parameters = SamplingParameters(24, stop_strings=["e", "ab", "Q", "7"], stop_token_ids=(2,))
    engine = VLLMEngine(server.url, str(tmp_path / "weights"))
    prompts = Prompts.from_rows([codec.encode("1+1=")], torch.device("cpu"))
    options = {"prompts": prompts, "seeds": Seeds([0]), "num_samples": 8}
    with pytest.raises(ValueError, match=r"stop_strings=.*needs a tokenizer"):
        written(engine, policy, parameters, **options)
    engine.codec = codec
    found, wanted = (written(one, policy, parameters, **options) for one in (engine, InProcessEngine(codec)))
    assert_equal(found, wanted)
    assert 0 < int(wanted.truncated.sum()) < 8


@pytest.mark.parametrize("parameters", [FILTERED, pytest.param(PARAMETERS, marks=pytest.mark.slow)])
def test_sessions_are_those_of_the_engine_in_process(engine, tiny_llama, parameters):
    sessions = []
    for one in (engine, InProcessEngine(Codec())):
        one.push(tiny_llama)
        session = one.open(PROMPTS, parameters, num_samples=2, seeds=SEEDS)
        one.extend(session, [0, 2, 3, 5], [[12, 13], [14], [15, 16, 17], [1, 2]])
        turn = one.extend(session, [2, 5], [[31, 32, 33], [34]])
        assert session.turn is turn
        with pytest.raises(ValueError, match="open rows"):
            one.extend(session, [0], [[1]])
        sessions.append(one.close(session))
    found, wanted = sessions
    assert_equal(found, wanted)
    assert torch.equal(found.own, wanted.own)


class TestPush:
    def test_weights_are_sent_when_they_changed_and_only_then(self, engine, server, tiny_llama, tmp_path):
        for number in (1, 2, 3):
            engine.push(changed(tiny_llama))
            engine.push(tiny_llama)
            assert engine.version() == number
            [folder] = (tmp_path / "weights").iterdir()
            assert server.state()["version"] == folder.name
        assert server.asked("/collective_rpc")[-1]["kwargs"]["weights_path"] == str(folder)
        assert len(server.asked("/collective_rpc")) == 3
        assert not server.state()["paused"]
        assert float(engine.statistics()["engine/probe_difference"].total) < 1e-5

    def test_reload_names_the_weights_only_when_they_are_there(self, engine, server, tiny_llama):
        engine.push(tiny_llama)
        routes = [route for route in server.asked() if route != "/weight_info"]
        assert routes == [
            "/pause",
            "/update_weight_version",
            "/collective_rpc",
            "/update_weight_version",
            "/reset_prefix_cache",
            "/resume",
            GENERATE,
        ]
        assert server.asked("/update_weight_version")[0] == {"new_version": UNFINISHED}

    def test_transfer_starts_updates_and_finishes(self, server, tiny_llama, tmp_path):
        engine = VLLMEngine(server.url, str(tmp_path), update="transfer")
        assert_equal(written(engine, changed(tiny_llama)), written(InProcessEngine(Codec()), tiny_llama))
        routes = server.asked()
        assert routes.index("/start_weight_update") + 1 == routes.index("/update_weights")
        assert routes.index("/update_weights") + 1 == routes.index("/finish_weight_update")
        [finish] = server.asked("/finish_weight_update")
        assert server.state()["version"] == finish["weight_version"] != UNFINISHED

    def test_another_process_waits_for_the_first(self, engine, server, tiny_llama, tmp_path, monkeypatch):
        first, second = engine, VLLMEngine(server.url, str(tmp_path), timeout=0.3)
        rank = [1, 2]
        monkeypatch.setattr(vllm, "rank_and_world_size", lambda: rank)
        with pytest.raises(EngineError, match=r"process 1 waited timeout=0.3 seconds for the weights 'policy-"):
            second.push(tiny_llama)
        rank[0] = 0
        first.push(tiny_llama)
        rank[0] = 1
        second.push(tiny_llama)
        assert len(server.asked("/collective_rpc")) == 1
        assert_equal(written(second, tiny_llama), written(InProcessEngine(Codec()), tiny_llama))

    def test_the_server_sleeps_between_rollouts(self, server, tiny_llama, tmp_path, monkeypatch):
        engine = VLLMEngine(server.url, str(tmp_path), sleeps=True)
        written(engine, tiny_llama)
        engine.sleep()
        assert server.state()["asleep"]
        written(engine, tiny_llama)
        assert not server.state()["asleep"]
        monkeypatch.setattr(vllm, "rank_and_world_size", lambda: (0, 2))
        with pytest.raises(ValueError, match="sleeps=True needs a run in one process"):
            engine.push(tiny_llama)

    def test_a_server_with_the_old_weights_under_the_new_name_is_found_out(self, engine, server, tiny_llama):
        server.wrong(keeps_weights=True)
        with pytest.raises(EngineError, match=r"does not compute what the policy does: .* probe_tolerance=0.1"):
            engine.push(changed(tiny_llama))
        server.wrong()
        assert_equal(written(engine, tiny_llama), written(InProcessEngine(Codec()), tiny_llama))

    def test_a_server_that_tells_log_probabilities_without_the_temperature_is_found_out(
        self, engine, server, tiny_llama
    ):
        server.wrong(raw_logps=True)
        with pytest.raises(EngineError, match="--logprobs-mode processed_logprobs"):
            engine.push(tiny_llama)

    def test_a_failed_exchange_leaves_the_server_running_and_its_weights_nameless(self, engine, server, tiny_llama):
        server.wrong(missing=["/collective_rpc"])
        with pytest.raises(EngineError, match=r"update='reload': the weights of .* could not be exchanged: .*404"):
            engine.push(tiny_llama)
        assert server.state() | {"log": 0} == {"log": 0, "paused": False, "asleep": False, "version": UNFINISHED}

    def test_a_server_without_development_routes(self, engine, server, tiny_llama):
        engine.push(tiny_llama)
        server.wrong(missing=["/weight_info"])
        with pytest.raises(EngineError, match="VLLM_SERVER_DEV_MODE=1"):
            engine.push(tiny_llama)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "localhost:8000"}, "url='localhost:8000' must begin with http"),
        ({"update": "nccl"}, "update='nccl' must be 'reload' or 'transfer'"),
        ({"timeout": 0}, "timeout=0"),
        ({"probe_tolerance": 0}, "probe_tolerance=0"),
        ({"max_concurrency": 0}, "max_concurrency=0"),
        ({"api_key_env": "NO_SUCH_KEY"}, "api_key_env='NO_SUCH_KEY': this environment variable is not set"),
    ],
)
def test_options_that_are_refused(tmp_path, options, message):
    given = {"url": "http://localhost:8000", "folder": str(tmp_path)} | options
    with pytest.raises(ValueError, match=message):
        VLLMEngine(**given)


def test_filters_without_a_bound_are_refused(tmp_path):
    engine = VLLMEngine("http://localhost:8000/v1", str(tmp_path))
    assert engine.server.url == "http://localhost:8000"
    with pytest.raises(ValueError, match=r"evaluation.top_p=0.9 needs evaluation.top_k with VLLMEngine"):
        engine.check("evaluation.", SamplingParameters(top_p=0.9))
    with pytest.raises(ValueError, match=r"min_p=0.1 needs top_k"):
        engine.check("", SamplingParameters(min_p=0.1))
    engine.check("", SamplingParameters(top_p=0.9, top_k=20))


def test_policies_that_no_server_reads(tmp_path, bigram, tiny_llama):
    engine = VLLMEngine("http://localhost:8000", str(tmp_path))
    tiny_llama.model.norm.weight.full_tensor = lambda: None  # as a sharded parameter has it
    with pytest.raises(ValueError, match="cannot push a policy that is sharded over processes"):
        engine.push(tiny_llama)
    with pytest.raises(ValueError, match="cannot push Bigram: a server reads models of transformers"):
        engine.push(bigram)
    with pytest.raises(ValueError, match="push one first"):
        engine.generate(PROMPTS, PARAMETERS, seeds=SEEDS)


def test_the_key_is_sent_and_nowhere_else(server, tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setenv("ENGINE_KEY", "secret")
    engine = VLLMEngine(server.url, str(tmp_path), api_key_env="ENGINE_KEY")
    engine.push(tiny_llama)
    assert "secret" not in repr(vars(engine)) + repr(vars(engine.server)) + engine.describe()
    assert all("secret" not in path.read_text(errors="ignore") for path in Path(tmp_path).rglob("*") if path.is_file())
