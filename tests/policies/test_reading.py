"""Reading: states of targets and of rows' last tokens equal those of plain forward passes; a trunk is read once."""

import pytest
import torch
from torch import nn

from alignment_modules.policies.probing import prepare
from alignment_modules.policies.reading import read
from alignment_modules.policies.scoring import score
from alignment_modules.policies.segments import Segments
from alignment_modules.policies.value_head import ValueHead

READS = ("targets", "last", "targets+last")


def runs(rows, time, side, g):
    """One run of tokens in each row, padded on one side."""
    lengths, column = torch.randint(1, time + 1, (rows, 1), generator=g), torch.arange(time)
    return column < lengths if side == "right" else column >= time - lengths


def prompts(side, samples=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    batch = {
        "prompt_ids": torch.randint(40, (3, 5), generator=g),
        "prompt_mask": runs(3, 5, side, g),
        "completion_ids": torch.randint(40, (3 * samples, 6), generator=g),
        "completion_mask": runs(3 * samples, 6, side, g),
    }
    batch["prompt_mask"][0] = False  # an empty prompt; and a row with a prompt alone, and one with nothing
    batch["completion_mask"][0] = batch["completion_mask"][-1] = False
    return batch


def labelled(side, seed=0):
    g = torch.Generator().manual_seed(seed)
    ids, mask = torch.randint(40, (4, 9), generator=g), runs(4, 9, side, g)
    mask[2] = False
    return ids, torch.where(mask, ids, -100), mask


def rows_of(batch):
    """Tokens of each row without padding."""
    samples = len(batch["completion_ids"]) // len(batch["prompt_ids"])
    for n, (ids, mask) in enumerate(zip(batch["completion_ids"], batch["completion_mask"], strict=True)):
        prompt = batch["prompt_ids"][n // samples][batch["prompt_mask"][n // samples]]
        yield torch.cat((prompt, ids[mask]))


def plain_last(states_of, rows, like):
    """State of each row's last token from a forward pass of that row alone; 0 for a row without tokens."""
    return torch.stack([states_of(row[None])[0, -1] if len(row) else torch.zeros_like(like) for row in rows])


def gradients(policy, value):
    policy.zero_grad()
    (value * torch.linspace(-1, 1, value.numel(), dtype=value.dtype).view(value.shape)).sum().backward()
    return {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


def assert_same_gradients(found, expected):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


class Plain(nn.Module):
    """A causal module without transformers that gives one number for each token."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.mixer = nn.Embedding(40, 12), nn.GRU(12, 12, batch_first=True)
        self.head = nn.Linear(12, 1)

    def forward(self, input_ids):
        return self.head(self.mixer(self.embedding(input_ids))[0])


def lora(model):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    policy = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return policy.eval()


@pytest.fixture(params=["llama", "padded", "lora", "plain"])
def policy(request, tiny_llama):
    """A policy in float64 and what it gives for plain rows: `[rows, time, ...]`."""
    tiny_llama.double()
    if request.param == "plain":
        module = Plain().double()
        return module, module
    if request.param == "padded":
        tiny_llama.set_attn_implementation("eager")
    model = lora(tiny_llama) if request.param == "lora" else tiny_llama
    backbone = tiny_llama.model
    return model, lambda ids: backbone(input_ids=ids).last_hidden_state


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("reads", ["last", "targets+last"])
def test_last_states_and_gradients_equal_plain_rows(policy, side, reads):
    module, states_of = policy
    width = 1 if isinstance(module, Plain) else 32
    ids, labels, mask = labelled(side)
    batch = prompts(side)
    cases = [
        (Segments.from_prompts(**batch, reads=reads), list(rows_of(batch))),
        (Segments.from_labels(ids, labels, mask, reads=reads), [row[own] for row, own in zip(ids, mask, strict=True)]),
    ]
    for segments, rows in cases:
        expected = plain_last(states_of, rows, torch.zeros(width, dtype=torch.float64))
        expected_gradients = gradients(module, expected)
        reading = read(module, segments)
        assert segments.has_last().tolist() == [len(row) > 0 for row in rows]
        torch.testing.assert_close(reading.last, expected, rtol=0, atol=1e-5)
        assert_same_gradients(gradients(module, reading.last), expected_gradients)


@pytest.mark.parametrize("side", ["left", "right"])
def test_asking_for_the_last_states_changes_no_score(tiny_llama, side):
    batch = prompts(side)
    alone = score(tiny_llama, Segments.from_prompts(**batch), ask=["entropy"])
    reading = read(tiny_llama, Segments.from_prompts(**batch, reads="targets+last"))
    both = score(reading, ask=["entropy"])
    torch.testing.assert_close(both.token_logps, alone.token_logps, rtol=0, atol=1e-5)
    torch.testing.assert_close(both.entropy, alone.entropy, rtol=0, atol=1e-5)
    assert torch.equal(both.mask, alone.mask)
    last = read(tiny_llama, Segments.from_prompts(**batch, reads="last"))
    assert not last.segments.mask().any()
    assert len(last.targets) == 0
    assert (score(last).token_logps == 0).all()


def test_rows_of_several_documents_end_with_the_last(tiny_llama):
    ids, positions = torch.arange(1, 9)[None], torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2]])
    segments = Segments.from_labels(ids, torch.full_like(ids, -100), position_ids=positions, reads="last")
    assert segments.token_ids.tolist() == [6, 7, 8]
    expected = tiny_llama.model(input_ids=ids[:, 5:]).last_hidden_state[:, -1]
    torch.testing.assert_close(read(tiny_llama, segments).last, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reads", READS)
def test_nothing_to_read_still_reaches_every_parameter(policy, reads):
    module, _ = policy
    batch = prompts("right")
    for name in ("prompt_mask", "completion_mask"):
        batch[name] = torch.zeros_like(batch[name])
    reading = read(module, Segments.from_prompts(**batch, reads=reads))
    value = reading.targets.sum() + (0 if reads == "targets" else reading.last.sum())
    assert value == 0
    value.backward()
    inside = [p for n, p in module.named_parameters() if p.requires_grad and "lm_head" not in n]
    assert all(p.grad is not None and (p.grad == 0).all() for p in inside)


def test_one_reading_serves_several_readers(tiny_llama):
    batch = prompts("left")
    segments = Segments.from_prompts(**batch, reads="targets+last")
    prepare(tiny_llama)
    passes = []
    tiny_llama.model.register_forward_hook(lambda *_: passes.append(1))
    reading, head = read(tiny_llama, segments), ValueHead(32)
    nn.init.normal_(head.weight)
    scores, values, last = score(reading), head(reading), head.last(reading)
    assert len(passes) == 1
    assert values.dtype == last.dtype == torch.float32
    for n, row in enumerate(rows_of(batch)):
        places = batch["completion_mask"][n].nonzero()[:, 0]
        if not len(row):
            assert last[n] == 0
            continue
        states = tiny_llama.model(input_ids=row[None]).last_hidden_state[0]
        expected = states @ head.weight
        torch.testing.assert_close(last[n], expected[-1], rtol=1e-5, atol=1e-5)
        places = places if len(row) > len(places) else places[1:]  # nothing predicts the first of an empty prompt
        torch.testing.assert_close(values[n, places], expected[-1 - len(places) : -1], rtol=1e-5, atol=1e-5)
    assert (values[~scores.mask] == 0).all()
    (scores.token_logps.sum() + values.sum()).backward()
    assert head.weight.grad.abs().sum() > 0
    assert tiny_llama.model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0


def test_a_value_head_computes_in_float32_under_autocast(tiny_llama):
    reading = read(tiny_llama, Segments.from_prompts(**prompts("left")))
    head = ValueHead(32)
    nn.init.normal_(head.weight)
    expected = head(reading)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(head(reading), expected)
    with pytest.raises(ValueError, match="a ValueHead reads hidden states"):
        head(read(Plain(), Segments.from_prompts(**prompts("left"))))


def test_segments_are_carried_over_once_and_planned_on_the_host(monkeypatch):
    segments = Segments.from_prompts(**prompts("left"), reads="targets+last")
    assert segments.to("cpu") is segments
    carried = []
    original = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *a, **k: carried.append(len(self)) or original(self, *a, **k))
    away = segments.to("meta", non_blocking=True)
    assert len(carried) == 1
    names = ("token_ids", "position_ids", "source", "target_ids", "slot", "last_rows")
    assert all(getattr(away, name).shape == getattr(segments, name).shape for name in names)
    assert all(getattr(away, name).device.type == "meta" for name in names)
    assert away.host is segments  # a plan needs no look at the device
    assert away.to("cpu") is segments


def test_lightning_carries_segments_with_the_batch():
    from lightning.fabric.utilities.apply_func import move_data_to_device

    segments = Segments.from_prompts(**prompts("left"))
    moved = move_data_to_device({"x": torch.ones(2), "segments": segments, "names": ["a", "b"]}, torch.device("meta"))
    assert moved["segments"].token_ids.device.type == moved["x"].device.type == "meta"


def test_what_is_asked_for_is_checked(tiny_llama):
    batch = prompts("left")
    with pytest.raises(ValueError, match="reads='first': allowed are 'targets', 'last', 'targets\\+last'"):
        Segments.from_prompts(**batch, reads="first")
    segments = Segments.from_prompts(**batch)
    with pytest.raises(ValueError, match="ask='loss': allowed are 'entropy', 'accuracy'"):
        score(tiny_llama, segments, ask=["loss"])
    with pytest.raises(ValueError, match="segments=None"):
        score(tiny_llama)
    with pytest.raises(ValueError, match='reads="last" or "targets\\+last" is needed'):
        _ = read(tiny_llama, segments).last
