"""The door through which models are sharded, on one process: what is a layer, what is refused, that numbers stay."""

import copy
import types

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import nn

from alignment_modules.policies.critic import build_critic, read_values
from alignment_modules.policies.frozen import Frozen, frozen_companion
from alignment_modules.policies.load import LoraConfig, PolicyConfig, build_policy
from alignment_modules.policies.lora import add_lora
from alignment_modules.policies.modes import reading_mode
from alignment_modules.policies.reading import read
from alignment_modules.policies.scoring import score
from alignment_modules.policies.sharded import class_of, free, gathered, is_sharded, is_whole, local, whole
from alignment_modules.policies.sharding import find_layers, models_in, shard, shard_children
from alignment_modules.rollouts.decoders.llama.weights import no_fast_decoding
from alignment_modules.training.loss_weights import label_segments
from alignment_modules.training.strategies import refuse_strategy
from tests.models import Plain, adapted, critic_beside
from tests.paradigms import ROWS
from tests.rollouts.test_engines import TURNS, opened, tokens


@pytest.fixture(scope="module")
def mesh():
    """Of this process alone."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    from torch.distributed.device_mesh import init_device_mesh

    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


class Blocks(nn.Module):
    """A policy with layers of its own."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(40, 8), nn.Linear(8, 40)
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3)))

    def forward(self, input_ids):
        return self.head(self.blocks(self.table(input_ids)))


def test_layers_are_found_by_structure(tiny_llama):
    assert find_layers(tiny_llama) == list(tiny_llama.model.layers)
    lora = adapted(tiny_llama)
    assert find_layers(lora) == list(lora.get_base_model().model.layers)
    critic = critic_beside(tiny_llama)
    assert find_layers(critic) == list(critic.model.layers)
    assert find_layers(blocks := Blocks()) == list(blocks.blocks)
    assert find_layers(Plain()) == []
    assert find_layers(nn.Sequential(nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]))) == []  # no blocks


def test_what_a_module_holds(tiny_llama):
    module = nn.Module()
    module.policy, module.reference = tiny_llama, frozen_companion(None, tiny_llama)
    module.teacher = nn.ModuleDict({"a": frozen_companion(copy.deepcopy(tiny_llama), tiny_llama)})
    module.off, module.metric = Frozen(None, of=adapted(tiny_llama)), nn.Identity()
    found = dict(models_in(module))
    assert list(found) == ["policy", "reference", "teacher.a"]
    assert found["reference"] is module.reference.module


@pytest.mark.parametrize("make", [copy.deepcopy, adapted, lambda _: Plain(), lambda _: Blocks()])
def test_numbers_and_gradients_stay(mesh, tiny_llama, make):
    policy = make(tiny_llama).train()
    segments = label_segments(ROWS["sft"].batch([0, 1, 2]))
    expected = score(policy, segments).token_logps
    expected.sum().backward()
    gradients = {name: p.grad for name, p in policy.named_parameters() if p.requires_grad}
    policy.zero_grad(set_to_none=True)
    shard(policy, mesh)
    shard(policy, mesh)  # once
    found = score(policy, segments).token_logps
    assert torch.equal(found, expected)
    found.sum().backward()
    assert is_sharded(policy)
    assert not is_whole(policy)
    for name, parameter in policy.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(whole(parameter.grad), gradients[name], rtol=1e-6, atol=1e-6)


def test_a_sharded_policy_is_whole_while_it_is_gathered(mesh, tiny_llama):
    reason = no_fast_decoding(tiny_llama)
    shard(tiny_llama, mesh)
    assert "shards" in no_fast_decoding(tiny_llama)
    with torch.no_grad(), gathered(tiny_llama):
        assert is_whole(tiny_llama)
        assert no_fast_decoding(tiny_llama) is reason is None
        with gathered(tiny_llama):
            pass
        assert all(type(p) is nn.Parameter for p in tiny_llama.parameters())
    assert not is_whole(tiny_llama)
    assert all(hasattr(p, "to_local") for p in tiny_llama.parameters())
    assert class_of(tiny_llama).__name__ == "LlamaForCausalLM"
    assert class_of(nn.Linear(1, 1)) is nn.Linear


def test_a_head_in_float32_on_a_trunk_in_bfloat16(mesh, tiny_llama):
    critic = build_critic(None, tiny_llama.to(torch.bfloat16))
    nn.init.normal_(critic.score.weight)
    segments = label_segments(ROWS["sft"].batch([0, 1]))
    expected = read_values(read(critic, segments))
    shard(critic, mesh)
    values = read_values(read(critic, segments))
    assert torch.equal(values, expected)
    values.sum().backward()
    assert critic.score.weight.grad.dtype == torch.float32
    assert local(critic.score.weight.grad).abs().sum() > 0


