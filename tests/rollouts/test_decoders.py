"""Which decoder a policy gets, and that each is right for the models it takes."""

import copy

import pytest
import torch
from torch import nn

from alignment_modules import LoraConfig as AdapterOptions
from alignment_modules import PolicyConfig
from alignment_modules.policies.frozen import frozen_companion
from alignment_modules.policies.lora import add_lora
from alignment_modules.rollouts import SamplingParameters, sample
from alignment_modules.rollouts.decoders.base import RecomputeDecoder
from alignment_modules.rollouts.decoders.cached import CachedDecoder
from alignment_modules.rollouts.decoders.llama.bins import Bins
from alignment_modules.rollouts.decoders.llama.decoder import FastDecoder
from alignment_modules.rollouts.decoders.llama.weights import no_fast_decoding
from alignment_modules.rollouts.decoders.select import select_decoder

MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]])
PARAMETERS = SamplingParameters(10, temperature=0.8, stop_token_ids=tuple(range(0, 40, 7)))

FAST = {
    "llama": {},
    "llama untied": {"tie_word_embeddings": False},
    "llama one kv head": {"num_key_value_heads": 1},
    "llama no groups": {"num_key_value_heads": 4},
    "llama head_dim": {"head_dim": 12},
    "llama yarn": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
    "llama llama3 rope": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 1e4,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    },
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "mistral": {"sliding_window": None},
}
CACHED = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gemma2": {"sliding_window": 4, "head_dim": 8, "query_pre_attn_scalar": 8, "final_logit_softcapping": 5.0},
    "gemma3_text": {"sliding_window": 4, "head_dim": 8, "query_pre_attn_scalar": 8},
    "mistral": {"sliding_window": 4},
    "granite": {"logits_scaling": 3.0, "embedding_multiplier": 2.0},
    "llama": {"attention_bias": True},
    "llama dynamic": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "do_layer_norm_before": True},
    "bloom": {"n_layer": 2, "n_head": 4},
}


def check(policy, rescore, tolerance=1e-4):
    ids = torch.randint(40, MASK.shape, generator=torch.Generator().manual_seed(1))
    got = sample(policy, ids, MASK, parameters=PARAMETERS, num_samples=5, seed=6)
    assert got.mask.sum(1).unique().numel() >= 3
    torch.testing.assert_close(got.token_logps.double(), rescore(policy, ids, MASK, got, 0.8), atol=tolerance, rtol=0)
    return got


@pytest.mark.parametrize("case", FAST)
def test_the_llama_family_is_decoded_fast(make_policy, rescore, case):
    policy = make_policy(
        case.split()[0].removesuffix("3") if case.startswith("llama") else case.split()[0], **FAST[case]
    )
    assert select_decoder(policy, 20) is FastDecoder
    check(policy, rescore)


@pytest.mark.parametrize("case", CACHED)
def test_other_models_are_decoded_with_their_forward(make_policy, rescore, case):
    policy = make_policy(case.split()[0], **CACHED[case])
    assert select_decoder(policy, 20) is CachedDecoder
    check(policy, rescore)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_both_attention_implementations(make_policy, rescore, force, attention):
    policy = make_policy(attn_implementation=attention)
    force("cached")
    check(policy, rescore)


def test_modules_without_a_cache_are_recomputed(bigram, make_policy):
    assert select_decoder(bigram, 20) is RecomputeDecoder
    mamba = make_policy("mamba", state_size=4, expand=2, conv_kernel=2)
    assert select_decoder(mamba, 20) is RecomputeDecoder
    sample(mamba, torch.tensor([[1, 2, 3]]), torch.ones(1, 3), parameters=PARAMETERS, num_samples=2)


def test_a_wrong_decoder_is_not_used(make_policy, monkeypatch, caplog):
    policy = make_policy()
    prefill = CachedDecoder.prefill
    monkeypatch.setattr(CachedDecoder, "prefill", lambda self: prefill(self) * 1.01)
    policy.register_forward_hook(lambda *_: None)
    with caplog.at_level("INFO", logger="alignment_modules.rollouts.decoders.select"):
        assert select_decoder(policy, 20) is RecomputeDecoder
        assert select_decoder(policy, 20) is RecomputeDecoder
    assert caplog.text.count("CachedDecoder: logits differ by 1.0e-02") == 1


def _hook(policy):
    policy.model.layers[1].mlp.register_forward_hook(lambda *_: None)


def _replaced_forward(policy):
    policy.model.norm.forward = lambda x: x


def _other_module(policy):
    policy.model.layers[0].mlp.act_fn = nn.GELU()


def _half(policy):
    policy.bfloat16()


def _mixed(policy):
    policy.lm_head.double()


