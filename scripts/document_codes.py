"""Write every error code, with its meaning, into loratune/README.md.

    python scripts/document_codes.py

The table comes from `loratune.codes.Code` and stands between two markers; everything else in the file stays as it is.
`tests/test_packaging.py` fails where it is not current.
"""

from pathlib import Path

from document_config import between

from loratune.codes import Code

README = Path(__file__).parent.parent / "loratune" / "README.md"
BEGIN, END = "<!-- codes: written by scripts/document_codes.py -->\n", "<!-- /codes -->\n"


def document(text: str) -> str:
    """Put the table of codes between the markers of a text. Raises ValueError: a marker is missing or occurs twice."""
    rows = [f"| `{code}` | {code.meaning} |" for code in sorted(Code)]
    return between(text, BEGIN, "\n".join(["| code | reported when |", "|---|---|", *rows]) + "\n", END)


def main() -> None:
    """Bring loratune/README.md up to date."""
    README.write_text(document(README.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
