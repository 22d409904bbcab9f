import pytest
import torch

from alignment_modules.rollouts import SamplingParameters, sample
from alignment_modules.rollouts.filters import truncate_support

PATHS = ["recompute", "cached", "fast"]
LEFT = torch.tensor([[0, 0, 0, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]])
RIGHT = LEFT.flip(1)
BOTH = torch.tensor([[0, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 1, 0, 0]])
STOPS = (3, 7, 11, 20, 33)


def prompts(mask, vocabulary=40):
    """The same three prompts laid out under a mask."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.full(mask.shape, 1)
    ids[mask.bool()] = torch.randint(vocabulary, (int(mask.sum()),), generator=generator)
    return ids


@pytest.mark.parametrize("mask", [LEFT, RIGHT, BOTH], ids=["left", "right", "both"])
@pytest.mark.parametrize("path", PATHS)
def test_log_probabilities_equal_rescored_ones(make_policy, force, rescore, path, mask):
    force(path)
    policy, ids = make_policy(), prompts(mask)
    parameters = SamplingParameters(9, temperature=0.7, stop_token_ids=STOPS)
    got = sample(policy, ids, mask, parameters=parameters, num_samples=5, seed=3)
    lengths = got.mask.sum(1)
    assert lengths.unique().numel() >= 4  # rows left the batch at different steps
    assert got.truncated.any()
    assert not got.truncated.all()
    torch.testing.assert_close(
        got.token_logps.double(), rescore(policy, ids, mask, got, 0.7), atol=1e-4, rtol=0, msg=lambda m: f"{path}: {m}"
    )
    stops = torch.isin(got.ids, torch.tensor(STOPS)) & got.mask
    assert torch.equal(stops.any(1), ~got.truncated)
    last = got.ids.gather(1, lengths[:, None] - 1).squeeze(1)
    assert torch.equal(torch.isin(last, torch.tensor(STOPS)), ~got.truncated)
    assert (stops.sum(1) <= 1).all()
    assert (lengths[got.truncated] == 9).all()
    assert torch.equal(got.mask, torch.arange(got.ids.shape[1]) < lengths[:, None])
    assert (got.ids[~got.mask] == 0).all()
    assert (got.token_logps[~got.mask] == 0).all()
    assert got.token_logps.dtype == torch.float32


def test_a_hole_in_a_prompt_is_refused_by_name(make_policy):
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 1, 0, 0]])
    with pytest.raises(ValueError, match=r"^prompt_mask has a hole: it is 0 at row 1, column 1, between tokens"):
        sample(make_policy(), prompts(mask), mask, parameters=SamplingParameters(4))


def test_all_paths_and_layouts_give_the_same_tokens(make_policy, force):
    policy = make_policy().double()
    parameters = SamplingParameters(8, temperature=1.3, top_k=20, top_p=0.9, stop_token_ids=STOPS)
    results = []
    for path in PATHS:
        force(path)
        for mask in (LEFT, RIGHT):
            results.append(sample(policy, prompts(mask), mask, parameters=parameters, num_samples=6, seed=1, step=4))
    for other in results[1:]:
        assert torch.equal(other.ids, results[0].ids)
        assert torch.equal(other.truncated, results[0].truncated)
        torch.testing.assert_close(other.token_logps, results[0].token_logps, atol=1e-5, rtol=0)


@pytest.mark.parametrize("path", PATHS)
def test_a_rollout_replays_alone(make_policy, force, path):
    force(path)
    policy, ids = make_policy().double(), prompts(LEFT)
    parameters = SamplingParameters(8, stop_token_ids=STOPS)
    batch = sample(policy, ids, LEFT, parameters=parameters, num_samples=4, seed=9, step=2, prompt_indices=[17, 4, 30])
    for row, index in enumerate((17, 4, 30)):
        one = (ids[row : row + 1], LEFT[row : row + 1])
        alone = sample(policy, *one, parameters=parameters, num_samples=2, seed=9, step=2, prompt_indices=[index])
        for g in range(2):
            tokens = batch.ids[row * 4 + g][batch.mask[row * 4 + g]]
            assert torch.equal(alone.ids[g][alone.mask[g]], tokens)
    other = sample(policy, ids, LEFT, parameters=parameters, num_samples=4, seed=9, step=3, prompt_indices=[17, 4, 30])
    assert not torch.equal(other.ids[:, :3], batch.ids[:, :3])


@pytest.mark.parametrize("path", PATHS)
def test_greedy_equals_generate(make_policy, force, path):
    force(path)
    policy, ids = make_policy(), prompts(LEFT)
    wanted = policy.generate(
        input_ids=ids, attention_mask=LEFT, do_sample=False, max_new_tokens=12, eos_token_id=list(STOPS), pad_token_id=0
    )[:, ids.shape[1] :]
    got = sample(policy, ids, LEFT, parameters=SamplingParameters(12, temperature=0, greedy=True, stop_token_ids=STOPS))
    assert torch.equal(got.ids, wanted)


@pytest.mark.parametrize("path", PATHS)
def test_everything_stops_at_once(make_policy, force, path):
    force(path)
    policy, ids = make_policy(), prompts(LEFT)
    parameters = SamplingParameters(6, stop_token_ids=tuple(range(40)))
    got = sample(policy, ids, LEFT, parameters=parameters, num_samples=3)
    assert got.ids.shape == (9, 1)
    assert got.mask.all()
    assert not got.truncated.any()


@pytest.mark.parametrize("path", PATHS)
def test_one_token_completions_are_truncated_without_a_stop(make_policy, force, path):
    force(path)
    got = sample(make_policy(), prompts(LEFT), LEFT, parameters=SamplingParameters(1), num_samples=2)
    assert got.ids.shape == (6, 1)
    assert got.truncated.all()


def test_first_tokens_follow_the_policy(make_policy):
    policy, ids, mask = make_policy(), prompts(LEFT)[:1], LEFT[:1]
    parameters = SamplingParameters(1, temperature=1.5)
    got = sample(policy, ids, mask, parameters=parameters, num_samples=4000, seed=2).ids[:, 0]
    with torch.no_grad():
        logits = policy(ids[:, 3:]).logits[0, -1]
    expected = torch.softmax(logits / 1.5, -1) * 4000
    counts = torch.bincount(got, minlength=40)
    common = expected > 5
    statistic = ((counts - expected) ** 2 / expected)[common].sum()
    freedom = int(common.sum())
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5


FILTERS = [{"top_k": 2}, {"top_p": 0.8}, {"min_p": 0.1}, {"top_k": 12, "top_p": 0.95, "min_p": 0.02}, {"top_p": 0.9999}]


@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("path", PATHS)
def test_what_the_filters_kept_is_told_and_sampled_from(make_policy, force, path, filters):
    """Against a plain forward a row: the sets are those of the filters, the probabilities those over the sets."""
    force(path)
    policy, ids = make_policy().double(), prompts(LEFT)
    parameters = SamplingParameters(9, temperature=1.4, stop_token_ids=STOPS, **filters)
    got = sample(policy, ids, LEFT, parameters=parameters, num_samples=5, seed=3)
    lengths = got.mask.sum(1).tolist()
    assert len(set(lengths)) >= 3  # rows left the batch at different steps
    kept = ~got.support.take(torch.arange(got.ids.numel())).excluded(slice(0, got.ids.numel()), 40)
    kept = kept.view(*got.ids.shape, 40)
    assert kept[~got.mask].all()
    assert got.support.sizes[~got.mask].eq(0).all()
    for row, length in enumerate(lengths):
        prompt = ids[row // 5][LEFT[row // 5].bool()]
        with torch.no_grad():
            logits = policy(torch.cat((prompt, got.ids[row, :length]))[None]).logits[0, len(prompt) - 1 : -1]
        wanted = truncate_support(torch.softmax(logits / 1.4, -1), **filters)
        assert torch.equal(kept[row, :length], wanted > 0)
        own = (wanted / wanted.sum(-1, keepdim=True)).gather(1, got.ids[row, :length, None]).log()[:, 0]
        torch.testing.assert_close(got.token_logps[row, :length].double(), own, atol=1e-5, rtol=0)


def test_nothing_is_told_where_all_is_kept(make_policy):
    for parameters in (SamplingParameters(4), SamplingParameters(4, greedy=True, top_p=0.5)):
        assert sample(make_policy(), prompts(LEFT), LEFT, parameters=parameters).support is None
    got = sample(make_policy(), prompts(LEFT), LEFT, parameters=SamplingParameters(4, top_k=40))
    whole = sample(make_policy(), prompts(LEFT), LEFT, parameters=SamplingParameters(4))
    assert not got.support.sizes.any()
    torch.testing.assert_close(got.token_logps, whole.token_logps, atol=1e-6, rtol=0)


class Characters:
    def decode(self, ids, skip_special_tokens=False):
        return "".join(chr(97 + token) for token in ids)


def test_stop_strings_end_with_the_token_that_completes_them(bigram, rescore):
    ids, mask = torch.tensor([[0, 1], [2, 3]]), torch.ones(2, 2)
    parameters = SamplingParameters(40, stop_strings=("ab", "f"), stop_token_ids=(4,))
    got = sample(bigram, ids, mask, parameters=parameters, num_samples=12, tokenizer=Characters())
    texts = [Characters().decode(row[kept].tolist()) for row, kept in zip(got.ids, got.mask, strict=True)]
    assert {text[-1] for text in texts} >= {"b", "f", "e"}
    for text, truncated in zip(texts, got.truncated.tolist(), strict=True):
        ends = text.endswith(("ab", "f", "e"))
        assert ends != truncated
        assert not any(stop in text[:-1] for stop in ("ab", "f", "e"))
    torch.testing.assert_close(got.token_logps.double(), rescore(bigram, ids, mask, got), atol=1e-5, rtol=0)


def test_a_plain_module_is_a_policy(bigram, rescore):
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])
    ids = prompts(mask, 12)
    got = sample(bigram, ids, mask, parameters=SamplingParameters(7, 2.0, stop_token_ids=(5,)), num_samples=4)
    torch.testing.assert_close(got.token_logps.double(), rescore(bigram, ids, mask, got, 2.0), atol=1e-5, rtol=0)


def test_no_gradient_is_recorded_and_modes_stay(make_policy):
    policy = make_policy().train()
    policy.model.layers[0].eval()
    before = [module.training for module in policy.modules()]
    got = sample(policy, prompts(LEFT), LEFT, parameters=SamplingParameters(3))
    assert not got.token_logps.requires_grad
    assert [module.training for module in policy.modules()] == before
    assert all(parameter.grad is None for parameter in policy.parameters())


def test_weights_are_read_from_the_live_policy(make_policy, rescore):
    policy, ids = make_policy(), prompts(LEFT)
    sample(policy, ids, LEFT, parameters=SamplingParameters(2))
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(0.8)
    got = sample(policy, ids, LEFT, parameters=SamplingParameters(4), num_samples=2)
    torch.testing.assert_close(got.token_logps.double(), rescore(policy, ids, LEFT, got), atol=1e-4, rtol=0)


def test_sampling_leaves_the_global_generator_alone(make_policy):
    policy = make_policy()
    torch.manual_seed(4)
    wanted = torch.rand(3)
    torch.manual_seed(4)
    sample(policy, prompts(LEFT), LEFT, parameters=SamplingParameters(2))
    assert torch.equal(torch.rand(3), wanted)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_completion_length": 0}, "max_completion_length=0 must be an integer from 1"),
        ({"temperature": 0.0}, "temperature=0.0 must be > 0 unless greedy=True"),
        ({"temperature": float("nan")}, "temperature=nan must be a finite number of 0 or more"),
        ({"temperature": -1.0, "greedy": True}, "temperature=-1.0 must be a finite number of 0 or more"),
        ({"top_p": 0.0}, r"top_p=0.0 must be a finite number in \(0, 1\]"),
        ({"top_k": -1}, "top_k=-1 must be an integer from 0"),
        ({"min_p": 1.5}, "min_p=1.5 must be a finite number from 0 to 1"),
    ],
)
def test_parameters_outside_their_range(options, message):
    with pytest.raises(ValueError, match=message):
        SamplingParameters(**{"max_completion_length": 4, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 0}, "num_samples must be at least 1, got 0"),
        ({"prompt_indices": [1]}, "prompt_indices must name each of the 3 prompts, got 1"),
        ({"prompt_mask": LEFT * torch.tensor([[1], [0], [1]])}, r"prompt_mask leaves no token in rows \[1\]"),
        ({"prompt_mask": LEFT[:2]}, r"one shape, got \[3, 5\] and \[2, 5\]"),
        ({"seed": -3}, "seed must not be negative, got -3"),
        ({"parameters": SamplingParameters(2, stop_strings=("a",))}, "needs a tokenizer"),
        ({"parameters": SamplingParameters(2, stop_token_ids=(12,))}, r"stop_token_ids \[12\] are outside"),
    ],
)
def test_bad_arguments(bigram, options, message):
    arguments = {"prompt_ids": prompts(LEFT, 12), "prompt_mask": LEFT, "parameters": SamplingParameters(2)}
    with pytest.raises(ValueError, match=message):
        sample(bigram, **{**arguments, **options})


def test_logits_that_are_not_finite_are_reported(bigram):
    with torch.no_grad():
        bigram.table.weight[3] = torch.nan
    with pytest.raises(ValueError, match="logits that are not finite"):
        sample(bigram, torch.tensor([[3]]), torch.ones(1, 1), parameters=SamplingParameters(4), num_samples=2)
