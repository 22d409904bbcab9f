"""Presets fill in what is not given, from Python and from configurations, and say so."""

import copy

import pytest
import yaml

from alignment_modules import GRPOModule
from alignment_modules.training.presets import PRESETS, Settings
from tests.batches import never_called
from tests.configs.conftest import align  # noqa: F401  # the command line in this process
from tests.configs.test_configs import printed


@pytest.fixture
def make(tiny_llama):
    def factory(**options):
        return GRPOModule(**({"policy": copy.deepcopy(tiny_llama), "rewards": [never_called] * 2} | options))

    return factory


def resolved(module):
    """What a module does, by the options of the presets."""
    surrogate, estimator = module.surrogate, module.estimator
    return {
        "loss": surrogate.loss,
        "epsilon": surrogate.epsilon,
        "epsilon_high": surrogate.epsilon_high,
        "importance_level": surrogate.importance_level,
        "reduction": surrogate.reduction,
        "scale_rewards": estimator.scale_rewards,
        "baseline": estimator.baseline,
        "multi_objective_aggregation": estimator.multi_objective_aggregation,
        "beta": module.beta,
        "kl_estimator": module.kl_estimator,
        "kl_placement": module.kl_placement,
    }


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_sets_what_it_says_and_nothing_else(make, name):
    module, plain = make(preset=name), resolved(make())
    settings = dict(PRESETS[name].settings)
    if "baseline" in settings:  # its own scale follows
        settings.setdefault("scale_rewards", "none")
    assert resolved(module) == plain | settings
    told = module.describe()["preset"]
    assert told.startswith(f"{name} ({PRESETS[name].source}): ")
    assert all(f"{option} {value!r}" in told for option, value in PRESETS[name].settings.items())
    assert "preset" not in make().describe()


@pytest.mark.parametrize("name", PRESETS)
def test_what_is_given_beside_it_takes_its_place(make, name):
    module = make(preset=name, beta=0.2, num_iterations=2)
    assert resolved(module) == resolved(make(preset=name)) | {"beta": 0.2}
    assert ("; but beta 0.2" in module.describe()["preset"]) == ("beta" in PRESETS[name].settings)


def test_an_option_that_equals_its_default_still_takes_the_presets_place(make):
    assert resolved(make(preset="dapo", epsilon_high=0.2))["epsilon_high"] == 0.2
    assert resolved(make(preset="dr_grpo", loss="dapo"))["loss"] == "dapo"
    module = make(preset="dr_grpo", scale_rewards="group", kl_placement="loss")
    assert module.estimator.scale_rewards == "group"
    assert (
        module.describe()["preset"] == "dr_grpo (arXiv:2503.20783): loss 'dr_grpo', beta 0.0; but scale_rewards 'group'"
    )
    rloo = make(preset="rloo", beta=0.0, kl_placement="loss", kl_estimator="k3")
    assert rloo.reference is None


def test_hyperparameters_make_the_same_module_again(make, tiny_llama):
    module = make(preset="gspo", epsilon=0.01)
    kept = dict(module.hparams)
    assert kept == {"preset": "gspo", "epsilon": 0.01}
    assert resolved(make(**kept)) == resolved(module)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "ppo"}, "preset must be one of 'grpo', .*, got 'ppo'"),
        (
            {"preset": "gspo", "loss": "cispo"},
            r"epsilon has no effect with loss='cispo' .* \(preset='gspo' gives .*epsilon 0.0003",
        ),
        (
            {"preset": "dr_grpo", "scale_rewards": "mean", "baseline": "greedy"},
            r"scale_rewards='mean' does not go with baseline='greedy'[^(]*$",
        ),
        (
            {"preset": "lite_ppo", "baseline": "greedy"},
            r"scale_rewards='batch' .* \(preset='lite_ppo' gives scale_rewards",
        ),
        ({"preset": "gdpo", "rewards": never_called}, "needs two or more rewards"),
        ({"preset": "dapo", "num_generations": 1}, "num_generations=1 must be at least 2"),
    ],
)
def test_refuses(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_one_completion_a_prompt_goes_with_presets_that_compare_none(make):
    for name in ("reinforce_pp", "remax"):
        assert make(preset=name, num_generations=1).fewest_completions == 1


def test_settings_keep_nothing_but_options_that_presets_set():
    assert Settings("dapo", {"policy": object(), "loss": None}).given == {"loss": None}


ARGUMENTS = ["--model=GRPOModule", "--model.policy=x", "--model.rewards=ExactMatch", "--data=PromptDataModule"]


def from_command_line(run, make, *arguments):
    """The module that the printed configuration of a command makes, by its options in `PRESETS`, and the options."""
    text = printed(run, "fit", *ARGUMENTS, "--data.train=x.jsonl", *arguments)
    given = yaml.safe_load(text)["model"]["init_args"]
    known = {"preset", *(option for preset in PRESETS.values() for option in preset.settings)}
    assert known <= given.keys()  # every default is in it, too
    return resolved(make(**{option: given[option] for option in known})), text


def test_the_command_line_overrides_a_preset_with_a_default(align, make):  # noqa: F811
    found, text = from_command_line(align, make, "--model.preset=dapo")
    assert found == resolved(make(preset="dapo"))
    again = align.folder / "printed.yaml"
    again.write_text(text)
    assert from_command_line(align, make, f"--config={again}")[0] == found
    # a later option overrides the file's, also another preset
    assert from_command_line(align, make, f"--config={again}", "--model.epsilon_high=0.2")[0] == found | {
        "epsilon_high": 0.2
    }
    other, _ = from_command_line(align, make, f"--config={again}", "--model.preset=gspo")
    assert other == resolved(make(preset="gspo"))
    found, _ = from_command_line(align, make, "--model.loss=dapo", "--model.preset=dr_grpo", "--model.beta=0.0")
    assert found == resolved(make(preset="dr_grpo", loss="dapo"))
