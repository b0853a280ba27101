"""`dskd data`: how the models of a config read its data."""

from __future__ import annotations

import json

from rich.console import Console

from dskd_lightning.errors import UserError
from dskd_lightning.files import write_atomic
from dskd_lightning.launch.configs import config_path
from dskd_lightning.launch.lightning_cli import DistillationCLI

__all__ = ["show_data"]


def show_data(config: list[str], records: int, json_path: str | None, html: str | None) -> None:
    """Print the preview of a config's data, and write it where asked.

    Raises:
        UserError: the config, a tokenizer or the data can't be read.
    """
    if records < 0:
        raise UserError(f"--records {records}: must be at least 0.")
    arguments = [f"--config={config_path(file)}" for file in config]
    run = DistillationCLI(run=False, args=[*arguments, "--trainer.logger=false"])
    if not run.datamodule.stages():
        raise UserError("The config names no data: set `data.train`, `val`, `test` or `predict`.")
    preview = run.datamodule.preview(records)
    Console().print(preview.rich())
    if json_path is not None:
        write_atomic(json_path, json.dumps(preview.to_dict(), ensure_ascii=False, indent=2) + "\n")
    if html is not None:
        write_atomic(html, f'<!doctype html><meta charset="utf-8">{preview._repr_html_()}\n')
