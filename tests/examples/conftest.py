"""The lessons are scripts that lie beside each other and import each other, as they do where they are run."""

import importlib
from pathlib import Path

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def lesson(monkeypatch):
    """Imports a lesson by its name."""
    monkeypatch.syspath_prepend(str(EXAMPLES / "tutorial"))
    return importlib.import_module


@pytest.fixture
def printed(lesson, capsys):
    """Runs a lesson's main: what a reader sees."""

    def run(name):
        lesson(name).main()
        return capsys.readouterr().out

    return run


@pytest.fixture
def rollout():
    """Completions and rewards, and what makes a module's batch of them and their old log-probabilities."""
    random = torch.Generator().manual_seed(0)
    lengths = [6, 1, 3, 4, 2, 6, 5, 1, 3, 2, 6, 4]
    prompts = [torch.randint(1, 24, (size,), generator=random).tolist() for size in (1, 3, 2)]
    rows = [
        (prompts[number // 4], torch.randint(0, 24, (length,), generator=random).tolist())
        for number, length in enumerate(lengths)
    ]
    rewards = torch.rand(len(rows), generator=random)
    rewards[4:8] = 0.3  # a group without signal

    def batch(old_log_probs, own):
        old = [row[mask] for row, mask in zip(old_log_probs.detach(), own, strict=True)]
        return {
            "prompts": pad_sequence(list(map(torch.tensor, prompts)), batch_first=True),
            "prompt_attention_mask": pad_sequence([torch.ones(len(p)).long() for p in prompts], batch_first=True),
            "responses": pad_sequence([torch.tensor(completion) for _, completion in rows], batch_first=True),
            "response_mask": pad_sequence([torch.ones(length).bool() for length in lengths], batch_first=True),
            "rewards": rewards,
            "old_logprobs": pad_sequence(old, batch_first=True),
        }

    return rows, rewards, batch
