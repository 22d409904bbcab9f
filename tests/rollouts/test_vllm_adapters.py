"""LoRA policies and a server over HTTP: an adapter for each version, or merged weights."""

import pytest
import torch

from alignment_modules.policies import LoraConfig, PolicyConfig, build_policy
from alignment_modules.policies.lora import add_lora
from alignment_modules.rollouts.codec import Codec
from alignment_modules.rollouts.engines import EngineError, InProcessEngine, VLLMEngine, vllm
from tests.rollouts.served import GENERATE, PARAMETERS, PROMPTS, SEEDS, assert_equal, changed, written


class TestAdapters:
    @pytest.fixture
    def policy(self, folder):
        torch.manual_seed(1)
        return adapted(build_policy(PolicyConfig(path=folder, lora=LoraConfig(r=2, alpha=4))))

    def test_each_version_is_an_adapter_of_its_own_name(self, engine, server, policy, tmp_path):
        names = []
        for _ in range(2):
            assert_equal(written(engine, adapted(policy)), written(InProcessEngine(Codec()), policy))
            names.append(server.asked(GENERATE)[-1]["model"])
            assert {body["lora_name"] for body in server.asked("/v1/load_lora_adapter")} == {*names}
            assert [path.name for path in (tmp_path / "weights").iterdir()] == [names[-1]]
        assert len({*names}) == 2
        assert server.asked("/v1/unload_lora_adapter") == [{"lora_name": names[0]}]
        assert not server.asked("/collective_rpc")

    def test_a_restarted_server_is_given_the_adapter_again(self, engine, server, policy):
        engine.push(policy)
        for again in (engine.push, lambda policy: None):
            server.kill()
            server.start()
            again(policy)
            found = engine.generate(PROMPTS, PARAMETERS, num_samples=2, seeds=SEEDS)
            assert_equal(found, written(InProcessEngine(Codec()), policy))

    def test_another_base_is_found_out(self, stand_in, built_llama, policy, tmp_path):
        changed(built_llama[0].from_pretrained(policy.peft_config["default"].base_model_name_or_path)).save_pretrained(
            tmp_path / "other"
        )
        engine = VLLMEngine(stand_in(tmp_path / "other").url, str(tmp_path / "weights"))
        with pytest.raises(EngineError, match="Was it started with another model"):
            engine.push(policy)

    def test_merged_with_its_base(self, server, policy, tmp_path):
        engine = VLLMEngine(server.url, str(tmp_path), lora="merge")
        found, wanted = (written(one, policy) for one in (engine, InProcessEngine(Codec())))
        assert torch.equal(found.ids, wanted.ids)
        assert not server.asked("/v1/load_lora_adapter")
        assert len(server.asked("/collective_rpc")) == 1

    def test_another_process_waits_for_the_adapter(self, engine, server, policy, tmp_path, monkeypatch):
        engine.push(policy)
        monkeypatch.setattr(vllm, "rank_and_world_size", lambda: (1, 2))
        second = VLLMEngine(server.url, str(tmp_path), timeout=0.3)
        assert_equal(written(second, policy), written(InProcessEngine(Codec()), policy))
        with pytest.raises(EngineError, match="process 1 waited"):
            second.push(adapted(policy))

    def test_what_vllm_reads_no_adapter_of(self, engine, tiny_llama):
        policy = add_lora(tiny_llama, LoraConfig(r=2, use_dora=True))
        with pytest.raises(ValueError, match=r"lora.use_dora=True: vLLM reads no adapter with it"):
            engine.push(policy)

    def test_a_server_that_takes_no_adapters(self, engine, server, policy):
        server.wrong(missing=["/v1/load_lora_adapter"])
        with pytest.raises(EngineError, match="VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 and --enable-lora"):
            engine.push(policy)


def adapted(policy):
    """The same LoRA policy after an update that can be seen."""
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return policy.eval()
