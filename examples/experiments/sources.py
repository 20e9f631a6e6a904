"""Opens what a configuration is trained on."""

from __future__ import annotations

from pathlib import Path

import images
import texts
import torch
from config import Config, ConfigError
from images import Source

REPOSITORY = Path(__file__).parents[2]


def open_source(config: Config, root: Path, device: torch.device, download: bool = False, held_out: int = 0) -> Source:
    """The data of ``config`` below ``root``, tested on ``held_out`` of its training examples instead if there are any.

    Raises:
        ConfigError: It is not there, or does not fit; says what was looked for.
    """
    data, name = config.data, config.data.folder
    if not root.is_dir():
        raise ConfigError(f"--data {root}: expected a folder")
    if data.kind == "images":
        found: Source = images.Images(images.read(root, name, download), data, device, name)
    elif data.kind == "folder":
        found = images.Folder(images.folder_of(root, name, REPOSITORY / ".data"), data, device)
    elif data.kind == "characters":
        found = texts.Characters(texts.read(root, name), data, device)
    else:
        speakers = data.kind == "speakers"
        pairs = texts.speeches(texts.read(root, name)) if speakers else texts.labelled(root, name)
        found = texts.Labelled(data.kind, pairs, data, device, _tokenizer(config))
    if held_out:
        most = found.size - config.training.batch - 1  # of a text, what is left may be a stretch less
        if held_out > most:
            raise ConfigError(
                f"{config.path.name}: validation: expected at most {most} of {found.size} training examples, so that "
                f"a batch is left, got {held_out}"
            )
        return found.held_out(held_out)
    if found.size < config.training.batch:
        raise ConfigError(
            f"{config.path.name}: training.batch: expected at most the {found.size} training examples, "
            f"got {config.training.batch}"
        )
    return found


def _tokenizer(config: Config) -> texts.Tokenizer:
    if config.network.get("kind") == "minilm":
        import minilm

        return minilm.tokenizer()
    return texts.characters_of
