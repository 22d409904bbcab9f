"""Rows with sources, for every paradigm: weights of their loss, and what is logged of each source by itself."""

import pytest
import torch

from tests.paradigms import ROWS, WEIGHTLESS, expensive
from tests.row import Paradigm

ALL = tuple(range(8))
UNCOUPLED = {  # what makes the loss of a row one that other rows have no part in
    "kto": {"loss": "apo_zero_unpaired"},
    "ppo": {"whiten_advantages": False},
}
FURTHER = (
    ("sft", {"loss": "dft", "label_smoothing": 0.1}),
    ("orpo", {"nll_unit": "tokens", "max_grad_norm": None}),
    ("dpo", {"loss": ["sigmoid", "sft"], "nll_coef": 0.3}),
    ("grpo", {"loss": "grpo"}),
    ("grpo", {"loss": "dr_grpo"}),
    ("grpo", {"reduction": "prompt_mean"}),
    ("grpo", {"loss": "grpo", "importance_level": "sequence", "beta": 0.0, "reference": None}),
    ("grpo", {"entropy_coef": 0.05, "num_iterations": 2}),
    ("ppo", {"critic": "shared", "critic_optimizer": None, "positive_nll_coef": 0.3, "loss": "grpo"}),
)
EVERY = [(name, {}) for name in ROWS]
SHORT = ("sft", "dpo", "grpo")


def cases(fast):
    """Every paradigm and more; slow but for some."""
    more = [pytest.param(*case, marks=() if fast(case) else pytest.mark.slow) for case in (*EVERY, *FURTHER)]
    return pytest.mark.parametrize(("name", "options"), more, ids=lambda value: str(value)[:40])


def options_of(name, options):
    return UNCOUPLED.get(name, {}) | options


def sourced(row: Paradigm, weights=None, names=None, batch=None):
    """Batches whose rows, by number, have a source and a weight."""

    def make(rows, *layout):
        found = (batch or row.batch)(rows, *layout)
        found |= {"source_name": [names[number] for number in rows]} if names else {}
        return found | ({"source_weights": torch.tensor([float(weights[r]) for r in rows])} if weights else {})

    return make


@cases(lambda case: True)
def test_a_weight_of_two_is_the_row_twice_and_one_of_none_no_row(make, update, assert_same, name, options):
    row, options = ROWS[name], options_of(name, options)
    weights = dict(zip(ALL, (1, 2, 0, 3, 1, 1, 0, 2), strict=True))
    times = [number for number in ALL for _ in range(weights[number])]
    given = sourced(row, weights)(ALL)
    assert_same(update(make(name, **options), [row.batch(times)]), update(make(name, **options), [given]))


@cases(lambda case: case in EVERY and case[0] in SHORT)
def test_only_the_ratios_of_weights_count(make, update, assert_same, name, options):
    row, options = ROWS[name], options_of(name, options)
    whole = update(make(name, **options), [row.batch(ALL)])
    for weight in (0.25, 1.0):
        assert_same(whole, update(make(name, **options), [sourced(row, dict.fromkeys(ALL, weight))(ALL)]))


@cases(lambda case: case in EVERY and case[0] in SHORT)
def test_no_cut_of_a_step_changes_a_weighted_mean(make, update, cut_update, assert_same, name, options):
    row, options = ROWS[name], options_of(name, options)
    batch = sourced(row, dict(zip(ALL, (0.5, 2, 0, 3, 0.1, 1, 0.7, 2), strict=True)))
    whole = update(make(name, **options), [batch(ALL)])
    for sizes in row.sizes[:3]:
        assert_same(whole, cut_update(name, batch, sizes, **options))


@pytest.mark.parametrize("name", ["sft", "distillation"])
def test_weights_of_rows_and_of_tokens_are_multiplied(make, update, assert_same, name):
    row, weights = ROWS[name], dict(zip(ALL, (1, 2, 0, 3, 1, 1, 0, 2), strict=True))
    weighted = row.batches["weighted"]
    times = [number for number in ALL for _ in range(weights[number])]
    given = sourced(row, weights, batch=weighted)(ALL)
    assert_same(update(make(name), [weighted(times)]), update(make(name), [given]))
    nothing = given | {"source_weights": torch.ones(8)}
    WEIGHTLESS["weights"](nothing, 7)
    assert_same(update(make(name), [weighted(ALL[:7])]), update(make(name), [nothing]))