def _dropout(policy):
    policy.train()
    policy.model.layers[0].self_attn.attention_dropout = 0.1


@pytest.mark.parametrize("change", [_hook, _replaced_forward, _other_module, _half, _mixed, _dropout])
def test_changed_llamas_are_not_decoded_fast(make_policy, change):
    policy = make_policy(tie_word_embeddings=False)
    assert no_fast_decoding(policy) is None
    change(policy)
    assert no_fast_decoding(policy)


def test_autocast_keeps_the_models_forward(make_policy):
    policy = make_policy()
    with torch.autocast("cpu", torch.bfloat16):
        assert "autocast" in no_fast_decoding(policy)
        got = sample(policy, torch.tensor([[1, 2]]), torch.ones(1, 2), parameters=PARAMETERS, num_samples=2)
    assert got.token_logps.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_policies(make_policy, rescore, dtype):
    policy = make_policy(initializer_range=0.1).to(dtype)
    assert select_decoder(policy, 20) is CachedDecoder
    got = check(policy, rescore, tolerance=0.2)
    assert got.token_logps.dtype == torch.float32


def test_gradient_checkpointing_in_train_mode_keeps_the_cache(make_policy, rescore):
    for path_model in ({}, {"attention_bias": True}):
        policy = make_policy(**path_model)
        policy.gradient_checkpointing_enable()
        policy.train()
        check(policy, rescore)
        assert policy.is_gradient_checkpointing


def lora(policy, **options):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(policy, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", **options)).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, 0.0, 0.2)
    return model


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}])
def test_lora_is_merged_into_the_fast_weights(make_policy, rescore, options):
    plain = make_policy()
    before = {name: value.clone() for name, value in plain.state_dict().items()}
    policy = lora(plain, **options)
    assert select_decoder(policy, 20) is FastDecoder
    adapted = check(policy, rescore)
    with policy.disable_adapter():
        assert select_decoder(policy, 20) is FastDecoder
        base = check(policy, rescore)
    assert not torch.equal(base.token_logps[:, 0], adapted.token_logps[:, 0])
    state = {name.replace(".base_layer", ""): value for name, value in policy.get_base_model().state_dict().items()}
    assert all(torch.equal(state[name], value) for name, value in before.items())


def test_adapters_that_start_from_their_base_and_one_beside_them(make_policy, rescore, tmp_path):
    plain = make_policy()
    plain.save_pretrained(tmp_path / "base")
    plain.name_or_path = str(tmp_path / "base")
    saved = lora(copy.deepcopy(plain))
    saved.save_pretrained(tmp_path / "other")
    policy = add_lora(plain, AdapterOptions(r=4, alpha=8, init="pissa")).eval()
    for name, parameter in policy.named_parameters():
        if parameter.requires_grad and "lora_B" in name:
            nn.init.normal_(parameter, 0.0, 0.2)
    assert select_decoder(policy, 20) is FastDecoder
    own = check(policy, rescore)
    reference = PolicyConfig(path=str(tmp_path / "other"), merge_adapter=False)
    with frozen_companion(reference, policy).reading() as other:
        assert select_decoder(other, 20) is FastDecoder
        apart = check(other, rescore)
        assert torch.equal(apart.token_logps, check(saved, rescore).token_logps)
    assert torch.equal(check(policy, rescore).token_logps, own.token_logps)
    assert not torch.equal(apart.token_logps[:, 0], own.token_logps[:, 0])


@pytest.mark.parametrize("options", [{"lora_bias": True}, {"modules_to_save": ["embed_tokens"]}])
def test_other_adapters_use_the_models_forward(make_policy, rescore, options):
    policy = lora(make_policy(tie_word_embeddings=False), **options)
    assert select_decoder(policy, 20) is CachedDecoder
    check(policy, rescore)


def test_active_lora_dropout_uses_the_models_forward(make_policy):
    policy = lora(make_policy(), lora_dropout=0.1)
    assert no_fast_decoding(policy) is None
    assert no_fast_decoding(policy.train())


def test_bins_hold_each_row_once_and_only_its_prompt():
    prompt_of_row = torch.tensor([0, 0, 0, 2, 3, 3, 3, 3, 3])
    for share in (0.0, 0.1, 1.0, 10.0):
        bins = Bins.pack(prompt_of_row, share)
        place = torch.arange(9) if bins.place_of_row is None else bins.place_of_row
        assert place.unique().numel() == 9
        assert torch.equal(bins.prompt[place // bins.size], prompt_of_row)
        if bins.row_of_place is not None:
            assert torch.equal(bins.row_of_place[place], torch.arange(9))
    assert Bins.pack(prompt_of_row, 0.0).places == 9
    assert Bins.pack(prompt_of_row, 10.0).count == 3
