"""An exported reward model gives the numbers of training: to plain transformers, and to rewards by its folder."""

import json

import lightning as L
import pytest
import torch

from alignment_modules import GRPOModule, LoraConfig, PolicyConfig, RewardModule
from alignment_modules.policies.load import build_policy
from alignment_modules.rewards import SequenceClassifier
from datamodules import PreferenceDataModule, PromptDataModule

# As ChatML: a token ends each turn, and a line break follows it.
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# No token ends a turn.
WORDS = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
PAIRS = [("say hi", "hi", "go away please"), ("count to ten", "one two three four", "no"), ("q", "a b c", "a b d")]


def make_tokenizer(*, pad="<pad>", template=None):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<unk>", "</s>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {token: index for index, token in enumerate([*special, *"abcdefghijklmnopqrstuvwxyz .:\n"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        eos_token="</s>",
        pad_token=pad,
        padding_side="left",
        additional_special_tokens=special[3:],
    )
    tokenizer.chat_template = template
    return tokenizer


def rows(chat):
    def side(text):
        return [{"role": "assistant", "content": text}] if chat else text

    return [
        {
            "prompt": [{"role": "user", "content": prompt}] if chat else prompt,
            "chosen": side(chosen),
            "rejected": side(rejected),
        }
        for prompt, chosen, rejected in PAIRS
    ]


def fit(policy, data):
    torch.manual_seed(0)
    module = RewardModule(policy=policy, optimizer=lambda groups: torch.optim.SGD(groups, lr=0.5))
    trainer = L.Trainer(
        max_steps=3,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data)
    return module.eval()


@pytest.fixture
def base(tmp_path, tiny_llama):
    tiny_llama.save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def tokens(batch, row, side):
    """A pair's prompt and one completion, without padding."""
    masks = {name: batch[f"{name}_attention_mask"][row] != 0 for name in ("prompt", side)}
    return torch.cat([batch[f"{name}_input_ids"][row][mask] for name, mask in masks.items()])


def trained_rewards(module, batch):
    """[pairs, 2] as the objective reads them off the data module's own tokens."""
    from alignment_modules.policies.reading import read

    with torch.no_grad():
        reading = read(module.policy, module.segments(batch))
        return reading.outputs(reading.last).view(-1, 2)


@pytest.mark.parametrize(
    ("chat", "template"),
    [(False, None), (False, TEMPLATE), (True, TEMPLATE), (True, WORDS)],
    ids=["text", "text-template", "chat", "chat-no-stop"],
)
@pytest.mark.parametrize("pad", ["<pad>", "</s>", None])
def test_a_folder_gives_the_numbers_of_training(base, tmp_path, chat, template, pad):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = make_tokenizer(pad=pad, template=template)
    data = PreferenceDataModule(train=rows(chat), tokenizer=tokenizer, batch_size=3, shuffle=False)
    module = fit(PolicyConfig(path=base, head="scalar"), data)
    (batch,) = list(data.train_dataloader())
    expected = trained_rewards(module, batch)
    folder = module.export(tmp_path / "export")

    reward = SequenceClassifier(str(folder))
    for side in (0, 1):
        completions, prompts = [pair[1 + side] for pair in PAIRS], [row["prompt"] for row in rows(chat)]
        assert reward(completions=completions, prompts=prompts) == pytest.approx(expected[:, side].tolist(), abs=1e-5)

    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    other = AutoTokenizer.from_pretrained(folder)
    assert model.config.num_labels == 1
    assert other.chat_template == template
    texts = [tokens(batch, row, "chosen").tolist() for row in range(3)]
    with torch.no_grad():
        if pad == "<pad>":  # padded by the tokenizer, as it comes
            assert model.config.pad_token_id == other.pad_token_id == 0
            padded = other.pad({"input_ids": texts}, return_tensors="pt")
            found = model(**padded).logits[:, 0]
        else:  # no padding id: an end of text must not be taken for padding
            assert model.config.pad_token_id is None
            found = torch.stack([model(torch.tensor([ids])).logits[0, 0] for ids in texts])
    torch.testing.assert_close(found, expected[:, 0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["merge", "adapter"])
def test_lora(base, tmp_path, kind):
    data = PreferenceDataModule(train=rows(True), tokenizer=make_tokenizer(template=TEMPLATE), batch_size=3)
    module = fit(PolicyConfig(path=base, head="scalar", lora=LoraConfig(r=2)), data)
    folder = module.export(tmp_path / "export", lora=kind)
    (batch,) = list(data.train_dataloader())
    order = list(batch["index"])
    expected = trained_rewards(module, batch)[:, 0].tolist()
    prompts, completions = [rows(True)[i]["prompt"] for i in order], [PAIRS[i][1] for i in order]
    found = SequenceClassifier(str(folder))(completions=completions, prompts=prompts)
    assert found == pytest.approx(expected, abs=1e-5)
    torch.manual_seed(1)  # nothing of it is drawn again
    again = RewardModule(policy=str(folder))
    assert trained_rewards(again.eval(), batch)[:, 0].tolist() == pytest.approx(expected, abs=1e-5)
    if kind == "adapter":
        from peft import AutoPeftModelForSequenceClassification

        saved = json.loads((folder / "adapter_config.json").read_text())
        assert saved["task_type"] == "SEQ_CLS"
        plain = AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels=1).eval()
        ids = tokens(batch, 0, "chosen")
        with torch.no_grad():
            assert float(plain(ids[None]).logits) == pytest.approx(expected[0], abs=1e-5)
        with pytest.raises(ValueError, match="holds the adapter of a sequence classifier"):
            build_policy(str(folder))


def test_an_adapter_of_a_language_model_carries_a_reward_model(base, tmp_path):
    from alignment_modules.policies.export import export_policy

    torch.manual_seed(0)
    policy = build_policy(PolicyConfig(path=base, lora=LoraConfig(r=2)))
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    export_policy(policy, tmp_path / "sft", lora="adapter")
    merged = build_policy(str(tmp_path / "sft"))
    scalar = build_policy(PolicyConfig(path=str(tmp_path / "sft"), head="scalar"))
    assert torch.equal(scalar.model.layers[0].mlp.up_proj.weight, merged.model.layers[0].mlp.up_proj.weight)
    assert scalar.score.weight.shape == (1, 32)


def test_a_reward_of_grpo_by_its_path(base, tmp_path, train):
    tokenizer = make_tokenizer(template=TEMPLATE)
    data = PreferenceDataModule(train=rows(True), tokenizer=tokenizer, batch_size=3)
    folder = fit(PolicyConfig(path=base, head="scalar"), data).export(tmp_path / "runs" / "reward" / "export")
    questions = [{"prompt": row["prompt"]} for row in rows(True)]
    prompts = PromptDataModule(train=questions, tokenizer=tokenizer, batch_size=3)
    prompts.setup("fit")
    module = GRPOModule(
        policy=base, rewards=str(folder), num_generations=2, max_completion_length=4, tokenizer=tokenizer
    )
    metrics = train(module, list(prompts.train_dataloader())).callback_metrics
    assert metrics["train/rewards/export/std"] > 0
