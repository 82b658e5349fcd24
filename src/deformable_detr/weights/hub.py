"""Upload a model to the Hugging Face hub."""

import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from ..model.network import DeformableDETRNetwork
from ..utils.errors import UserError, first_line
from .convert import Format, write
from .model_card import ModelCardData


def push(
    model: DeformableDETRNetwork,
    repo_id: str,
    to: Format = "native",
    private: bool = False,
    token: str | None = None,
    card_data: ModelCardData | None = None,
) -> str:
    """Upload a model and its card in a format of `convert`; otherwise as `upload`.

    Raises UserError as `upload`, or if the format cannot express the model.
    """
    library = "transformers" if to == "transformers" else "deformable-detr"
    card_data = replace(card_data or ModelCardData(), library=library)
    return upload(partial(write, model, to), repo_id, private, token, card_data)


def upload(
    save: Callable[[Path, ModelCardData], object],
    repo_id: str,
    private: bool = False,
    token: str | None = None,
    card_data: ModelCardData | None = None,
) -> str:
    """Upload what `save` writes into a folder, and return the address.

    Args:
        save: Gets the folder and the card's data.
        repo_id: "owner/name"; created if missing.
        private: Whether a new repository is private.
        token: Default: the one that `hf auth login` stored.
        card_data: See `save_pretrained`.

    Raises:
        UserError: The id is invalid, or the hub refuses the upload.
    """
    from huggingface_hub import HfApi

    if repo_id.count("/") != 1:
        raise UserError(f"hub repository {repo_id!r}: write owner/name")
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder), replace(card_data or ModelCardData(), repo_id=repo_id))
        try:
            api = HfApi(token=token)
            api.create_repo(repo_id, private=private, exist_ok=True)
            address = api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Upload a detector")
        except Exception as error:  # from the hub's client or the network
            raise UserError(f"hub repository {repo_id}: {first_line(error)}") from None
    return str(address)
