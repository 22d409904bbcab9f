"""All callbacks can be built from YAML, as LightningCLI does it."""

import pytest
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback

import alignment_modules.callbacks as package
from alignment_modules.callbacks import CompletionWriter, SampleTable


@pytest.mark.parametrize(
    "name", sorted(set(package.__all__) - {"AtomicCheckpointIO", "CheckpointError", "TensorBoard"})
)
def test_defaults_and_help(name):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(getattr(package, name), "callback")
    built = parser.instantiate_classes(parser.parse_args([])).callback
    assert isinstance(built, getattr(package, name))
    assert "callback" in parser.format_help()


def test_a_list_of_callbacks():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--callbacks", type=list[Callback])
    config = [
        {"class_path": "alignment_modules.callbacks.SampleTable", "init_args": {"rows": 2}},
        {"class_path": "CompletionWriter", "init_args": {"path": "x.jsonl"}},
    ]
    table, writer = parser.instantiate_classes(parser.parse_object({"callbacks": config})).callbacks
    assert isinstance(table, SampleTable)
    assert table.rows == 2
    assert isinstance(writer, CompletionWriter)
    bad = {"class_path": "ExportPolicy", "init_args": {"lora": "both"}}
    with pytest.raises(Exception, match="lora"):
        parser.parse_object({"callbacks": [bad]})
