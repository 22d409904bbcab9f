"""EVA: adapters that start at the main directions of what their layers read."""

import copy

import lightning as L
import pytest
import torch

from alignment_modules import DPOModule, SFTModule
from alignment_modules.policies.adapters import adapter_is_identity, lora_layers
from alignment_modules.policies.input_start import find_waiting, input_directions, set_directions
from alignment_modules.policies.load import LoraConfig, PolicyConfig, build_policy
from alignment_modules.policies.lora import add_lora
from alignment_modules.policies.segments import Segments
from tests.batches import pairs, supervised
from tests.models import other_than
from tests.paradigms import ROWS, build, headed


def eva(model, **options):
    return add_lora(copy.deepcopy(model), LoraConfig(**{"r": 4, "alpha": 8, "init": "eva"} | options))


def text(batch):
    return Segments.from_labels(batch["input_ids"], batch["input_ids"], batch["attention_mask"], reads="targets+last")


def inputs_by_hand(model, batch):
    """What each adapted layer reads of real tokens, row by row without padding, in float64: `[tokens, in]`."""
    found, hooks = {}, []
    for path, layer in lora_layers(model):
        hooks.append(
            layer.register_forward_pre_hook(lambda _, x, path=path: found.setdefault(path, []).append(x[0][0]))
        )
    with torch.no_grad():
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            model(ids[mask.bool()][None])
    for hook in hooks:
        hook.remove()
    return {path: torch.cat(rows).double() for path, rows in found.items()}


def assert_directions(model, inputs):
    for path, down in downs(model).items():
        right = torch.linalg.svd(inputs[path], full_matrices=False).Vh[:4]
        torch.testing.assert_close((down * right).sum(dim=1).abs(), torch.ones(4).double(), rtol=0, atol=1e-5, msg=path)
        assert (down.gather(1, down.abs().argmax(dim=1, keepdim=True)) > 0).all()


def downs(model):
    return {path: layer.lora_A["default"].weight.detach().double() for path, layer in lora_layers(model)}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("options", [{}, {"use_dora": True, "dropout": 0.5}], ids=["plain", "dora"])
def test_the_right_singular_vectors_of_what_a_layer_reads(tiny_llama, side, options):
    model, batch = eva(tiny_llama, **options), supervised(range(6), 3, side)
    before = model(batch["input_ids"]).logits
    pieces = [text({name: value[rows] for name, value in batch.items()}) for rows in (slice(2), slice(2, 6))]
    set_directions(model, input_directions(model, pieces))
    wanted = inputs_by_hand(model.eval(), batch)
    assert len(wanted) == 14
    assert_directions(model, wanted)
    assert all(not layer.lora_B["default"].weight.any() for _, layer in lora_layers(model))
    assert adapter_is_identity(model)
    assert torch.equal(model(batch["input_ids"]).logits, before)


def test_a_quantized_base(llama_folder):
    pytest.importorskip("torchao")
    options = {"quantization": "int8_weight_only", "lora": LoraConfig(r=4, init="eva")}
    model, batch = build_policy(PolicyConfig(path=str(llama_folder), **options)).eval(), supervised(range(6), 3)
    set_directions(model, input_directions(model, [text(batch)]))
    assert_directions(model, inputs_by_hand(model, batch))


