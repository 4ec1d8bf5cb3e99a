"""Orders and divides rows by a hash of their text, never by a generator."""

from collections.abc import Iterable
import hashlib
import unicodedata


def normalise(text: str) -> str:
  """Returns the text's words in lower case with one space between them.

  Texts that differ only in letter case, punctuation, white space or Unicode
  compatibility forms give the same result.
  """
  folded = unicodedata.normalize("NFKC", text).casefold()
  words = "".join(c if c.isalnum() else " " for c in folded)
  return " ".join(words.split())


def joined(texts: Iterable[str]) -> str:
  """Returns normalised texts, joined by newlines."""
  return "\n".join(map(normalise, texts))


def digest(text: str | bytes) -> str:
  """Returns the SHA-256 of the text's UTF-8 bytes, in hexadecimal."""
  data = text.encode() if isinstance(text, str) else text
  return hashlib.sha256(data).hexdigest()


def share(text: str) -> float:
  """Returns a number in [0, 1) for the text, uniform over texts."""
  return int(digest(text)[:13], 16) / 16**13


def spread(seed: int, purpose: str) -> int:
  """Returns a different 32-bit seed for each integer and purpose."""
  return int(digest(f"{purpose} {seed}")[:8], 16)
