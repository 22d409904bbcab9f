"""Muon beside AdamW: against the two written out in float64, what goes where, and that it is one optimizer."""

import copy
import functools
import io

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from torch import nn

from alignment_modules import PolicyConfig, PPOModule, SFTModule
from alignment_modules.policies import LoraConfig, build_policy
from alignment_modules.policies.lora import add_lora
from alignment_modules.training.muon import MuonWithAdamW
from alignment_modules.training.parameter_groups import parameter_groups
from alignment_modules.training.schedules import LinearSchedule
from tests.batches import supervised
from tests.models import MIXTRAL, Plain
from tests.paradigms import build, headed

IDS = torch.arange(1, 13).reshape(2, 6)


def orthogonalised(matrix, steps=5):
    """The Newton-Schulz iteration of Muon (Jordan et al. 2024), in bfloat16 as there."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix.bfloat16()
    tall = len(x) > len(x.T)
    x = x.T if tall else x
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.T if tall else x).double()


def muon_step(state, parameter, gradient, lr, decay, momentum=0.95):
    state["m"] = momentum * state.get("m", torch.zeros_like(gradient)) + (1 - momentum) * gradient
    update = orthogonalised((1 - momentum) * gradient + momentum * state["m"])
    return parameter * (1 - lr * decay) - lr * 0.2 * max(parameter.shape) ** 0.5 * update


def adamw_step(state, parameter, gradient, lr, decay, betas=(0.9, 0.999), eps=1e-8):
    state["t"] = state.get("t", 0) + 1
    state["m"] = betas[0] * state.get("m", 0) + (1 - betas[0]) * gradient
    state["v"] = betas[1] * state.get("v", 0) + (1 - betas[1]) * gradient**2
    first, second = (state[key] / (1 - beta ** state["t"]) for key, beta in zip("mv", betas, strict=True))
    return parameter * (1 - lr * decay) - lr * first / (second.sqrt() + eps)


def gradients(model):
    model.zero_grad()
    model(IDS).logits.log_softmax(-1)[..., 3].mean().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_against_both_written_out(tiny_llama):
    model, copied, states = tiny_llama.double(), copy.deepcopy(tiny_llama).double(), {}
    optimizer = MuonWithAdamW(parameter_groups(model), lr=0.01, weight_decay=0.3, adamw_lr_ratio=0.5)
    for _ in range(4):
        gradients(model)
        optimizer.step()
        expected = {}
        for name, gradient in gradients(copied).items():
            state, parameter = states.setdefault(name, {}), copied.get_parameter(name).detach()
            if "proj" in name:
                expected[name] = muon_step(state, parameter, gradient, 0.01, 0.3)
            else:
                expected[name] = adamw_step(state, parameter, gradient, 0.005, 0.0 if "norm" in name else 0.3)
        copied.load_state_dict(expected, strict=False)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, copied.get_parameter(name), rtol=1e-10, atol=1e-12, msg=name)


def test_every_direction_of_a_matrix_is_moved_about_as_far(tiny_llama):
    weight = tiny_llama.model.layers[0].mlp.up_proj.weight
    optimizer = MuonWithAdamW(parameter_groups(tiny_llama), lr=0.01, weight_decay=0.0)
    gradient, before = gradients(tiny_llama)["model.layers.0.mlp.up_proj.weight"].clone(), weight.detach().clone()
    optimizer.step()
    moved = torch.linalg.svdvals((before - weight).double()) / (0.01 * 0.2 * 48**0.5)
    given = torch.linalg.svdvals(gradient.double())
    assert given[0] > 100 * given[-1]
    inside = given > 1e-3 * given[0]  # what is almost 0 is not lifted in five iterations
    assert moved[inside].max() < 1.3
    assert moved[inside].min() > 0.5


def kinds(model):
    """Names of the parameters in each group."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    optimizer = MuonWithAdamW(parameter_groups(model))
    return {group["name"]: {names[id(p)] for p in group["params"]} for group in optimizer.param_groups}


def test_what_goes_where_in_a_language_model(tiny_llama_config):
    model = build_policy(PolicyConfig(config=tiny_llama_config | {"tie_word_embeddings": False}))
    found = kinds(model)
    assert [*found] == ["muon", "decay", "no_decay"]
    assert found["muon"] == {name for name, _ in model.named_parameters() if "proj" in name}
    assert found["decay"] == {"model.embed_tokens.weight", "lm_head.weight"}
    assert all("norm" in name for name in found["no_decay"])


