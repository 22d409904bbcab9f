"""Training with a server over HTTP: what training in process gives, whatever happens to the server meanwhile."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from alignment_modules import DistillationModule, GRPOModule, OnlineDPOModule, PPOModule
from alignment_modules.callbacks import StopAndSave
from alignment_modules.functional import CORRECTIONS
from alignment_modules.policies import LoraConfig, PolicyConfig
from alignment_modules.rollouts.engines import EngineError, VLLMEngine
from tests.batches import Digits, prompts, supervised, threes
from tests.models import other_than

GENERATE = "/inference/v1/generate"
ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
BATCHES = [prompts(3)] * 4  # the loader of a run that resumes begins anew


@pytest.fixture
def make(folder, tmp_path):
    def factory(cls=GRPOModule, server=None, retries=1, **options):
        defaults = {
            "policy": folder,
            "rewards": threes,
            "num_generations": 4,
            "max_completion_length": 6,
            "tokenizer": Digits(),
            "optimizer": lambda groups: torch.optim.AdamW(groups, lr=0.02),
        }
        if server is not None:
            defaults["engine"] = VLLMEngine(server.url, str(tmp_path / "weights"), timeout=20, retries=retries)
        return cls(**(defaults | options))

    return factory


def weights(module):
    return {
        name: parameter.detach().clone() for name, parameter in module.named_parameters() if parameter.requires_grad
    }


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


# A mask without weights lets rounding between server and trainer change nothing; "mis" weighs by it.
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"correction": "k3_rs"}, marks=pytest.mark.slow),  # as after a restart, below
        {"loss": "dapo", "correction": "k3_rs", "policy": "lora", "beta": 0.05},
        pytest.param(
            {"correction": "k3_rs", "top_k": 20, "top_p": 0.9, "num_iterations": 2, "baseline": "greedy"},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["plain", "lora", "filters"],
)
def test_training_is_that_of_the_engine_in_process_bit_for_bit(make, train, server, folder, options):
    if options.get("policy") == "lora":
        options = options | {"policy": PolicyConfig(path=folder, lora=LoraConfig(r=2, alpha=8))}
    ends, rows = [], []
    for remote in (None, server):
        torch.manual_seed(0)
        module = make(server=remote, **copy.deepcopy(options))
        before = weights(module)
        train(module, copy.deepcopy(BATCHES))
        assert not equal(before, weights(module))
        ends.append(weights(module))
        rows.append(module.last_rollout)
    assert equal(*ends)
    assert rows[1].pop("engine_version") == [4] * 12
    assert rows[0] == rows[1]


def test_the_gate_is_on_and_changes_nothing_where_nothing_differs(make, train, server):
    in_process = make(correction=None)
    module = make(server=server)
    assert in_process.correction is None
    assert module.correction == CORRECTIONS["mis"]
    assert "masked above 3" in module.describe()["correction"]
    assert module.describe()["engine"].startswith(f"vLLM at {server.url}")
    metrics = train(module, copy.deepcopy(BATCHES[:2])).callback_metrics
    assert metrics["train/correction/masked"] == 0
    assert float(metrics["train/correction/weight"]) == pytest.approx(1.0, abs=1e-5)
    assert metrics["train/engine/version"] == 2
    assert 0 <= float(metrics["train/engine/probe_difference"]) < 1e-5
    assert metrics["train/time/push"] > 0
    train(in_process, copy.deepcopy(BATCHES[:2]))
    for name, value in weights(in_process).items():
        torch.testing.assert_close(value, weights(module)[name], atol=1e-4, rtol=0)


def test_losses_that_compare_with_the_sampler_need_no_gate(make, server):
    assert make(server=server, loss="vespo").correction is None
    assert make(server=server, correction="tis").correction == CORRECTIONS["tis"]
    assert make(PPOModule, server=server).correction == CORRECTIONS["mis"]


def test_what_the_engine_cannot_do_is_refused_when_the_module_is_made(make, server):
    with pytest.raises(ValueError, match=r"top_p=0.9 needs top_k"):
        make(server=server, top_p=0.9)
    with pytest.raises(ValueError, match=r"evaluation.min_p=0.2 needs evaluation.top_k"):
        make(server=server, evaluation={"min_p": 0.2})


@pytest.mark.slow
@pytest.mark.parametrize("cls", [OnlineDPOModule, PPOModule])
def test_other_paradigms(make, train, server, cls):
    options = {"num_generations": 2, "rewards": lambda completions: [float(len(text)) for text in completions]}
    ends = []
    for remote in (None, server):
        torch.manual_seed(0)
        module = make(cls, server=remote, **options | ({"correction": "k3_rs"} if cls is PPOModule else {}))
        train(module, copy.deepcopy(BATCHES[:2]))
        ends.append(weights(module))
    assert equal(*ends)


class TestDistillation:
    @pytest.fixture
    def student(self, folder, tiny_llama, tmp_path):
        def make(server=None, **options):
            torch.manual_seed(0)
            engine = None if server is None else VLLMEngine(server.url, str(tmp_path / "weights"), retries=0)
            options = {"on_policy_share": 0.5, "max_completion_length": 6, "seed": 3} | options
            return DistillationModule(
                policy=folder,
                teacher=other_than(tiny_llama),
                tokenizer=Digits(),
                engine=engine,
                optimizer=lambda groups: torch.optim.AdamW(groups, lr=0.02),
                **options,
            )

        return make

    def test_what_the_student_writes_is_what_it_writes_in_process(self, student, train, server):
        batches, ends = [supervised(range(5), 2), supervised(range(4), 2)], []
        for remote in (None, server):
            module = student(remote)
            before = weights(module)
            metrics = train(module, copy.deepcopy(batches)).callback_metrics
            assert not equal(before, weights(module))
            ends.append(weights(module))
        assert equal(*ends)
        assert metrics["train/engine/version"] == 2
        assert len(server.asked(GENERATE)) > 2  # beside a probe of each version

    def test_a_process_without_rows_of_its_own_pushes(self, student, train, server):
        train(student(server, on_policy_share=1e-9), [supervised(range(2), 2)])
        assert len(server.asked("/collective_rpc")) == 1

    def test_a_server_that_is_gone(self, student, train, server):
        module = student(server)
        server.kill()
        with pytest.raises(EngineError, match=r"optimizer step 1: .* cannot be reached"):
            train(module, [supervised(range(3), 2)])

    def test_refusals(self, student, server):
        with pytest.raises(ValueError, match=r"engine=VLLMEngine is of the policy's own samples, and on_policy_share"):
            student(server, on_policy_share=0.0, max_completion_length=None, seed=None)


def test_validation_is_by_the_same_engine(make, server):
    import lightning as L

    module = make(server=server)
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    loader = torch.utils.data.DataLoader([prompts(3)], batch_size=None)
    trainer.validate(module, loader, verbose=False)
    assert "val/reward" in trainer.callback_metrics
    assert len(server.asked(GENERATE)) == 1 + 3


class TestAServerThatGoes:
    @pytest.fixture
    def fit(self, make, train, server, tmp_path):
        """Fits with a folder for checkpoints; `before` is called with the number of each batch."""

        def run(server, name, before=None, ckpt_path=None, retries=1):
            import lightning as L

            torch.manual_seed(0)
            module = make(server=server, retries=retries, correction="k3_rs")

            class Script(L.Callback):
                def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
                    if before is not None:
                        before(trainer.global_step)

            trainer = L.Trainer(
                max_epochs=1,
                accelerator="cpu",
                logger=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                default_root_dir=tmp_path / name,
                log_every_n_steps=1,
                callbacks=[StopAndSave(), Script()],
            )
            loader = torch.utils.data.DataLoader(copy.deepcopy(BATCHES), batch_size=None)
            trainer.fit(module, loader, ckpt_path=ckpt_path)
            return module, trainer

        return run

    @pytest.fixture
    def whole(self, fit):
        """The weights of a run in process."""
        return weights(fit(None, "whole")[0])

    def test_a_restart_between_steps_changes_nothing(self, fit, server, whole):
        def restart(step):
            if step == 2:
                server.kill()
                server.start()

        module, trainer = fit(server, "restarted", restart)
        assert equal(whole, weights(module))
        assert trainer.callback_metrics["train/engine/version"] == 4

    def test_a_run_whose_server_is_gone_ends_with_a_message_and_resumes_bit_for_bit(self, fit, server, whole, tmp_path):
        def kill(step):
            if step == 2:
                server.kill()

        with pytest.raises(EngineError, match=r"optimizer step 3: .* cannot be reached: .* The run can be resumed"):
            fit(server, "ended", kill, retries=0)
        [saved] = (tmp_path / "ended").rglob("*.ckpt")
        server.start()
        module, trainer = fit(server, "resumed", ckpt_path=saved)
        assert trainer.global_step == 4
        assert equal(whole, weights(module))
        assert trainer.callback_metrics["train/engine/version"] == 4


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("paradigm", ["grpo", "distillation"])
def test_two_ranks_ask_for_their_own_prompts_and_one_pushes(server, folder, tmp_path, paradigm):
    ends = []
    for name, url in (("process", []), ("server", [server.url])):
        command = [sys.executable, "-m", "tests.rollouts.two_ranks", paradigm, folder, str(tmp_path / name), *url]
        done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-4000:]
        ends += [torch.load(tmp_path / f"{name}.{rank}", weights_only=True) for rank in (0, 1)]
    assert all(equal(ends[0], end) for end in ends)
    assert len(server.asked("/collective_rpc")) == 2
    samples = {"grpo": 4 * (2 + 3 + 4 + 5), "distillation": 0 + 2 + 2 + 4}[paradigm]
    assert len(server.asked(GENERATE)) == 2 + samples
