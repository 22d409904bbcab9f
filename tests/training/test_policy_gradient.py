"""Coefficients that a policy-gradient module adapts: their course, what they weigh, and that they are resumed."""

import copy

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from alignment_modules import GRPOModule
from datamodules.loader import ResumableLoader
from datamodules.orders import UniformOrder
from tests.batches import rollouts
from tests.models import other_than
from tests.paradigms import never_called

PLACES = [{"kl_placement": "reward", "kl_estimator": "k1"}, {"kl_placement": "loss", "kl_estimator": "k3"}]
KL = {"beta": 0.2, "kl_target": 0.01, "kl_horizon": 100}
ENTROPY = {"entropy_coef": 0.02, "entropy_target": 100.0, "entropy_coef_delta": 0.03}


class Noted(Callback):
    """What each step logged."""

    def __init__(self):
        self.steps = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.steps.append({name.removeprefix("train/"): float(v) for name, v in trainer.callback_metrics.items()})


@pytest.fixture
def make(tiny_llama):
    def factory(policy=tiny_llama, **options):
        reference = {"reference": other_than(tiny_llama)} if options.get("beta") else {}
        settings = {"num_generations": 4, "max_completion_length": 8, "max_grad_norm": None, **reference}
        return GRPOModule(
            policy=copy.deepcopy(policy),
            rewards=never_called,
            optimizer=lambda groups: torch.optim.SGD(groups, lr=0.1),
            **(settings | options),
        )

    return factory


def batches(count=4):
    return [rollouts([row + 2 * number for row in range(4)]) for number in range(count)]


def run(train, module, given, **options):
    noted = Noted()
    train(module, given, callbacks=[noted], **options)
    return noted.steps


@pytest.mark.parametrize("steps", [{}, {"num_iterations": 2, "minibatches": 2, "micro_batch_size": 3}])
@pytest.mark.parametrize("place", PLACES)
def test_beta_follows_the_divergence(make, train, place, steps):
    module = make(**KL, **place, **steps)
    seen = run(train, module, batches(), log_every_n_steps=4 if steps else 1)
    beta, expected = 0.2, []
    for step in seen:
        expected.append(beta)
        beta *= 1 + min(max(step["kl"] / 0.01 - 1, -0.2), 0.2) * 16 / 100
    if not steps:  # with several, the logged means are of the same tokens, but of the steps that are logged
        assert [step["kl_coef"] for step in seen] == pytest.approx(expected)
        assert float(module.coefficients.kl) == pytest.approx(beta)
    assert len({step["kl_coef"] for step in seen}) == 4


@pytest.mark.parametrize("target", [100.0, 0.0])
def test_the_bonus_follows_the_entropy(make, train, target):
    module = make(**ENTROPY | {"entropy_target": target})
    seen = [step["entropy_coef"] for step in run(train, module, batches(3))]
    assert seen == pytest.approx([0.0, 0.05, 0.08] if target else [0.0, 0.0, 0.0])
    assert float(module.coefficients.controllers["entropy"].value) == pytest.approx(0.11 if target else 0.0)


@pytest.mark.parametrize("options", [*({**KL, **place} for place in PLACES), ENTROPY])
def test_the_coefficient_weighs_what_it_is_said_to(make, train, options):
    """The second rollout is that of a module with this coefficient, fixed, on the weights after the first."""
    first, second = batches(2)
    adapted = make(**options)
    train(adapted, [first, second])
    begun = make(**options)
    train(begun, [first])
    kl = {"beta": float(begun.coefficients.kl)} if "beta" in options else {}
    place = {name: options[name] for name in ("kl_placement", "kl_estimator") if name in options}
    fixed = make(begun.policy, **kl, **place, entropy_coef=float(begun.coefficients.entropy or 0.0))
    train(fixed, [second])
    changed = [not torch.equal(p, q) for p, q in zip(adapted.parameters(), begun.parameters(), strict=True)]
    assert any(changed)
    for (name, value), other in zip(adapted.policy.named_parameters(), fixed.policy.parameters(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def resumable(given):
    order = UniformOrder(len(given), batch_size=1, shuffle=False)
    return ResumableLoader(given, order, collate_fn=lambda rows: rows[0])


@pytest.mark.parametrize("place", PLACES)
def test_a_resumed_run_is_equal_bit_for_bit(make, tmp_path, place):
    options = {**KL, **ENTROPY, **place, "num_iterations": 2, "micro_batch_size": 3}
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    whole, resumed = make(**options), make(**options)
    L.Trainer(max_epochs=1, callbacks=[saver], **quiet).fit(whole, resumable(batches()))
    trainer = L.Trainer(max_epochs=1, callbacks=[copy.copy(saver)], **quiet)
    trainer.fit(resumed, resumable(batches()), ckpt_path=str(tmp_path / "step=4.ckpt"))
    assert trainer.global_step == 8
    assert resumed.extra_state() == whole.extra_state()
    assert whole.extra_state()["coefficients"]["kl"]["value"] != KL["beta"]
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_what_is_adapted_is_said(make):
    said = make(**KL, **ENTROPY).describe()
    assert said["KL"] == "k3 in the loss, beta 0.2, adapted to 0.01 nats a token over 100 completions"
    assert said["entropy"] == (
        "weight 0.02, adapted by steps of 0.03 while the entropy is at most 100 nats a token, else 0"
    )
    assert "entropy" not in make().describe()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kl_target": 0.1}, "kl_target=0.1 needs beta above 0"),
        ({"beta": 0.1, "kl_horizon": 50}, "kl_horizon=50 is given, but kl_target=None"),
        ({"beta": 0.1, "kl_target": 0}, "kl_target=0 must be a finite number > 0 or null"),
        ({"beta": 0.1, "kl_target": 1.0, "kl_horizon": 0}, "kl_horizon=0 must be a finite number > 0 or null"),
        ({"entropy_coef_delta": 0.1}, "entropy_coef_delta=0.1 is given, but entropy_target=None"),
        ({"entropy_target": 1.0, "entropy_coef": -0.1}, "entropy_coef=-0.1 must be from 0 to 1"),
        ({"entropy_target": -1.0}, "entropy_target=-1.0 must be a finite number of 0 or more or null"),
        (
            {"entropy_target": 1.0, "entropy_coef_delta": 2.0},
            r"entropy_coef_delta=2.0 must be a finite number in \(0, 1",
        ),
    ],
)
def test_refuses(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)
