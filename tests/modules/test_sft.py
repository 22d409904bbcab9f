"""SFT's losses against plain PyTorch, on a Hugging Face model and on a plain module."""

import copy

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.plugins import MixedPrecision
from torch import nn

from alignment_modules import EvaluationConfig, LoraConfig, PolicyConfig, PretrainModule, SFTModule


class Plain(nn.Module):
    """A language model that is not of transformers."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(40, 16), nn.Linear(16, 40)
        self.mixer = nn.GRU(16, 16, batch_first=True)

    def forward(self, input_ids):
        return self.head(self.mixer(self.embedding(input_ids))[0])


@pytest.fixture(params=["llama", "plain"])
def policy(request, tiny_llama):
    torch.manual_seed(1)
    return tiny_llama if request.param == "llama" else Plain()


@pytest.fixture
def batch():
    ids = torch.randint(1, 40, (3, 8), generator=torch.Generator().manual_seed(0))
    labels = torch.where(torch.arange(8) > 2, ids, -100)
    return {"input_ids": ids, "labels": labels}


def plain_loss(policy, batch, **options):
    output = policy(batch["input_ids"])
    logits = (output if isinstance(output, torch.Tensor) else output.logits)[:, :-1].flatten(0, 1)
    targets = batch["labels"][:, 1:].flatten()
    kept = targets != -100
    logits, targets = logits[kept], targets[kept]
    nll = F.cross_entropy(logits, targets, reduction="none", label_smoothing=options.get("label_smoothing", 0.0))
    if options.get("loss") == "dft":
        nll = nll * nll.detach().neg().exp()
    return (nll + options.get("z_loss", 0.0) * logits.logsumexp(-1).square()).mean()


@pytest.mark.parametrize(
    "options",
    [{}, {"loss": "dft"}, {"label_smoothing": 0.2}, {"z_loss": 0.1}, {"label_smoothing": 0.1, "z_loss": 0.01}],
)
def test_loss_and_gradient(update, assert_same, train, policy, batch, options):
    expected = plain_loss(policy, batch, **options)
    expected.backward()
    gradient = {f"policy.{name}": -p.grad for name, p in policy.named_parameters()}
    policy.zero_grad()
    assert_same(gradient, update(lambda **more: SFTModule(policy=copy.deepcopy(policy), **options, **more), [batch]))
    module = SFTModule(
        policy=copy.deepcopy(policy), optimizer=lambda groups: torch.optim.SGD(groups, lr=0.0), **options
    )
    logged = train(module, [batch]).callback_metrics["train/loss"]
    assert float(logged) == pytest.approx(float(expected), abs=1e-5)


def test_pretraining_is_the_same_objective(train, policy, batch):
    def loss(cls):
        module = cls(policy=copy.deepcopy(policy), optimizer=lambda groups: torch.optim.SGD(groups, lr=0.0))
        return float(train(module, [batch]).callback_metrics["train/loss"])

    assert loss(PretrainModule) == loss(SFTModule)


def test_policy_trains_with_its_dropout(train, tiny_llama, batch):
    """Weights from a folder come in eval mode; a fine-tuned policy must still be trained with its dropout."""
    module = SFTModule(policy=tiny_llama.eval(), optimizer=torch.optim.SGD)
    modes = []
    original = module.objective
    module.objective = lambda batch: (modes.append(module.policy.training), original(batch))[1]
    train(module, [batch])
    assert modes == [True]


@pytest.mark.parametrize(
    ("options", "named"),
    [({"loss": "mse"}, "'mse'"), ({"label_smoothing": 1.0}, "label_smoothing"), ({"z_loss": -1.0}, "z_loss")],
)
def test_refuses(policy, options, named):
    with pytest.raises(ValueError, match=named):
        SFTModule(policy=policy, **options)


def test_float16_training_is_refused_by_name(train, policy, batch):
    plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))
    with pytest.raises(ValueError, match=r"precision='16-mixed'.*overflow float16.*'bf16-mixed'"):
        train(SFTModule(policy=policy), [batch], plugins=[plugin])


def test_a_second_fit_forgets_what_an_interrupted_one_left(train, tiny_llama, batch):
    class Interrupted(SFTModule):
        def training_step(self, batch, batch_idx):
            total = super().training_step(batch, batch_idx)
            if self.interrupt:
                raise InterruptedError
            return total

    def norm(interrupt_first):
        module = Interrupted(policy=copy.deepcopy(tiny_llama), optimizer=lambda g: torch.optim.SGD(g, lr=0.0))
        module.interrupt = interrupt_first
        if interrupt_first:
            with pytest.raises(InterruptedError):
                train(module, [batch] * 4, accumulate_grad_batches=4)
            module.interrupt = False
        metrics = train(module, [batch] * 2, accumulate_grad_batches=2).callback_metrics
        return [float(metrics[f"train/{name}"]) for name in ("grad_norm", "loss", "num_tokens")]

    assert norm(True) == norm(False)


def test_a_loop_without_a_trainer_gets_the_mean_and_its_gradient(tiny_llama, batch):
    module = SFTModule(policy=tiny_llama)
    module.train()
    expected = plain_loss(tiny_llama, batch)
    assert float(module.training_step(batch, 0).detach()) == pytest.approx(float(expected.detach()), abs=1e-5)
    gradient = torch.autograd.grad(expected, tiny_llama.lm_head.weight)[0]
    module.training_step(batch, 0).backward()
    torch.testing.assert_close(tiny_llama.lm_head.weight.grad, gradient, rtol=1e-4, atol=1e-6)
    assert module.configure_optimizers().param_groups
    assert module.describe()["paradigm"] == "sft"
    assert module(batch["input_ids"]).shape == (3, 8, 40)


def test_fabric_trains_a_module(tiny_llama, batch):
    fabric = L.Fabric(accelerator="cpu", devices=1)
    module = SFTModule(policy=tiny_llama, optimizer=lambda groups: torch.optim.SGD(groups, lr=0.1))
    wrapped, optimizer = fabric.setup(module, module.configure_optimizers())
    losses = []
    for _ in range(3):
        loss = wrapped.training_step(batch, 0)
        fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[0] > losses[1] > losses[2]


@pytest.mark.parametrize("name", ["optimizer", "lr_scheduler"])
def test_objects_made_already_are_refused(tiny_llama, name):
    optimizer = torch.optim.AdamW(tiny_llama.parameters())
    made = {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1)}[name]
    with pytest.raises(
        ValueError, match=rf"{name} is a {type(made).__name__} that was made already; allowed is .*lambda"
    ):
        SFTModule(policy=tiny_llama, **{name: made})


def test_a_module_comes_back_from_its_checkpoint(train, tmp_path, tiny_llama_config, tiny_llama, batch):
    policy = PolicyConfig(config=tiny_llama_config, lora=LoraConfig(r=2))
    module = SFTModule(policy=policy, evaluation=EvaluationConfig(num_samples=3), z_loss=0.5)
    train(module, [batch]).save_checkpoint(tmp_path / "a.ckpt")
    found = SFTModule.load_from_checkpoint(tmp_path / "a.ckpt")
    assert (found.z_loss, found.evaluation) == (0.5, EvaluationConfig(num_samples=3))
    for name, value in module.state_dict().items():
        assert torch.equal(value, found.state_dict()[name]), name
    train(SFTModule(policy=tiny_llama), [batch]).save_checkpoint(tmp_path / "b.ckpt")
    with pytest.raises(TypeError, match=r"no objects: give those again, as in SFTModule.load_from_checkpoint\("):
        SFTModule.load_from_checkpoint(tmp_path / "b.ckpt")
    assert SFTModule.load_from_checkpoint(tmp_path / "b.ckpt", policy=tiny_llama).policy is tiny_llama


def test_a_clipping_value_that_is_no_number_is_refused(train, tiny_llama, batch):
    with pytest.raises(ValueError, match=r"gradient_clip_val=nan"):
        train(SFTModule(policy=tiny_llama), [batch], gradient_clip_val=float("nan"))


def test_compiling_all_of_a_module_is_refused_and_its_policy_is_not(train, tiny_llama, batch):
    with pytest.raises(ValueError, match=r"torch.compile\(SFTModule.*PolicyConfig\(..., compile=True\)"):
        train(torch.compile(SFTModule(policy=copy.deepcopy(tiny_llama)), backend="eager"), [batch])
    options = {"optimizer": lambda groups: torch.optim.SGD(groups, lr=0.1)}
    losses = [
        float(train(SFTModule(policy=policy, **options), [batch] * 2).callback_metrics["train/loss"])
        for policy in (copy.deepcopy(tiny_llama), torch.compile(copy.deepcopy(tiny_llama), backend="eager"))
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_segments_come_with_the_batch_and_are_built_once(train, tiny_llama, batch, monkeypatch):
    from alignment_modules.paradigms import sft
    from alignment_modules.policies.segments import Segments

    built, read = [], []
    from_labels, score = Segments.from_labels.__func__, sft.score

    def build(cls, *given):
        built.append(from_labels(cls, *given))
        return built[-1]

    def watch(policy, segments, **options):
        read.append(segments)
        return score(policy, segments, **options)

    monkeypatch.setattr(Segments, "from_labels", classmethod(build))
    monkeypatch.setattr(sft, "score", watch)
    moved, to = [], Segments.to
    monkeypatch.setattr(Segments, "to", lambda self, *given, **how: moved.append(self) or to(self, *given, **how))
    module = SFTModule(policy=tiny_llama)
    train(module, [batch] * 2)
    assert len(built) == len(read) == 2
    assert all(one is other for one, other in zip(built, read, strict=True))
    assert len(moved) == 4  # once where each is made, and by Lightning with its batch
    assert "segments" not in batch
    assert module.objective(batch).weight > 0  # a loop of one's own builds them itself