def test_a_reference_by_switching_off_leaves_adapters_trainable(mesh, tiny_llama_config):
    tiny_llama = build_policy(PolicyConfig(config=tiny_llama_config | {"tie_word_embeddings": False}))
    torch.manual_seed(2)
    # adapters in layers, and in the group of what is outside of them
    policy = add_lora(copy.deepcopy(tiny_llama), LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"]))
    reference = Frozen(None, of=policy)
    segments = label_segments(ROWS["sft"].batch([0, 1]))
    with reading_mode(tiny_llama):
        expected = score(tiny_llama, segments).token_logps
    trained = [name for name, p in policy.named_parameters() if p.requires_grad]
    shard(policy, mesh)
    with reference.reading() as model:  # the first pass of all, before the weights were ever gathered
        assert torch.equal(score(model, segments).token_logps, expected)
    for _ in range(2):
        score(policy, segments).token_logps.sum().backward()
        assert [name for name, p in policy.named_parameters() if p.requires_grad] == trained
        assert all(p.grad is not None for p in policy.parameters() if p.requires_grad)


@pytest.mark.parametrize(("make", "decoder"), [(copy.deepcopy, "FastDecoder"), (lambda _: Plain(), "RecomputeDecoder")])
def test_a_session_goes_on_where_the_weights_were_freed_between_its_turns(mesh, tiny_llama, make, decoder):
    policy = make(tiny_llama).eval()
    written = []
    for _ in range(2):  # whole, then in shards
        engine, session = opened(policy)
        assert type(session.decoder).__name__ == decoder
        turns = [session.turn, *(engine.extend(session, rows, appended) for rows, appended in TURNS)]
        written.append([(tokens(turn), turn.token_logps) for turn in turns])
        shard(policy, mesh)
    for (ids, logps), (sharded_ids, sharded_logps) in zip(*written, strict=True):
        assert sharded_ids == ids
        assert torch.equal(sharded_logps, logps)


@pytest.mark.parametrize("off", [False, True])
def test_scores_of_a_frozen_model_are_kept_while_its_weights_come_and_go(mesh, tiny_llama, off):
    policy = adapted(tiny_llama)
    reference = Frozen(None if off else copy.deepcopy(tiny_llama), of=policy)
    segments = label_segments(ROWS["sft"].batch([0, 1]))
    shard(policy, mesh)
    if not off:
        shard(reference.module, mesh)
    computed = []

    def compute():
        with reference.reading() as model:
            computed.append(score(model, segments).token_logps)
        return computed[-1]

    for _ in range(3):
        score(policy, segments).token_logps.sum().backward()
        assert torch.equal(reference.cached([b"0", b"1"], compute), computed[0])
        if not off:
            free(reference.module)
    assert len(computed) == 1


def test_refuses_models_that_cannot_be_sharded(mesh, tiny_llama):
    mixed = copy.deepcopy(tiny_llama)
    mixed.model.layers[0].mlp.to(torch.bfloat16)
    with pytest.raises(ValueError, match="critic: a LlamaDecoderLayer trains parameters of bfloat16 and float32"):
        shard(mixed, mesh, name="critic")
    quantized = Blocks()
    quantized.codes = nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match="policy is quantized \\('codes'\\)"):
        shard(quantized, mesh)
    with pytest.raises(ValueError, match="policy is compiled as a whole"):
        shard(torch.compile(Blocks()), mesh)
    compiled = copy.deepcopy(tiny_llama)
    compiled.model.layers[0].compile()
    with pytest.raises(ValueError, match="reference has compiled layers"):
        shard(compiled, mesh, name="reference")
    module = nn.Module()
    module.scale = nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match="parameter 'scale' of its own"):
        shard_children(module, mesh)


class Split(ModelParallelStrategy):
    """Weights over two processes."""

    device_mesh = {"tensor_parallel": types.SimpleNamespace(size=lambda: 2)}


@pytest.mark.parametrize(
    "strategy",
    ["fsdp", "fsdp_cpu_offload", "deepspeed", "deepspeed_stage_3", "lightning.pytorch.strategies.FSDPStrategy"],
)
def test_refuses_other_ways_to_shard_by_name(strategy):
    with pytest.raises(ValueError, match=f"trainer.strategy={strategy.rpartition('.')[2]!r}.*strategy='fsdp2'"):
        refuse_strategy(strategy)


def test_refuses_strategies_that_are_made_already():
    with pytest.raises(ValueError, match=r"FSDPStrategy.*strategy='fsdp2'"):
        refuse_strategy(FSDPStrategy())
    with pytest.raises(ValueError, match=r"DeepSpeedStrategy.*strategy='fsdp2'"):
        refuse_strategy(DeepSpeedStrategy.__new__(DeepSpeedStrategy))
    with pytest.raises(ValueError, match=r"Split splits each weight over tensor_parallel_size=2"):
        refuse_strategy(Split())
    for allowed in ("auto", "ddp", "fsdp2", DDPStrategy()):
        refuse_strategy(allowed)
