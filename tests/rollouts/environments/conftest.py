"""A tokenizer of characters whose chat template shows tools, and a tiny random model with it."""

import pytest

from tests.rollouts.environments.acting import SPECIAL, TEMPLATE


@pytest.fixture(scope="session")
def acting_folder(write_model, tmp_path_factory):
    characters = [*map(chr, range(32, 127)), "\n"]
    options = {"initializer_range": 0.3, "max_position_embeddings": 512}
    return write_model(tmp_path_factory.mktemp("acting"), characters, special=SPECIAL, template=TEMPLATE, **options)


@pytest.fixture(scope="session")
def tokenizer(acting_folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(acting_folder)


@pytest.fixture
def model(acting_folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(acting_folder).eval()