def test_nothing_is_drawn_and_nothing_else_changes(tiny_llama):
    model = eva(tiny_llama, dropout=0.5).train()
    modes = [child.training for child in model.modules()]
    state, generator = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    input_directions(model, [text(supervised(range(4))), None])
    assert torch.equal(generator, torch.get_rng_state())
    assert [child.training for child in model.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not any(child._forward_pre_hooks for child in model.modules())


def test_matrices_that_do_not_fit_together_take_more_passes(tiny_llama, monkeypatch):
    model, batch = eva(tiny_llama), text(supervised(range(4)))
    expected = input_directions(model, [batch])
    monkeypatch.setattr("alignment_modules.policies.input_start._HELD", 8 * 48**2)
    found = input_directions(model, [batch])
    assert all(torch.equal(value, found[path]) for path, value in expected.items())


@pytest.mark.parametrize("name", ROWS)
def test_every_paradigm_starts_with_its_first_batch(train, tiny_llama, name):
    row, policy = ROWS[name], headed(name, tiny_llama)
    held = {"reference": None} if "reference" in row.options(policy) else {}
    module = build(name, eva(policy, r=2), other=other_than(policy), **held)
    module.make_optimizer = lambda groups: torch.optim.SGD(groups, lr=0.0)
    waiting = find_waiting(module)
    assert list(waiting) == ["policy"]
    fresh = downs(module.policy)
    train(module, [row.batch(range(4)), row.batch(range(2, 6))])
    for path, down in downs(module.policy).items():
        assert not torch.equal(down, fresh[path])
        torch.testing.assert_close(down @ down.T, torch.eye(2).double(), rtol=0, atol=1e-6)


def test_a_critic_that_is_a_copy_starts_so_too(train, tiny_llama):
    module = build("ppo", eva(tiny_llama, r=2), other=other_than(tiny_llama), reference=None, critic=None)
    assert list(find_waiting(module)) == ["policy", "critic"]
    module.critic_pretrain_steps = 1  # of which no step of the run comes
    module.make_optimizer = lambda groups: torch.optim.SGD(groups, lr=0.0)
    train(module, [ROWS["ppo"].batch(range(4))])
    for path, down in downs(module.critic).items():
        assert torch.equal(down, downs(module.policy)[path])


def sft(policy, **options):
    options.setdefault("optimizer", lambda groups: torch.optim.AdamW(groups, lr=0.05))
    return SFTModule(policy=copy.deepcopy(policy), **options)


def test_the_run_starts_as_the_base(train, tiny_llama):
    losses = []
    for policy in (tiny_llama, eva(tiny_llama, dropout=0.1)):
        module = sft(policy)
        module.compares_log_probs = True  # without dropout
        losses.append(train(module, [supervised(range(5))]).callback_metrics["train/loss"])
    assert losses[0] == pytest.approx(float(losses[1]), abs=1e-6)


def test_micro_batches_change_nothing(train, tiny_llama):
    batch, ends = pairs(range(6)), []
    for size in (None, 2):
        module = DPOModule(policy=eva(tiny_llama), micro_batch_size=size, loss="sppo_hard")
        module.make_optimizer = lambda groups: torch.optim.SGD(groups, lr=0.0)
        module.automatic_optimization = False
        train(module, [batch])
        ends.append(downs(module.policy))
    for path, down in ends[0].items():
        torch.testing.assert_close(ends[1][path], down, rtol=0, atol=1e-6)


class TestRuns:
    @pytest.fixture
    def fit(self, llama_folder, tmp_path):
        """Fits four steps with a loader that begins anew; `stop` ends it as SIGTERM would, after so many."""

        def run(name, stop=None, ckpt_path=None, module=None):
            class Stop(L.Callback):
                def on_train_batch_end(self, trainer, *_):
                    if trainer.global_step == stop:
                        trainer.save_checkpoint(tmp_path / f"{name}.ckpt")
                        trainer.should_stop = True

            torch.manual_seed(len(name))  # the adapters are drawn otherwise each time
            lora = LoraConfig(r=4, init="eva")
            module = module or sft(build_policy(PolicyConfig(path=str(llama_folder), lora=lora)))
            trainer = L.Trainer(
                max_epochs=1,
                accelerator="cpu",
                logger=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                enable_checkpointing=False,
                callbacks=[Stop()],
            )
            loader = torch.utils.data.DataLoader([supervised(range(3))] * 4, batch_size=None)
            trainer.fit(module, loader, ckpt_path=ckpt_path)
            return module, trainer

        return run

    def test_two_runs_and_one_that_resumes_are_equal_bit_for_bit(self, fit, tmp_path):
        whole = fit("whole")[0].state_dict()
        fit("stopped", stop=2)
        module, trainer = fit("resumed and longer", ckpt_path=tmp_path / "stopped.ckpt")
        assert trainer.global_step == 4
        assert all(torch.equal(value, whole[name]) for name, value in module.state_dict().items())

    def test_trained_adapters_are_left_alone(self, fit):
        module, _ = fit("first")
        before = downs(module.policy)
        module.make_optimizer = lambda groups: torch.optim.SGD(groups, lr=0.0)
        fit("second", module=module)
        assert find_waiting(module) == {}
        assert all(torch.equal(value, before[path]) for path, value in downs(module.policy).items())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"r": 33}, r"lora.r=33 with lora.init='eva': .*q_proj.* reads 32 numbers a token"),
        (
            {"target_modules": ["embed_tokens"]},
            r"lora.init='eva' is for linear layers, .*embed_tokens.* is a Embedding",
        ),
        ({"init": "corda"}, "lora.init='corda' is not supported"),
    ],
)
def test_refuses(tiny_llama, options, says):
    tiny_llama.config.tie_word_embeddings = False
    tiny_llama.lm_head.weight = torch.nn.Parameter(tiny_llama.lm_head.weight.detach().clone())
    with pytest.raises(ValueError, match=says):
        eva(tiny_llama, **options)


def test_a_first_batch_that_is_too_small(train, tiny_llama):
    batch = {name: supervised(range(1))[name][:, :3] for name in ("input_ids", "labels")}
    with pytest.raises(ValueError, match=r"lora.r=8: the first batch holds \d tokens that are read"):
        train(sft(eva(tiny_llama, r=8)), [batch])


def test_a_batch_of_a_subclass_that_nothing_can_be_read_of(train, tiny_llama):
    class Own(SFTModule):
        batch_keys = ()

        def segments(self, batch):
            return None

    with pytest.raises(
        ValueError, match=r"lora.init='eva' reads .* of a batch, and this one for Own holds \['tokens'\]"
    ):
        train(Own(policy=eva(tiny_llama)), [{"tokens": supervised(range(2))["input_ids"]}])