@cases(lambda case: case in EVERY and case[0] in ("sft", "reward", "kto", "online_dpo"))
def test_each_source_is_logged_as_it_would_be_alone(make, train, name, options):
    row, options = ROWS[name], options_of(name, options) | {"optimizer": lambda g: torch.optim.SGD(g, lr=0.0)}
    names = dict(zip(ALL, ("math", "code", "math", "code", "code", "math", "chat", "math"), strict=True))
    batch = sourced(row, dict(zip(ALL, (1, 2, 1, 2, 2, 1, 0, 1), strict=True)), names)
    size = {} if row.kind == "automatic" and options.get("nll_unit") != "tokens" else {"micro_batch_size": 4}
    metrics = train(make(name, **options, **size)(), [batch(ALL)]).callback_metrics
    found = {key for key in metrics if key.split("/")[1] in names.values()}
    assert {f"train/{source}/loss" for source in ("math", "code", "chat")} <= found
    for source in ("math", "code", "chat"):
        alone = train(make(name, **options, **size)(), [row.batch([r for r in ALL if names[r] == source])])
        for key in found:
            if key.startswith(f"train/{source}/"):
                wanted = alone.callback_metrics[key.replace(f"{source}/", "")]
                assert float(metrics[key]) == pytest.approx(float(wanted), rel=1e-5, abs=1e-6), key


@pytest.mark.parametrize("name", expensive())
def test_what_is_logged_of_all_rows_stays_but_for_the_weighted_loss(make, train, name):
    row = ROWS[name]
    names = dict(zip(ALL, ("math", "code") * 4, strict=True))
    weights = dict(zip(ALL, (1.0, 2.0) * 4, strict=True))
    still = {"optimizer": lambda groups: torch.optim.SGD(groups, lr=0.0)}
    plain, sources, both = (
        train(make(name, **still)(), [batch(ALL)]).callback_metrics
        for batch in (row.batch, sourced(row, None, names), sourced(row, weights, names))
    )
    same = [key for key in plain if "time/" not in key]
    assert {key: float(sources[key]) for key in same} == {key: float(plain[key]) for key in same}
    losses = {"train/loss", "train/critic/loss", "train/grad_norm", "train/critic/grad_norm"}
    unweighted = [key for key in same if key not in losses]
    assert {key: float(both[key]) for key in unweighted} == {key: float(plain[key]) for key in unweighted}
    assert float(both["train/loss"]) != float(plain["train/loss"])


@pytest.mark.parametrize("name", ["sft", "dpo", "kto"])
def test_validation_of_several_loaders_is_one_of_all_and_one_of_each_source(make, name):
    import lightning as L

    row, names = ROWS[name], dict(zip(ALL, ("math",) * 3 + ("code",) * 5, strict=True))
    batch = sourced(row, None, names)
    options = {"enable_progress_bar": False, "logger": False, "accelerator": "cpu", "enable_model_summary": False}
    loaders = [[batch(ALL[:2]), batch(ALL[2:3])], [batch(ALL[3:])]]
    trainer = L.Trainer(**options)
    parts = trainer.validate(make(name)(), [torch.utils.data.DataLoader(own, batch_size=None) for own in loaders])
    metrics = parts[0] | parts[1]
    [whole] = trainer.validate(make(name)(), torch.utils.data.DataLoader([row.batch(ALL)], batch_size=None))
    assert not any("dataloader_idx" in key for key in metrics)
    if name != "kto":  # whose estimate is each batch's
        assert {key: metrics[key] for key in whole} == pytest.approx(whole, abs=1e-5)
    for source, rows in (("math", ALL[:3]), ("code", ALL[3:])):
        [alone] = trainer.validate(make(name)(), torch.utils.data.DataLoader([row.batch(rows)], batch_size=None))
        if name != "kto":
            assert metrics[f"val/{source}/loss"] == pytest.approx(alone["val/loss"], abs=1e-5)
    assert {"val/math/loss", "val/code/loss", "val/loss"} <= metrics.keys()
