"""`align export`: the policy in a run's checkpoint as a folder in Hugging Face format."""

import argparse
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import LightningDataModule

from alignment_modules.cli.classes import import_path
from alignment_modules.cli.data_checks import options_of_sources
from alignment_modules.cli.errors import AlignArgumentParser, find_cause
from alignment_modules.cli.options import OptionParser
from alignment_modules.cli.own_files import find_own_files
from alignment_modules.cli.policy_options import follow_policy, policy_path
from alignment_modules.cli.run_folder import last_checkpoint
from alignment_modules.policies.export import MARKER, note_stages, stages_of
from alignment_modules.policies.load import load_tokenizer
from alignment_modules.policies.model_card import CardFacts, DataFacts, write_model_card
from alignment_modules.training.best import Best, best_of_state
from alignment_modules.training.module import AlignmentModule
from alignment_modules.training.sharded_checkpoints import load_module, open_checkpoint
from alignment_modules.training.sharded_io import is_checkpoint_folder


def export_command(arguments: list[str]) -> int:
    """Runs `align export`.

    Args:
        arguments: What follows `align export`.

    Returns:
        0.

    Raises:
        ValueError: If the checkpoint, its configuration or the folder cannot be used as asked for.
    """
    given = _parser().parse_args(arguments)
    checkpoint, best = _find_checkpoint(Path(given.checkpoint).expanduser(), given.which)
    config_file = Path(given.config).expanduser() if given.config else _find_config(checkpoint)
    text, config = _read_config(config_file)
    find_own_files()
    state, _ = open_checkpoint(checkpoint)
    module = _load_module(checkpoint, config)
    _attach_data(module, config)
    target = module.export(given.out, lora=given.lora)
    write_model_card(target, _facts(given, config, text, module, state, best))
    note_stages(target, [*stages_of(policy_path(_policy(config))), module.paradigm])
    print(f"exported {checkpoint} to {given.out}")
    if given.push:
        print(f"pushed to {push(target, given.push)}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = OptionParser(
        "export",
        "CHECKPOINT OUT [options]",
        "Write the policy of a training checkpoint as a folder in Hugging Face format, with its tokenizer and a\n"
        "model card.",
        "align export runs/sft runs/sft/best --which best",
    )
    parser.add_argument("checkpoint", help="a file or folder (checkpoints/*.ckpt of a run), or the run's folder")
    parser.add_argument("out", help="the folder to write; replaced where it is an export")
    parser.add_argument(
        "--which",
        choices=("last", "best"),
        help="of a run: the last checkpoint (default), or the best by its ModelCheckpoint(monitor=...)",
    )
    parser.add_argument(
        "--lora",
        choices=("merge", "adapter"),
        default="merge",
        help="merge adapters into the weights (default), or write them alone",
    )
    parser.add_argument(
        "--config", metavar="FILE", help="the run's configuration (default: config.yaml in the run's folder)"
    )
    parser.add_argument(
        "--license", metavar="ID", help='for the model card, such as "apache-2.0" (default: it says nothing)'
    )
    parser.add_argument(
        "--push", metavar="OWNER/NAME", help="also upload the folder to this repository of the Hugging Face hub"
    )
    return parser


def _find_checkpoint(path: Path, which: str | None) -> tuple[Path, Best | None]:
    """The checkpoint that is meant, and where it is the best one what it is the best by."""
    if not path.exists():
        raise ValueError(f"checkpoint={str(path)!r}: there is no such file or folder")
    is_run = path.is_dir() and not is_checkpoint_folder(path)
    checkpoint = last_checkpoint(path) if is_run else path
    if which != "best":
        return checkpoint, None
    best = best_of_state(open_checkpoint(checkpoint)[0].get("callbacks", {}), checkpoint)
    return best.path, best


def _find_config(checkpoint: Path) -> Path:
    """The nearest `config.yaml` above a checkpoint; a `/` in a file's name makes folders below `checkpoints`."""
    for folder in list(checkpoint.resolve().parents)[:4]:
        if (folder / "config.yaml").is_file():
            return folder / "config.yaml"
    raise ValueError(
        f"checkpoint={str(checkpoint)!r}: its run's config.yaml is not in a folder above it; name it with --config FILE"
    )