def test_a_scalar_head_and_experts_in_one_tensor_go_to_adamw(tiny_llama):
    scalar = headed("reward", tiny_llama)
    assert "score.weight" in kinds(scalar)["decay"]
    experts = build_policy(PolicyConfig(config=MIXTRAL))
    decay = kinds(experts)["decay"]
    assert {experts.get_parameter(name).ndim for name in decay if "experts" in name} == {3}
    assert all(experts.get_parameter(name).ndim == 2 for name in kinds(experts)["muon"])


def test_factors_of_adapters_are_matrices_but_of_the_ends(tiny_llama):
    tiny_llama.config.tie_word_embeddings = False
    tiny_llama.lm_head.weight = nn.Parameter(tiny_llama.lm_head.weight.detach().clone())
    model = add_lora(tiny_llama, LoraConfig(r=2, target_modules=["q_proj", "embed_tokens", "lm_head"]))
    found = kinds(model)
    assert len(found["muon"]) == 4
    assert all("q_proj.lora_" in name for name in found["muon"])
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in found["decay"]} == {"embed_tokens", "lm_head"}


def test_another_modules_head_is_known_by_its_outputs():
    model = nn.ModuleDict({"policy": Plain(), "mix": nn.Linear(16, 16)})
    found = kinds(model)
    assert found["muon"] == {"mix.weight"}
    assert found["decay"] == {"policy.table.weight", "policy.head.weight"}


def test_groups_given_by_hand():
    matrix, other = nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(3))
    groups = [{"name": "rest", "params": [other], "lr": 0.5}, {"name": "muon", "params": [matrix]}]
    optimizer = MuonWithAdamW(groups, lr=0.1)
    assert [(group["name"], group["lr"]) for group in optimizer.param_groups] == [("rest", 0.5), ("muon", 0.1)]
    matrix.grad, other.grad = torch.ones(3, 2), torch.ones(3)
    optimizer.step()
    assert optimizer.state[matrix].keys() == {"momentum_buffer"}
    assert optimizer.state[other].keys() == {"step", "exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize(
    ("params", "options", "says"),
    [
        ([nn.Parameter(torch.ones(2, 2))], {}, "params: MuonWithAdamW cannot tell hidden matrices"),
        ([{"params": [nn.Parameter(torch.ones(2, 2))]}], {}, "params: MuonWithAdamW cannot tell"),
        (parameter_groups(Plain()), {}, "optimizer=MuonWithAdamW has no hidden matrix .* use torch.optim.AdamW"),
        ([{"name": "muon", "params": [nn.Parameter(torch.ones(2))]}], {}, r"'muon' holds a tensor of shape \(2,\)"),
        ([], {"lr": -1.0}, "lr=-1.0 must be a finite number of 0 or more"),
        ([], {"momentum": 1.0}, r"momentum=1.0 must be a finite number in \[0, 1\)"),
        ([], {"ns_steps": 0}, "ns_steps=0 must be an integer from 1 to 99"),
        ([], {"adjust_lr_fn": "rms"}, "adjust_lr_fn='rms' must be 'match_rms_adamw' or 'original'"),
        ([], {"adamw_lr_ratio": 0.0}, "adamw_lr_ratio=0.0 must be a finite number > 0"),
        (
            parameter_groups(nn.Linear(2, 2)),
            {"betas": (0.9, 1.5)},
            r"betas=\(0.9, 1.5\) must be two finite numbers in \[0, 1\)",
        ),
    ],
)
def test_what_is_refused(params, options, says):
    with pytest.raises(ValueError, match=says):
        MuonWithAdamW(params, **options)


def test_sharded_matrices_are_refused():
    from torch.distributed import HashStore, destroy_process_group, init_process_group
    from torch.distributed.tensor import distribute_module, init_device_mesh

    init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        module = distribute_module(nn.Linear(2, 2), init_device_mesh("cpu", (1,)))
        with pytest.raises(ValueError, match=r"MuonWithAdamW is not allowed with sharded weights .* strategy ddp"):
            MuonWithAdamW(parameter_groups(module))
    finally:
        destroy_process_group()


