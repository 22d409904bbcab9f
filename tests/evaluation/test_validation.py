"""Validation that writes: completions of validation prompts, judged as `test` judges them, beside the loss."""

import json

import lightning as L
import pytest
import torch

from alignment_modules import DPOModule, EvaluationConfig, RewardModule, SFTModule
from alignment_modules.callbacks import CompletionWriter
from datamodules import PreferenceDataModule, SFTDataModule

SUMS = [(a, b) for a in range(4) for b in range(3)]
DEMONSTRATIONS = [{"prompt": f"{a}+{b}=", "completion": f"{a + b}", "answer": f"{a + b}"} for a, b in SUMS]
QUESTIONS = [{"prompt": f"{a}+{b}=", "answer": f"{a + b}"} for a, b in SUMS]
PAIRS = [{"prompt": f"{a}+{b}=", "chosen": f"{a + b}", "rejected": f"{a + b + 1}"} for a, b in SUMS]


def first_half_is_right(completions, prompts):
    """Judges by the question, so that an untrained policy gets some right."""
    return [float(prompt[0] in "01") for prompt in prompts]


def module(model_folder, cls=SFTModule, **options):
    torch.manual_seed(0)
    options = {"verifier": first_half_is_right, "max_completion_length": 3, **options}
    return cls(policy=model_folder, tokenizer=model_folder, evaluation=EvaluationConfig(**options))


def trainer(**options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    return L.Trainer(**{"accelerator": "cpu", "max_steps": 1, "enable_model_summary": False, **quiet, **options})


def validated(model, data):
    return trainer().validate(model, datamodule=data, verbose=False)


def metrics(found):
    return {name: value for loader in found for name, value in loader.items()}


@pytest.mark.parametrize("batch_size", [2, 5])
def test_beside_the_loss_as_a_test_would_measure_it(model_folder, batch_size):
    data = SFTDataModule(
        train=DEMONSTRATIONS, validation=DEMONSTRATIONS, test=DEMONSTRATIONS, tokenizer=model_folder,
        batch_size=batch_size,
    )  # fmt: skip
    found = metrics(validated(module(model_folder, num_samples=2), data))
    tested = trainer().test(module(model_folder, num_samples=2), datamodule=data, verbose=False)[0]
    assert {"val/loss", "val/mean_token_accuracy"} <= found.keys()
    assert found["val/exact_match"] == 0.5
    for name in ("exact_match", "reward", "pass@2", "sample_accuracy", "completions/mean_length"):
        assert found[f"val/{name}"] == tested[f"test/{name}"]


def test_of_a_capped_number_of_prompts(model_folder):
    options = {"train": DEMONSTRATIONS, "validation": DEMONSTRATIONS, "tokenizer": model_folder, "batch_size": 4}
    for most, share in ((3, 1.0), (8, 0.75)):
        found = metrics(validated(module(model_folder), SFTDataModule(**options, validation_prompts=most)))
        assert found["val/exact_match"] == share  # the first six of twelve are right
    found = metrics(validated(module(model_folder), SFTDataModule(**options, validation_prompts=0)))
    assert "val/exact_match" not in found
    assert "val/loss" in found


def test_rows_with_a_prompt_alone(model_folder):
    for cls, data, train in ((SFTModule, SFTDataModule, DEMONSTRATIONS), (DPOModule, PreferenceDataModule, PAIRS)):
        made = data(train=train, validation=QUESTIONS, tokenizer=model_folder, validation_prompts=9)
        [found] = validated(module(model_folder, cls), made)
        assert found["val/exact_match"] == pytest.approx(6 / 9)
        assert "val/loss" not in found
        made = data(train=train, validation=QUESTIONS, tokenizer=model_folder, validation_prompts=0)
        with pytest.raises(ValueError, match=r"validation: .* has the columns \['answer', 'prompt'\]"):
            validated(module(model_folder, cls), made)


def test_nothing_is_written_where_nothing_can_judge(model_folder, capsys):
    """The default verifier asks for an `answer`: rows with other columns have a loss alone, and that is said once."""
    rows = [{"prompt": row["prompt"], "completion": row["completion"], "source": "sums"} for row in DEMONSTRATIONS]
    data = SFTDataModule(train=rows, validation=rows, tokenizer=model_folder, batch_size=4)
    found = metrics(validated(module(model_folder, verifier=None), data))
    assert set(found) & {"val/loss", "val/exact_match", "val/reward"} == {"val/loss"}


def test_rows_without_a_column_to_judge_by_are_said_once(model_folder, caplog):
    rows = [{"prompt": row["prompt"], "completion": row["completion"]} for row in DEMONSTRATIONS]
    data = SFTDataModule(train=rows, validation=rows, tokenizer=model_folder, batch_size=4)
    with caplog.at_level("INFO"):
        validated(module(model_folder), data)
    assert caplog.text.count("no completions of validation rows are judged: no column beside the prompt") == 1


def test_modules_that_write_nothing_get_the_rows_alone(model_folder):
    rows = [{**row, "answer": row["chosen"]} for row in PAIRS]
    data = PreferenceDataModule(train=rows, validation=rows, tokenizer=model_folder, batch_size=4)
    model = RewardModule(policy=model_folder, tokenizer=model_folder)
    [found] = validated(model, data)
    assert "val/rewards/accuracies" in found

    class Foreign(L.LightningModule):
        def validation_step(self, batch, batch_idx):  # no second loader, so no third argument
            assert "chosen_input_ids" in batch

    data = PreferenceDataModule(train=rows, validation=rows, tokenizer=model_folder, batch_size=4)
    assert len(validated(Foreign(), data)) == 1


def test_a_test_writes_its_completions_and_can_tell_the_loss(model_folder, tmp_path):
    rows = DEMONSTRATIONS[:7]
    data = SFTDataModule(
        train=rows, test=rows, validation=rows, tokenizer=model_folder, batch_size=3, test_targets=True
    )
    model = module(model_folder, num_samples=2)
    run = trainer(default_root_dir=tmp_path, callbacks=[CompletionWriter()])
    found = metrics(run.test(model, datamodule=data, verbose=False))
    loss = metrics(validated(module(model_folder), data))["val/loss"]
    assert found["test/loss"] == pytest.approx(loss, rel=1e-6)
    written = [json.loads(line) for line in (tmp_path / "test.jsonl").read_text().splitlines()]
    assert [row["index"] for row in written] == list(range(7))
    assert all(row["prompt"] == given["prompt"] for row, given in zip(written, rows, strict=True))
    assert [row["reward"] for row in written] == [1.0] * 6 + [0.0]
    assert all(len(row["completions"]) == len(row["rewards"]) == 2 for row in written)
    assert found["test/exact_match"] == pytest.approx(6 / 7)


def test_a_test_without_targets_is_refused_where_they_are_asked_for(model_folder):
    data = SFTDataModule(train=DEMONSTRATIONS, test=QUESTIONS, tokenizer=model_folder, test_targets=True)
    with pytest.raises(ValueError, match=r"test_targets=True, but .* has no targets"):
        trainer().test(module(model_folder), datamodule=data, verbose=False)


def test_no_file_of_a_test_where_it_is_switched_off(model_folder, tmp_path):
    data = SFTDataModule(train=QUESTIONS, test=QUESTIONS, tokenizer=model_folder)
    run = trainer(default_root_dir=tmp_path, callbacks=[CompletionWriter(test=False)])
    run.test(module(model_folder), datamodule=data, verbose=False)
    assert list(tmp_path.iterdir()) == []
