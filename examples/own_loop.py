"""GRPO on a loop of your own: the policy plays a game of several turns, of which the library knows nothing."""

import lightning as L
import torch
from torch.utils.data import DataLoader, Dataset

from alignment_modules import GRPOModule, PolicyConfig
from alignment_modules.rollouts import Prompts, SamplingParameters, Seeds

HIGHEST, TURNS, SAMPLES, STEPS = 7, 3, 32, 100  # three guesses find one of seven numbers, if they halve what is left
HIGHER, LOWER, START = range(HIGHEST + 1, HIGHEST + 4)  # tokens; the smaller ones are the numbers
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = {"model_type": "llama", "vocab_size": START + 1, "num_key_value_heads": 4, **SIZES}


class Games(Dataset):
    """Entry `step` is played when a DataLoader without workers asks for it: by the policy as it is at that step."""

    def __init__(self, module: GRPOModule) -> None:
        self.policy, self.engine = module.policy, module.engine

    def __len__(self) -> int:
        return STEPS

    def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
        hidden = [number for number in range(1, HIGHEST + 1) for _ in range(SAMPLES)]  # a group has one number
        rows, won = list(range(len(hidden))), torch.zeros(len(hidden))
        prompts, seeds = Prompts.from_rows([[START]] * HIGHEST, torch.device("cpu")), Seeds(range(HIGHEST), step=step)
        self.engine.push(self.policy)
        session = self.engine.open(prompts, SamplingParameters(1), num_samples=SAMPLES, seeds=seeds)  # one token
        for turn in range(TURNS):
            guesses = dict(zip(rows, session.turn.ids[:, 0].tolist(), strict=True))
            won[[row for row in rows if guesses[row] == hidden[row]]] = 1.0
            rows = [row for row in rows if guesses[row] != hidden[row]]
            if not rows or turn == TURNS - 1:
                break
            self.engine.extend(session, rows, [[HIGHER if guesses[row] < hidden[row] else LOWER] for row in rows])
        games = self.engine.close(session)
        masks = {"response_mask": games.mask.long(), "response_loss_mask": games.own.long()}  # exists; policy wrote it
        batch = {"prompts": prompts.ids, "prompt_attention_mask": prompts.mask.long(), "responses": games.ids, **masks}
        return batch | {"old_logprobs": games.token_logps, "rewards": won}


def main() -> None:
    """Prints how many games are won before and after training."""
    L.seed_everything(0)
    module = GRPOModule(
        policy=PolicyConfig(config=LLAMA),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=5e-3),
        rewards=lambda completions: [None] * len(completions),  # none is judged: the games bring their rewards
    )
    games = Games(module)
    before = games[0]["rewards"].mean()
    trainer = L.Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, log_every_n_steps=10)
    trainer.fit(module, DataLoader(games, batch_size=None))
    print(f"games won: {before:.0%}, after training {games[STEPS]['rewards'].mean():.0%}")


if __name__ == "__main__":
    main()