@pytest.mark.parametrize("how", ["state", "pickle", "deepcopy"])
def test_goes_on_bit_for_bit(tiny_llama, how):
    model, twin = tiny_llama, copy.deepcopy(tiny_llama)
    optimizer = MuonWithAdamW(parameter_groups(model), lr=0.01)
    for _ in range(2):
        gradients(model)
        optimizer.step()
    twin.load_state_dict(model.state_dict())
    if how == "state":
        other = MuonWithAdamW(parameter_groups(twin), lr=0.5)
        stream = io.BytesIO()
        torch.save(optimizer.state_dict(), stream)
        other.load_state_dict(torch.load(io.BytesIO(stream.getvalue()), weights_only=True))
    else:
        pair = (twin, optimizer)
        if how == "pickle":
            stream = io.BytesIO()
            torch.save((model, optimizer), stream)
            pair = torch.load(io.BytesIO(stream.getvalue()), weights_only=False)
        else:
            pair = copy.deepcopy((model, optimizer))
        twin, other = pair
    for one, moves in ((model, optimizer), (twin, other)):
        gradients(one)
        moves.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
    assert other.param_groups[0]["lr"] == 0.01


# In a Trainer


@pytest.fixture
def module(tiny_llama):
    def make(**options):
        optimizer = functools.partial(MuonWithAdamW, lr=0.01, weight_decay=0.1, adamw_lr_ratio=0.1)
        return SFTModule(policy=copy.deepcopy(tiny_llama), optimizer=optimizer, **options)

    return make


def test_rates_of_each_group_follow_the_schedule_and_are_monitored(module, train, tmp_path):
    seen = []

    class Note(L.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            seen.append([(group["name"], group["lr"], group["weight_decay"]) for group in optimizer.param_groups])

    monitor = LearningRateMonitor("step")
    options = {"callbacks": [Note(), monitor], "logger": L.pytorch.loggers.CSVLogger(tmp_path)}
    made = module(lr_scheduler=lambda optimizer: LinearSchedule(optimizer, total_steps=2))
    trainer = train(made, [supervised(range(4))] * 2, **options)
    for step, factor in enumerate((1.0, 0.5)):
        assert [name for name, *_ in seen[step]] == ["muon", "decay", "no_decay"]
        assert [rate for _, rate, _ in seen[step]] == pytest.approx([0.01 * factor, 0.001 * factor, 0.001 * factor])
    assert [decay for *_, decay in seen[0]] == [0.1, 0.1, 0.0]
    assert {"lr-MuonWithAdamW/muon", "lr-MuonWithAdamW/no_decay"} <= {*monitor.lrs}
    assert [group.get("fused") for group in trainer.optimizers[0].param_groups] == [None, True, True]
    assert float(trainer.callback_metrics["train/learning_rate"]) == pytest.approx(0.005)


def test_who_moves_what_is_said(module, train, capsys, caplog):
    with caplog.at_level("INFO", "lightning.pytorch"):
        train(module(), [supervised(range(4))])
    text = caplog.text + capsys.readouterr().out + capsys.readouterr().err
    assert "optimizer of the policy: Muon for 14 tensors" in text
    assert "AdamW for 6 tensors" in text


def test_mixed_precision_clipping_and_accumulation(module, train):
    options = {"precision": "bf16-mixed", "gradient_clip_val": 0.1, "accumulate_grad_batches": 2}
    made = module()
    before = copy.deepcopy(made.policy.state_dict())
    trainer = train(made, [supervised(range(4))] * 4, **options)
    assert trainer.global_step == 2
    assert not any(torch.equal(value, before[name]) for name, value in made.policy.state_dict().items())


def test_a_step_without_targets_moves_nothing(module, train):
    batch = supervised(range(4))
    batch["labels"] = torch.full_like(batch["labels"], -100)
    made = module()
    train(made, [supervised(range(4)), batch])
    after, once = made.policy.state_dict(), module()
    train(once, [supervised(range(4))])
    assert all(torch.equal(value, after[name]) for name, value in once.policy.state_dict().items())


def test_a_critic_has_its_own_at_ten_times_the_rate(tiny_llama, train):
    from tests.paradigms import ROWS

    partial = functools.partial(MuonWithAdamW, lr=1e-3)
    module = build("ppo", headed("ppo", tiny_llama), critic_optimizer=None, optimizer=partial)
    assert isinstance(module, PPOModule)
    trainer = train(module, [ROWS["ppo"].batch(range(2))])
    policy, critic = trainer.optimizers
    assert [type(one) for one in (policy, critic)] == [MuonWithAdamW] * 2
    assert [group["lr"] for group in critic.param_groups] == pytest.approx([0.01] * len(critic.param_groups))
    assert critic.state
