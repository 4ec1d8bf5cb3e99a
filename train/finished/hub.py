"""Uploads an exported folder to the Hugging Face hub."""

import os
import pathlib
import re

import huggingface_hub
from huggingface_hub import errors

from ..errors import UsageError

_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def check(name: str) -> None:
  """Refuses a text that is not the name of a repository."""
  if not _NAME.fullmatch(name):
    raise UsageError(
      "--push-to-hub must be the name of a repository, as user/name; got "
      f"{name!r}."
    )


def push(folder: pathlib.Path, name: str, private: bool) -> str:
  """Uploads a folder to a repository, which is made if there is none.

  HF_ENDPOINT is the address of the hub. The token comes from HF_TOKEN or from
  `hf auth login`.

  Returns:
    A sentence with the address of the repository.

  Raises:
    UsageError: if the hub refuses the upload.
    OSError: if the hub cannot be reached.
  """
  endpoint = os.environ.get("HF_ENDPOINT") or None
  api = huggingface_hub.HfApi(endpoint=endpoint)
  try:
    api.create_repo(name, private=private, exist_ok=True)
    api.upload_folder(
      repo_id=name, folder_path=folder, commit_message="Export a run"
    )
  except errors.LocalTokenNotFoundError as error:
    raise UsageError(_refused(name, folder, _TOKEN)) from error
  except errors.HfHubHTTPError as error:
    status = error.response.status_code
    if status in (401, 403):
      reason = f"it answers {status}; {_TOKEN}"
    else:
      reason = str(error).partition("\n")[0]
    raise UsageError(_refused(name, folder, reason)) from error
  except Exception as error:  # network errors depend on the HTTP client
    raise OSError(
      f"{name} was not uploaded: {api.endpoint} cannot be reached "
      f"({type(error).__name__}: {error}); the export is in {folder}"
    ) from error
  return f"{api.endpoint}/{name} has it."


_TOKEN = "HF_TOKEN, or hf auth login, gives a token that may write there"


def _refused(name: str, folder: pathlib.Path, reason: str) -> str:
  return (
    f"--push-to-hub {name} is refused by the hub: {reason}. The export is in "
    f"{folder}."
  )
