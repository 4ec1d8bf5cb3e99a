"""Small files in the format of GLUE's originals: member -> its text."""

ROWS = 40
# Of these a fiftieth is held out to validate on, not a tenth.
_LARGE_ROWS = 300


def _tsv(header: str, *rows: str) -> str:
  lines = [header, *rows] if header else list(rows)
  return "".join(line.replace("|", "\t") + "\n" for line in lines)


def _numbered(template: str) -> list[str]:
  return [template.format(i=i, bit=i % 2) for i in range(ROWS)]


COLA = {
  "CoLA/train.tsv": _tsv("", *_numbered("gj04|{bit}||Train {i}.")),
  "CoLA/dev.tsv": _tsv("", "gj04|1||Dev one.", "gj04|0|*|Dev them is."),
  "CoLA/test.tsv": _tsv("index|sentence", "0|Test one."),
}
SST2 = {
  "SST-2/train.tsv": _tsv("sentence|label", *_numbered("film {i} |{bit}")),
  "SST-2/dev.tsv": _tsv("sentence|label", "dev film |1", "dev bore |0"),
  "SST-2/test.tsv": _tsv("index|sentence", "0|test film"),
}
_QNLI_LABELS = ("entailment", "not_entailment")
QNLI = {
  "QNLI/train.tsv": _tsv(
    "index|question|sentence|label",
    *(
      f"{i}|Why {i}?|As {i}.|{_QNLI_LABELS[i % 2]}" for i in range(_LARGE_ROWS)
    ),
  ),
  "QNLI/dev.tsv": _tsv(
    "index|question|sentence|label", "0|Who?|Me.|not_entailment"
  ),
  "QNLI/test.tsv": _tsv("index|question|sentence", "0|What?|That."),
}
RTE = {
  "RTE/train.tsv": _tsv(
    "index|sentence1|sentence2|label",
    *(f"{i}|Rain {i}.|Wet {i}.|{_QNLI_LABELS[i % 2]}" for i in range(ROWS)),
  ),
  "RTE/dev.tsv": _tsv("index|sentence1|sentence2|label", "0|A.|B.|entailment"),
  "RTE/test.tsv": _tsv("index|sentence1|sentence2", "0|C.|D."),
}
_MNLI_HEADER = (
  "index|promptID|pairID|genre|sentence1_binary_parse|sentence2_binary_parse"
  "|sentence1_parse|sentence2_parse|sentence1|sentence2"
)
_MNLI_LABELS = ("entailment", "neutral", "contradiction")
MNLI = {
  "MNLI/train.tsv": _tsv(
    _MNLI_HEADER + "|label1|gold_label",
    *(
      f"{i}|1|1n|fiction|(a)|(b)|(A)|(B)|Premise {i}.|Hypothesis {i}."
      f"|{_MNLI_LABELS[i % 3]}|{_MNLI_LABELS[i % 3]}"
      for i in range(_LARGE_ROWS)
    ),
  ),
  **{
    f"MNLI/dev_{kind}.tsv": _tsv(
      _MNLI_HEADER + "|label1|label2|label3|label4|label5|gold_label",
      f"0|1|1n|slate|(a)|(b)|(A)|(B)|It is {kind}.|It is.|"
      + "neutral|" * 5
      + "neutral",
    )
    for kind in ("matched", "mismatched")
  },
  **{
    f"MNLI/test_{kind}.tsv": _tsv(
      _MNLI_HEADER, "0|1|1n|slate|(a)|(b)|(A)|(B)|T.|H."
    )
    for kind in ("matched", "mismatched")
  },
}
_MRPC_HEADER = "Quality|#1 ID|#2 ID|#1 String|#2 String"
MRPC = {
  "data_mrpc_dev_ids.tsv": _tsv("", "100|200", "101|201"),
  # The true file begins with a byte order mark.
  "msr_paraphrase_train.txt": "\ufeff"
  + _tsv(
    _MRPC_HEADER,
    *(
      f'{i % 2}|{100 + i}|{200 + i}|He said "{i}".|"{i}", he said.'
      for i in range(ROWS)
    ),
  ),
  "msr_paraphrase_test.txt": "\ufeff" + _tsv(_MRPC_HEADER, "1|1|2|E.|F."),
}