def _read_config(file: Path) -> tuple[str, dict[str, Any]]:
    """A run's configuration as text and as values."""
    try:
        text = file.read_text(encoding="utf-8")
        config = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"config={str(file)!r} cannot be read: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("model"), dict) or "class_path" not in config["model"]:
        raise ValueError(f"config={str(file)!r} is no configuration of a run: model.class_path is missing")
    return text, config


def _load_module(checkpoint: Path, config: dict[str, Any]) -> AlignmentModule:
    name = config["model"]["class_path"]
    try:
        module_class = import_path(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"model.class_path={name!r}: {error}") from error
    if not (isinstance(module_class, type) and issubclass(module_class, AlignmentModule)):
        raise ValueError(f"model.class_path={name!r} must be an AlignmentModule: others have no policy to export")
    try:
        return load_module(module_class, checkpoint)
    except (TypeError, RuntimeError) as error:
        raise ValueError(f"checkpoint={str(checkpoint)!r}: {error}") from error


def _attach_data(module: AlignmentModule, config: dict[str, Any]) -> None:
    """Gives the module the tokenizer and the stop tokens that its data module gave it in training."""
    data, path = config.get("data"), policy_path(_policy(config))
    if not isinstance(data, dict):
        if module.tokenizer is None and path is not None:
            module.tokenizer = load_tokenizer(path)
        return
    options = data.get("init_args") or {}
    data = data | {"init_args": options | follow_policy(options, _policy(config))}
    parser = AlignArgumentParser(exit_on_error=False)
    parser.add_lightning_class_args(LightningDataModule, "data", subclass_mode=True)
    try:
        datamodule = parser.instantiate_classes(parser.parse_object({"data": data})).data
    except Exception as error:  # jsonargparse wraps what a class raised in errors of many types
        raise ValueError(f"data={data.get('class_path')}: {find_cause(error)}") from error
    module.codec.data_stops = tuple(getattr(datamodule, "stop_token_ids", ()))
    if module.tokenizer is None:
        module.tokenizer = getattr(datamodule, "tokenizer", None)


def _policy(config: dict[str, Any]) -> Any:
    return (config["model"].get("init_args") or {}).get("policy")


def _facts(
    given: argparse.Namespace,
    config: dict[str, Any],
    text: str,
    module: AlignmentModule,
    state: dict[str, Any],
    best: Best | None,
) -> CardFacts:
    data = (config.get("data") or {}).get("init_args") or {}
    parts = [(f"/{name}", options) for name, options in options_of_sources(data)] or [("", data)]
    sources = [(split + name, options.get(split)) for split in ("train", "validation") for name, options in parts]
    steps = f"after {state.get('global_step')} optimizer steps"
    return CardFacts(
        base=policy_path(_policy(config)),
        trained_by=type(module).__name__,
        paradigm=module.paradigm,
        license=given.license,
        weights=f"those of the best {best.monitor}, {steps}" if best else f"those {steps}",
        data=[DataFacts(split, _source_name(source)) for split, source in sources if source is not None],
        metrics={best.monitor: best.score} if best and best.score is not None else {},
        config=text,
    )


def _source_name(source: Any) -> str:
    return str(source.get("class_path", "a dictionary")) if isinstance(source, dict) else str(source)


def push(folder: Path, repository: str) -> str:
    """Uploads an export to the Hugging Face hub, with the token that its own tools keep.

    Args:
        folder: The export.
        repository: `owner/name`; it is made where there is none.

    Returns:
        The repository's address.

    Raises:
        ValueError: If the name is none, or the hub refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if repository.count("/") != 1:
        raise ValueError(f"push={repository!r} must be OWNER/NAME")
    try:
        address = HfApi().create_repo(repository, exist_ok=True)
        HfApi().upload_folder(repo_id=repository, folder_path=folder, ignore_patterns=[MARKER])
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise ValueError(f"push={repository!r} failed: {error}") from error
    return str(address)
