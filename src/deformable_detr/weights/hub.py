"""Upload a model to the Hugging Face hub."""

import tempfile
from dataclasses import replace
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
    """Upload a model and its card, and return the address.

    Args:
        repo_id: "owner/name"; created if missing.
        to: The format; see `convert`.
        private: Whether a new repository is private.
        token: Default: the one that `hf auth login` stored.
        card_data: See `save_pretrained`.

    Raises:
        UserError: The id is invalid, the format cannot express the model, or the hub refuses the upload.
    """
    from huggingface_hub import HfApi

    if repo_id.count("/") != 1:
        raise UserError(f"hub repository {repo_id!r}: write owner/name")
    library = "transformers" if to == "transformers" else "deformable-detr"
    card_data = replace(card_data or ModelCardData(), repo_id=repo_id, library=library)
    with tempfile.TemporaryDirectory() as folder:
        write(model, to, Path(folder), card_data)
        try:
            api = HfApi(token=token)
            api.create_repo(repo_id, private=private, exist_ok=True)
            address = api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Upload Deformable DETR")
        except Exception as error:  # from the hub's client or the network
            raise UserError(f"hub repository {repo_id}: {first_line(error)}") from None
    return str(address)
