"""What a checkpoint keeps of a constructor's arguments makes the module again."""

import copy

import torch

from alignment_modules import DPOModule, PolicyConfig, SFTModule
from alignment_modules.evaluation import EvaluationConfig


class Narrow(DPOModule):
    """Fixes a keyword of its base, takes one by position and keeps an object."""

    def __init__(self, gamma, *, callback=None, **common):
        super().__init__(beta=gamma / 2, **common)
        self.gamma, self.callback = gamma, callback


def pairs():
    batch = {"prompt_input_ids": torch.tensor([[1, 2]])}
    batch |= {f"{side}_input_ids": torch.tensor([[3, 4]]) for side in ("chosen", "rejected")}
    return batch | {key.replace("input_ids", "attention_mask"): torch.ones(1, 2, dtype=torch.long) for key in batch}


def test_a_subclass_that_fixes_a_keyword_is_loaded_again(train, tiny_llama_config, tmp_path):
    policy = PolicyConfig(config=tiny_llama_config)
    module = Narrow(0.5, callback=print, policy=policy, evaluation=EvaluationConfig(num_samples=2))
    train(module, [pairs()]).save_checkpoint(tmp_path / "one.ckpt")
    held = torch.load(tmp_path / "one.ckpt", weights_only=True)["hyper_parameters"]
    expected = {"gamma": 0.5, "policy": {"config": tiny_llama_config}, "evaluation": {"num_samples": 2}}
    assert held == expected  # what was given, but for objects
    loaded = Narrow.load_from_checkpoint(tmp_path / "one.ckpt", weights_only=True, policy=policy)
    assert (loaded.gamma, loaded.beta, loaded.evaluation.num_samples) == (0.5, 0.25, 2)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in module.state_dict().items())


def test_a_copied_module_keeps_them(tiny_llama):
    module = SFTModule(policy=tiny_llama, z_loss=0.5)
    assert dict(copy.deepcopy(module).hparams) == dict(module.hparams) == {"z_loss": 0.5}
