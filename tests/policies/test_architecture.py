"""What a configuration asks for and does not get is said or refused by name."""

import json
import logging

import pytest
import torch
from torch import nn

from alignment_modules import DPOModule, PolicyConfig, SFTModule
from alignment_modules.policies.architecture import left_out_losses, own_stop_ids
from alignment_modules.policies.load import build_policy
from alignment_modules.policies.scoring import score
from alignment_modules.policies.segments import Segments
from alignment_modules.rollouts import SamplingParameters, sample

SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
MIXTRAL = {
    "model_type": "mixtral",
    **SIZES,
    "intermediate_size": 16,
    "num_key_value_heads": 1,
    "num_local_experts": 2,
    "output_router_logits": True,
    "router_aux_loss_coef": 0.25,
}
GPT2 = {"model_type": "gpt2", "vocab_size": 40, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 12}


def test_a_router_loss_that_is_left_out_is_said_at_build(caplog):
    with caplog.at_level(logging.WARNING, "alignment_modules"):
        model = build_policy(PolicyConfig(config=MIXTRAL))
        build_policy(model, trainable=False)
    assert len(caplog.records) == 1
    said = caplog.records[0].getMessage()
    assert "MixtralForCausalLM" in said
    assert "output_router_logits=True, router_aux_loss_coef=0.25" in said
    caplog.clear()
    DPOModule(policy=model)
    assert len(caplog.records) == 1
    caplog.clear()
    SFTModule(policy=model)  # adds it
    assert not caplog.records


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"output_router_logits": False}, {}),
        ({"router_aux_loss_coef": 0.0}, {}),
        ({"output_router_logits": False, "aux_loss_alpha": 0.001}, {"aux_loss_alpha": 0.001}),
        ({"output_router_logits": False, "num_nextn_predict_layers": 1}, {"num_nextn_predict_layers": 1}),
        (
            {"router_z_loss_coef": 0.1},
            {"output_router_logits": True, "router_aux_loss_coef": 0.25, "router_z_loss_coef": 0.1},
        ),
    ],
)
def test_which_losses_a_configuration_asks_for(change, named):
    from transformers import MixtralConfig

    model = nn.Linear(1, 1)
    model.config = MixtralConfig(**{key: value for key, value in (MIXTRAL | change).items() if key != "model_type"})
    assert left_out_losses(model) == named
    assert left_out_losses(nn.Linear(1, 1)) == {}


def test_a_loss_that_is_added_is_not_left_out():
    from transformers import MixtralConfig

    model = nn.Linear(1, 1)
    model.config = MixtralConfig(output_router_logits=True, router_aux_loss_coef=0.25)
    assert left_out_losses(model, ["router_aux_loss_coef"]) == {}
    model.config.router_z_loss_coef = 0.1
    assert left_out_losses(model, ["router_aux_loss_coef"]) == {
        "output_router_logits": True,
        "router_z_loss_coef": 0.1,
    }


def test_multimodal_models_are_refused_before_weights_are_read(tmp_path, tiny_llama):
    config = {"model_type": "llava", "vision_config": {"model_type": "clip_vision_model"}, "text_config": {}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(b"not read")
    with pytest.raises(ValueError, match=r"multimodal.*model_type='llava'.*has vision_config.*text alone"):
        build_policy(str(tmp_path))
    with pytest.raises(ValueError, match=r"policy.config is a multimodal.*vision_config"):
        build_policy(PolicyConfig(config={"model_type": "llava"}))
    tiny_llama.config.audio_config = {"hidden_size": 4}
    with pytest.raises(ValueError, match=r"policy=LlamaForCausalLM is a multimodal.*audio_config"):
        build_policy(tiny_llama)


def test_float16_weights_are_not_trained(tiny_llama, tiny_llama_config, train):
    with pytest.raises(ValueError, match=r"policy.dtype='float16' cannot be trained.*bf16-mixed"):
        SFTModule(policy=PolicyConfig(config=tiny_llama_config, dtype="float16"))
    reference = build_policy(PolicyConfig(config=tiny_llama_config, dtype="float16"), trainable=False)
    assert reference.dtype == torch.float16
    batch = {"input_ids": torch.ones(1, 4, dtype=torch.long), "labels": torch.ones(1, 4, dtype=torch.long)}
    with pytest.raises(ValueError, match=r"'policy.model.embed_tokens.weight' and \d+ more .* float16.*bf16-mixed"):
        train(SFTModule(policy=tiny_llama.half()), [batch])


def rows(width):
    ids = torch.ones(1, width, dtype=torch.long)
    return Segments.from_labels(ids, ids, None, None)


def test_a_row_beyond_the_table_of_positions_is_refused():
    model = build_policy(PolicyConfig(config=GPT2)).eval()
    assert score(model, rows(13)).token_logps.isfinite().all()  # the last token predicts nothing and is not computed
    with pytest.raises(ValueError, match=r"a row of 13 tokens does not fit GPT2LMHeadModel.* for 12 \(.*max_length"):
        score(model, rows(14))
    prompt, mask = torch.ones(1, 5, dtype=torch.long), torch.ones(1, 5, dtype=torch.long)
    sample(model, prompt, mask, parameters=SamplingParameters(max_completion_length=7))
    with pytest.raises(ValueError, match=r"longest completion of 13 tokens does not fit.*max_completion_length"):
        sample(model, prompt, mask, parameters=SamplingParameters(max_completion_length=8))


def test_computed_positions_have_no_end(tiny_llama):
    assert score(tiny_llama, rows(150)).token_logps.isfinite().all()


def test_stop_ids_of_another_vocabulary_are_left_out():
    model = build_policy(PolicyConfig(config=GPT2))
    model.generation_config.eos_token_id = [3, 50256]
    with pytest.warns(UserWarning, match=r"generation_config.json: \[50256\] lie outside .* 40 tokens"):
        assert own_stop_ids(model, 40) == [3]
    model.generation_config.eos_token_id = 3
    assert own_stop_ids(model, 40) == [3]
    assert own_stop_ids(nn.Linear(1, 1), 40) == []
