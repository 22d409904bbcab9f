"""An actor of several turns: a tool answers between them, and the policy learns from its own tokens alone."""

import copy

import pytest
import torch

from alignment_modules import GRPOModule
from alignment_modules.rollouts.actor import Actor
from alignment_modules.rollouts.codec import prompt_indices, real_tokens
from alignment_modules.rollouts.prompts import Prompts
from alignment_modules.rollouts.seeds import Seeds
from tests.batches import Digits


class Calculator(Actor):
    """Answers two of three completions by the count of their tokens, once."""

    def complete(self, policy, batch, step, *, draw=0, greedy=False):
        self.engine.push(policy)
        session = self.engine.open(
            Prompts.from_padded(batch["prompts"], batch["prompt_attention_mask"]),
            self.sampling.parameters(greedy=greedy, stop_token_ids=self.codec.stop_token_ids),
            num_samples=1 if greedy else self.num_generations,
            seeds=Seeds(prompt_indices(batch), self.seed, step, draw),
        )
        lengths = [len(row) for row in real_tokens(session.turn.ids, session.turn.mask)]
        asking = [row for row in range(len(lengths)) if row % 3]
        self.engine.extend(session, asking, [[30 + lengths[row], 39] for row in asking])
        return self.engine.close(session)


@pytest.fixture
def module(tiny_llama):
    policy = copy.deepcopy(tiny_llama).double()  # float32 rounds the unlikely tokens beyond the bar
    with torch.no_grad():
        policy.model.embed_tokens.weight[7] *= 4.0
    made = GRPOModule(
        policy=policy,
        rewards=lambda completions: [float(text.count("3")) for text in completions],
        num_generations=4,
        max_completion_length=4,
        num_iterations=2,
        beta=0.1,
        tokenizer=Digits(),
        optimizer=lambda groups: torch.optim.SGD(groups, lr=0.1),
    )
    actor = made.actor
    options = {"codec": actor.codec, "seed": actor.seed}
    made.actor = Calculator(actor.engine, actor.rewards, actor.sampling, actor.num_generations, **options)
    return made


def test_an_episode_of_two_turns_is_learnt_from(module, train):
    ids = torch.randint(8, 30, (4, 3), generator=torch.Generator().manual_seed(4))
    batch = {"prompts": ids, "prompt_attention_mask": torch.ones_like(ids), "index": list(range(4))}
    trainer = train(module, [batch])
    rollout, metrics = module.rollout, trainer.callback_metrics
    asked = (rollout.mask & ~rollout.own).sum(dim=1)
    assert trainer.global_step == 2
    assert asked.tolist() == [2 * bool(row % 3) for row in range(16)]
    assert metrics["train/sampling/sampling_logp_difference/max"] < 1e-5
    assert torch.equal(rollout.trained, rollout.own)
    for row in asked.nonzero().flatten().tolist():
        tokens = rollout.ids[row][rollout.mask[row] & ~rollout.own[row]].tolist()
        assert tokens == [30 + int((~rollout.own[row]).nonzero()[0]), 39]
    assert " 39 " in module.last_rollout["completion"][1]
    assert metrics["train/kl"].isfinite()
    assert metrics["train/grad_norm"] > 0
