"""Fixtures shared by all tests: one tiny model and one tiny tokenizer, each built once."""

import copy
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

from tests.shapes import LLAMA

TINY_LLAMA = LLAMA | {"max_position_embeddings": 128, "tie_word_embeddings": True}


CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<|assistant|>"
    "{% generation %}{{ m['content'] }}{{ eos_token }}{% endgeneration %}"
    "{% else %}<|user|>{{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="session")
def built_llama():
    """The tiny Llama that every test gets a copy of, and torch's random state after it was made from seed 0."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**TINY_LLAMA)).eval(), torch.get_rng_state()


@pytest.fixture
def tiny_llama(built_llama):
    """A fresh two-layer Llama (grouped queries, tied head, vocabulary of 40) in eval mode, float32."""
    model, state = built_llama
    torch.set_rng_state(state)
    return copy.deepcopy(model)


@pytest.fixture(scope="session")
def write_model():
    """Writes a two-layer Llama, and a tokenizer of its characters where it gets some, as `save_pretrained` does.

    Ids 0, 1 and 2 are padding, begin and end; special tokens such as those of a chat template follow, then characters.
    """

    def write(folder, characters="", *, vocabulary=None, special=(), template=None, seed=0, **config):
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers
        from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

        tokens = ["<pad>", "<s>", "</s>", *special, *characters]
        if characters:
            core = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<pad>"))
            core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
            core.decoder = decoders.Fuse()
            tokenizer = PreTrainedTokenizerFast(
                tokenizer_object=core,
                pad_token="<pad>",
                bos_token="<s>",
                eos_token="</s>",
                additional_special_tokens=list(special),
            )
            tokenizer.chat_template = template
            tokenizer.save_pretrained(folder)
        settings = {
            "vocab_size": vocabulary or len(tokens),
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **(settings | config)))
        model.save_pretrained(folder)
        return str(folder)

    return write


@pytest.fixture(scope="session")
def model_folder(write_model, tmp_path_factory):
    """A tiny model with a tokenizer of all printable characters and a chat template: a folder that nobody changes."""
    characters = [*map(chr, range(32, 127)), "\n"]
    chat = {"special": ("<|user|>", "<|assistant|>"), "template": CHAT_TEMPLATE}
    return write_model(tmp_path_factory.mktemp("model"), characters, **chat, initializer_range=0.3)


@pytest.fixture
def tiny_llama_config():
    """The dictionary that `PolicyConfig(config=...)` takes for the same model."""
    return dict(TINY_LLAMA)


@pytest.fixture
def train():
    """Fits a module on a list of batches without files or bars, from a checkpoint where one is given: the Trainer."""
    import lightning as L

    def fit(module, batches, ckpt=None, **options):
        settings = {
            "max_epochs": 1,
            "accelerator": "cpu",
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "log_every_n_steps": 1,
        }
        trainer = L.Trainer(**(settings | options))
        trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None), ckpt_path=ckpt)
        return trainer

    return fit


@pytest.fixture
def update(train):
    """The change of every trainable weight by one SGD step of rate 1 over the micro-batches: minus the gradient."""

    def change(make_module, batches, **options):
        module = make_module(optimizer=lambda groups: torch.optim.SGD(groups, lr=1.0))
        before = {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}
        if module.automatic_optimization:
            options.setdefault("accumulate_grad_batches", len(batches))
        train(module, copy.deepcopy(batches), **options)
        return {name: p.detach() - before[name] for name, p in module.named_parameters() if p.requires_grad}

    return change


@pytest.fixture
def assert_same():
    """Compares two dictionaries of tensors to a tolerance, and that they are not all zero."""

    def compare(first, second, tolerance=1e-5):
        assert first.keys() == second.keys()
        assert max(float(value.abs().max()) for value in first.values()) > 10 * tolerance
        for name in first:
            torch.testing.assert_close(
                first[name], second[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
            )

    return compare
