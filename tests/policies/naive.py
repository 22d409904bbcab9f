"""Small models of many families, and what `score` should say of them, computed one row at a time without packing."""

import torch
from torch import nn

VOCABULARY = 40
BASE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
MODELS = {
    "llama": {"model_type": "llama", **GROUPED, "tie_word_embeddings": True},
    "qwen2": {"model_type": "qwen2", "num_key_value_heads": 2},
    "qwen3": {"model_type": "qwen3", **GROUPED},
    "gpt2": {"model_type": "gpt2", **NO_DROPOUT},
    "gpt_neox": {"model_type": "gpt_neox"},
    "mistral": {"model_type": "mistral", "sliding_window": None, **GROUPED},
    "mistral_window": {"model_type": "mistral", "sliding_window": 6, **GROUPED},
    "gemma2": {"model_type": "gemma2", **GROUPED, "sliding_window": 4, "final_logit_softcapping": 5.0},
    "gemma3": {
        "model_type": "gemma3_text",
        **GROUPED,
        "sliding_window": 32,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "cohere": {"model_type": "cohere", "num_key_value_heads": 2, "logit_scale": 0.25},
    "granite": {"model_type": "granite", "num_key_value_heads": 2, "logits_scaling": 3.0},
    "falcon": {"model_type": "falcon"},
}
PACKED = {"llama", "qwen2", "qwen3", "gpt2", "gpt_neox", "mistral", "mistral_window", "gemma3", "cohere", "granite"}
# Layer norms and rotations that models force into float32 round differently when sums are ordered differently.
GRADIENT = 3e-6
# Gemma 2's eager attention takes its softmax in float32.
LOGPS = {"gemma2": 5e-6}


def build(name, dtype=torch.float64, **extra):
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {**BASE, **SPECIAL, **MODELS[name], **extra}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(settings.pop("model_type"), **settings)).to(dtype)
    with torch.no_grad():  # biases and norms away from their neutral values
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


class Plain(nn.Module):
    """A causal module without transformers: what an existing Lightning project brings."""

    def __init__(self, returns="tensor"):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.mixer = nn.Embedding(VOCABULARY, 12), nn.GRU(12, 12, batch_first=True)
        self.head, self.returns = nn.Linear(12, VOCABULARY), returns

    def forward(self, input_ids):
        logits = self.head(self.mixer(self.embedding(input_ids))[0])
        return logits if self.returns == "tensor" else type("Output", (), {"logits": logits})()


class Wrong(nn.Module):
    def forward(self, input_ids):
        return input_ids.double()


def runs(rows, time, g):
    """Masks of existing tokens: one run in each row, with padding before and after it."""
    column = torch.arange(time)
    start, end = torch.randint(2, (rows, 1), generator=g), torch.randint(time - 2, time + 1, (rows, 1), generator=g)
    return (start <= column) & (column < end)


def prompts_batch(seed=0, prompts=3, samples=2, empty=True):
    g = torch.Generator().manual_seed(seed)
    batch = {
        "prompt_ids": torch.randint(VOCABULARY, (prompts, 5), generator=g),
        "prompt_mask": runs(prompts, 5, g),
        "completion_ids": torch.randint(VOCABULARY, (prompts * samples, 6), generator=g),
        "completion_mask": runs(prompts * samples, 6, g),
    }
    if empty:
        batch["prompt_mask"][0] = False
        batch["completion_mask"][-1] = False
    return batch


def labels_batch(seed=0, rows=4, time=9, side="right"):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCABULARY, (rows, time), generator=g)
    lengths = torch.randint(2, time + 1, (rows, 1), generator=g)
    column = torch.arange(time)[None]
    mask = column < lengths if side == "right" else column >= time - lengths
    labels = torch.where(mask & (torch.rand(rows, time, generator=g) < 0.7), ids, -100)
    return ids, labels, mask


def logits_of(policy, ids):
    output = policy(ids)
    return output if isinstance(output, torch.Tensor) else output.logits


def naive_sequence(policy, tokens, temperature=1.0):
    """Log-probabilities and entropies of tokens 1 .. n-1 of one sequence, from all its logits."""
    log_p = (logits_of(policy, tokens[None])[0, :-1] / temperature).log_softmax(-1)
    chosen = log_p.gather(1, tokens[1:, None])[:, 0]
    return chosen, -(log_p.exp() * log_p).sum(-1), log_p.argmax(-1) == tokens[1:]


def naive_prompts(policy, batch, temperature=1.0):
    rows, time = batch["completion_ids"].shape
    samples = rows // len(batch["prompt_ids"])
    dtype = next(policy.parameters()).dtype
    outputs = [
        torch.zeros(rows, time, dtype=dtype),
        torch.zeros(rows, time, dtype=dtype),
        torch.zeros(rows, time).bool(),
    ]
    for n in range(rows):
        prompt = batch["prompt_ids"][n // samples][batch["prompt_mask"][n // samples]]
        places = batch["completion_mask"][n].nonzero()[:, 0]
        places = places if len(prompt) else places[1:]
        tokens = torch.cat((prompt, batch["completion_ids"][n][batch["completion_mask"][n]]))
        if not len(places):
            continue
        for output, values in zip(outputs, naive_sequence(policy, tokens, temperature), strict=True):
            output[n, places] = values[-len(places) :]
    return outputs


def naive_labels(policy, ids, labels, mask):
    dtype = next(policy.parameters()).dtype
    output = torch.zeros(ids.shape, dtype=dtype)
    for b in range(len(ids)):
        places = mask[b].nonzero()[:, 0]
        if len(places) > 1:
            log_p = logits_of(policy, ids[b][places][None])[0, :-1].log_softmax(-1)
            wanted = labels[b][places[1:]]
            values = log_p.gather(1, wanted.clamp_min(0)[:, None])[:, 0]
            output[b, places[1:]] = torch.where(wanted == -100, 0.0, values)
    return output


def gradients(policy, value):
    policy.zero_grad()
    weight = torch.linspace(-1, 1, value.numel(), dtype=value.dtype).view(value.shape)
    (value * weight).sum().backward()
    return {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


def assert_same_gradients(found, expected, atol):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(
            found[name], gradient, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )
