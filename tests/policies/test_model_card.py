"""The model card: front matter that hubs read, and text that cannot break out of its place."""

import pytest
import yaml

from alignment_modules.policies.export import export_policy
from alignment_modules.policies.model_card import CardFacts, DataFacts, write_model_card


def front_matter(folder):
    text = (folder / "README.md").read_text(encoding="utf-8")
    return yaml.safe_load(text.split("---\n")[1]), text


def test_an_export_alone_has_a_card(tiny_llama, tokenizer, tmp_path):
    folder = export_policy(tiny_llama, tmp_path / "export", tokenizer)
    front, text = front_matter(folder)
    assert front == {"library_name": "transformers", "tags": ["alignment-modules"]}
    assert "# LlamaForCausalLM" in text
    assert "| torch |" in text
    assert "## Data" not in text
    assert "## Metrics" not in text


def test_front_matter_names_what_is_known(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    write_model_card(tmp_path, CardFacts(base="owner/model", paradigm="dpo", license="apache-2.0"))
    assert front_matter(tmp_path)[0] == {
        "base_model": "owner/model",
        "library_name": "peft",
        "license": "apache-2.0",
        "tags": ["alignment-modules", "dpo"],
    }


def test_a_local_base_stands_for_the_hub_id_it_goes_back_to(tmp_path):
    for name in ("first", "second", "third"):
        (tmp_path / name).mkdir()
    write_model_card(tmp_path / "first", CardFacts(base="owner/model"))
    write_model_card(tmp_path / "second", CardFacts(base=str(tmp_path / "first")))
    assert front_matter(tmp_path / "second")[0]["base_model"] == "owner/model"
    write_model_card(tmp_path / "third", CardFacts(base=str(tmp_path / "third")))
    front, text = front_matter(tmp_path / "third")
    assert "base_model" not in front
    assert str(tmp_path / "third") in text


@pytest.mark.parametrize("evil", ["a|b`c", "x\n---\nlicense: mit\n# Title", "<script>", "![](http://x)"])
def test_text_stays_in_its_place(tmp_path, evil):
    fence = "note: |\n  ```\n  # Not a title\n"
    facts = CardFacts(
        base=evil, trained_by=evil, license=evil, data=[DataFacts(evil, evil, 1234, None)], config=fence, weights=evil
    )
    write_model_card(tmp_path, facts)
    front, text = front_matter(tmp_path)
    assert front["license"] == " ".join(evil.split())
    lines = text.split("---\n\n", 1)[1].splitlines()
    assert [line for line in lines if line.startswith("# ")] == ["# Policy"]
    (row,) = [line for line in lines if "1,234" in line]
    assert row.replace("\\|", "").count("|") == 5
    assert "````yaml" in lines
    assert "<script>" not in text.replace("`<script>`", "").split("---\n\n", 1)[1]


def test_a_secret_of_the_configuration_is_left_out(tmp_path):
    config = "logger:\n  api_key: abc123\n  password: 'x y'\nmax_tokens: 5\ntokenizer: here\n"
    _, text = front_matter(write_model_card(tmp_path, CardFacts(config=config)).parent)
    assert "api_key: '***'" in text
    assert "abc123" not in text
    assert "x y" not in text
    assert "max_tokens: 5\ntokenizer: here" in text


def test_a_card_is_written_whole_or_not_at_all(tmp_path):
    write_model_card(tmp_path, CardFacts(paradigm="sft"))
    write_model_card(tmp_path, CardFacts(paradigm="dpo"))
    assert [file.name for file in tmp_path.iterdir()] == ["README.md"]
    with pytest.raises(OSError, match="nowhere"):
        write_model_card(tmp_path / "nowhere")
