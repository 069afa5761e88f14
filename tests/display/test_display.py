"""What reaches a terminal: texts of others drive nothing, whatever its encoding."""

import io
import json
import logging
import re
import sys
from pathlib import Path

import pytest
from rich.table import Table
from rich.text import Text

from retention_bench.display import json_text, line, markup, plain, prepare_streams, say, say_error, say_json, screen

EVIL = "\x1b]52;c;cm0gLXJm\x07[/b]x[red]\x9b31m\r\u202egnp\u2028:smile:"
DRIVES = set("\x1b\x07\x9b\r\u202e\u2028\ud800\x08\x7f")


@pytest.fixture
def output(monkeypatch):
    """Standard output in an encoding; gives what was written."""

    def start(encoding):
        raw = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding, errors="strict"))
        prepare_streams()
        return raw

    return start


def test_what_drives_a_terminal_is_written_out():
    assert plain("a\x1b[31mb\x9b\n\t\u202e\ud800é") == "a\\x1b[31mb\\x9b\n\t\\u202e\\ud800é"
    assert line("a\nb\tc\r") == "a\\nb\\tc\\r"
    assert line("plain [text]") == plain("plain [text]") == "plain [text]"
    assert Text.from_markup(markup("[/x][red]\x1b")).plain == "[/x][red]\\x1b"


def test_json_is_the_same_json_and_drives_nothing():
    value = {EVIL: [EVIL, 1, "é\U0001f600"], "half": "\ud800"}
    for ascii_only in (True, False):
        text = json_text(value, ascii_only=ascii_only)
        assert not DRIVES & set(text)
        assert json.loads(text) == value
        assert text.isascii() == ascii_only


@pytest.mark.parametrize("terminal", [True, False])
def test_on_a_screen_texts_are_texts_wherever_they_stand(monkeypatch, terminal):
    raw = io.StringIO()
    monkeypatch.setattr(sys, "stdout", raw)
    monkeypatch.setenv("COLUMNS", "400")
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
    console = screen()
    table = Table(EVIL, title=EVIL, caption=EVIL)
    table.add_row(EVIL)
    table.add_row(Text(EVIL))
    table.add_column(EVIL, footer=EVIL)
    console.print(table)
    console.print(EVIL, soft_wrap=True)
    console.print(Text.assemble((EVIL, "red"), EVIL))
    printed = raw.getvalue()
    assert ("\x1b[31m" in printed) == terminal  # the style is ours
    for own in ("\x1b[31m", "\x1b[0m", "\x1b[1m", "\x1b[3m", "\x1b[2;3m"):
        printed = printed.replace(own, "")
    assert not DRIVES & set(printed)
    assert printed.count("[/b]x[red]") >= 7
    assert ":smile:" in printed


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8", "utf-16"])
def test_an_output_of_any_encoding_takes_any_text(output, encoding):
    raw = output(encoding)
    say("é …\U0001f600\x1b")
    screen().print("é …\U0001f600")
    screen().print(Table("é …", title="x" * 300))
    written = raw.getvalue().decode(encoding)
    assert "\\x1b" in written
    assert ("\U0001f600" if encoding.startswith("utf") else "\\U0001f600") in written


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8", "utf-16"])
def test_json_stays_json_in_any_encoding(output, encoding):
    raw = output(encoding)
    say_json({"é": "…\U0001f600\x1b\ud800"})
    assert json.loads(raw.getvalue().decode(encoding)) == {"é": "…\U0001f600\x1b\ud800"}


def test_what_is_logged_drives_nothing(monkeypatch):
    raw = io.StringIO()
    monkeypatch.setattr(sys, "stderr", raw)
    prepare_streams()
    prepare_streams()
    logging.getLogger("retention_bench.some").warning("%s is damaged", EVIL)
    assert raw.getvalue() == f"{plain(EVIL)} is damaged\n"


def test_a_stream_that_is_not_there_takes_everything(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    prepare_streams()
    say("x")
    say_error("x")
    say_json({})
    screen().print("x")


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_shows_texts_as_texts(monkeypatch, terminal):
    from retention_bench.display import progress

    raw = io.StringIO()
    monkeypatch.setattr(sys, "stderr", raw)
    monkeypatch.setattr(progress, "PLAIN_EVERY_S", 0.0)
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
    with progress.show_progress(2) as (announce, report):
        announce(f"{EVIL}\nsecond", False)
        report(EVIL, 1, 2, {f"loss{EVIL}": 1.0})
    printed = raw.getvalue()
    assert "\x1b]52" not in printed
    assert "\x9b" not in printed
    assert "[/b]x[red]" in printed
    assert "\\nsecond" in printed


def test_a_stage_that_no_plan_knew_is_counted_too(monkeypatch):
    from retention_bench.display import progress

    raw = io.StringIO()
    monkeypatch.setattr(sys, "stderr", raw)
    with progress.show_progress(1) as (announce, _):
        announce("planned", False)
        announce("not planned", False)
    assert raw.getvalue() == "[1/1] planned\n[2/2] not planned\n"


def test_nothing_prints_past_the_screen():
    import retention_bench

    package = Path(retention_bench.__file__).parent
    for file in package.rglob("*.py"):
        if file.parent.name != "display":
            assert not re.search(r"\bConsole\(|click\.echo\(|markup=True", file.read_text()), file


@pytest.mark.parametrize(
    ("ratio", "ci95", "reason", "said"),
    [
        (2.0, [1.25, 3.1], None, "hazard ratio 2.00 (95 % interval 1.25 to 3.10)."),
        (
            2.0,
            None,
            "facts were lost in two relations",
            "hazard ratio 2.00, no interval: facts were lost in two relations.",
        ),
        (None, None, "all were lost", "hazard ratio none: all were lost."),
    ],
)
def test_a_hazard_ratio_says_why_it_or_its_interval_is_not_there(capsys, ratio, ci95, reason, said):
    from retention_bench.display.measures import print_survival

    contrast = {
        "pairs": 50,
        "lost": [50, 33],
        "log_rank_p": 0.008,
        "hazard_ratio": ratio,
        "ci95": ci95,
        "reason": reason,
    }
    print_survival({"dose": "tokens", "curves": {}, "contrast": contrast})
    assert f"log-rank p 0.008, {said}" in capsys.readouterr().out
