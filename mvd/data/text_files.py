"""Reads text files that other programs wrote: UTF-8 with or without a byte order mark, and UTF-16 with one."""

import codecs
from pathlib import Path

from mvd.config import ConfigError

ENCODINGS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


def read_text(file: Path) -> str:
    """The text of a file, with \\n as the only line break.

    Raises:
        ConfigError: the file cannot be read, or has another encoding (other encodings cannot be told apart).
    """
    try:
        data = file.read_bytes()
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}") from error
    encoding = next((encoding for mark, encoding in ENCODINGS.items() if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{file}:{line}: byte 0x{data[error.start]:02x} is not valid UTF-8; convert the file, for example from "
            f"Latin-1: iconv -f latin1 -t utf-8 {file.name} > new.txt"
        ) from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise ConfigError(f"{file}:{line}: holds a zero byte, so it is no UTF-8 text; convert the file to UTF-8")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def numbered_lines(text: str) -> list[tuple[int, str]]:
    """The lines that are not blank, without surrounding white space, and their numbers from 1.

    Lines end at \\n only: file names may contain the other characters that str.splitlines() splits at.
    """
    return [(number, line.strip()) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
