"""Orders and divides rows by a hash of their text, never by a generator."""

from collections.abc import Iterable
import hashlib
import unicodedata


def normalise(text: str) -> str:
  """Returns the text's words in lower case with one space between them.

  Two texts are the same sentence here if they differ only in letter case,
  punctuation, white space, or Unicode compatibility forms.
  """
  folded = unicodedata.normalize("NFKC", text).casefold()
  words = "".join(c if c.isalnum() else " " for c in folded)
  return " ".join(words.split())


def joined(texts: Iterable[str]) -> str:
  """Returns several texts as one, each normalised."""
  return "\n".join(map(normalise, texts))


def digest(text: str | bytes) -> str:
  """Returns the SHA-256 of the text's UTF-8 bytes, in hexadecimal."""
  data = text.encode() if isinstance(text, str) else text
  return hashlib.sha256(data).hexdigest()


def share(text: str) -> float:
  """Returns the text's place in [0, 1), uniform over texts."""
  return int(digest(text)[:13], 16) / 16**13


def spread(seed: int, purpose: str) -> int:
  """Returns a 32-bit seed of its own for each integer and purpose."""
  return int(digest(f"{purpose} {seed}")[:8], 16)
