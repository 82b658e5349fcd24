"""A model put on the hub."""

from __future__ import annotations

import re
import tempfile
from dataclasses import replace
from pathlib import Path

from ..model.network import DeformableDETRNetwork
from ..utils.errors import UserError, first_line
from .convert import Format, write
from .model_card import ModelCardData

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def push(
    model: DeformableDETRNetwork,
    repository: str,
    to: Format = "ours",
    private: bool = False,
    token: str | None = None,
    facts: ModelCardData | None = None,
) -> str:
    """Uploads the model with its card to `repository` ("owner/name", made where it is not there); returns its address.

    to: the format, as in `convert`. token: none: the one that `hf auth login` has stored.
    Raises UserError, one line, for a bad name and for whatever the hub refuses.
    """
    from huggingface_hub import HfApi

    if not _ID.fullmatch(repository):
        raise UserError(f"hub repository {repository!r}: write owner/name")
    library = "transformers" if to == "transformers" else "deformable-detr"
    facts = replace(facts or ModelCardData(), repository=repository, library=library)
    with tempfile.TemporaryDirectory() as folder:
        write(model, to, Path(folder), facts)
        try:
            api = HfApi(token=token)
            api.create_repo(repository, private=private, exist_ok=True)
            address = api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Deformable DETR")
        except Exception as error:  # whatever the hub's client or the network raise
            line = first_line(error)
            raise UserError(f"hub repository {repository}: {line}") from None
    return str(address)
