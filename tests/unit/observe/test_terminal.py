import io

from rich.console import Console

from megalemur.observe.terminal import Terminal, summary_of

from .reports import run_config


def record(step, **values):
    usual = {
        "loss": 2.34567,
        "grad_norm": 1.5,
        "learning_rate": 4e-5,
        "tokens_per_second": 12345.6,
        "eta_seconds": 61.2,
        "skipped": False,
        "skipped_steps": 0,
        "tokens": 512 * step,
    }
    return {"step": step, **usual, **values}


def screen(directory, *records, terminal, width=160):
    out = io.StringIO()
    sink = Terminal(Console(file=out, force_terminal=terminal, width=width), run_config(directory))
    for one in records:
        sink.write(one)
    sink.close()
    return out.getvalue()


def test_without_a_terminal_there_is_one_line_a_record(tmp_path):
    text = screen(tmp_path, record(1), record(2, **{"validation/code": 3.25}), terminal=False)
    lines = [line for line in text.splitlines() if line.startswith("step ")]
    assert lines[0] == "step 1/10  loss 2.3457  norm 1.5  lr 4.00e-05  12,346 tokens/s  ETA 0:01:02"
    assert lines[1].startswith("step 2/10") and lines[1].endswith("validation/code 3.2500")
    assert "\x1b" not in text


def test_on_a_terminal_there_is_a_bar(tmp_path):
    text = screen(tmp_path, record(1), record(2, **{"validation/code": 3.25}), terminal=True)
    assert "2/10" in text and "━" in text and "12,346 tokens/s" in text
    assert "validation/code 3.2500" in text


def test_a_narrow_terminal_loses_nothing(tmp_path):
    last_words = record(2, mfu_causal_attention=0.4321, skipped=True)
    text = screen(tmp_path, last_words, terminal=True, width=80)
    assert all(part in text for part in ("2/10", "━", "12,346", "tokens/s", "43.2%", "0:01:02", "SKIPPED"))
    assert "…" not in text.split("2/10", 1)[1]


def test_begins_with_the_banner_and_ends_with_the_last_record(tmp_path):
    text = screen(tmp_path, record(1), record(10, loss=1.25), terminal=False)
    first, last = text.index("Run test"), text.index("Last record")
    assert first < text.index("step 1/10") < last
    assert "1.2500" in text[last:] and "5,120" in text[last:]


def test_a_run_without_records_ends_without_a_table(tmp_path):
    assert "Last record" not in screen(tmp_path, terminal=False)


def test_a_skipped_step_and_the_utilisation_are_shown():
    assert summary_of(record(1, skipped=True, mfu_causal_attention=0.4321)).endswith(
        "MFU 43.2% causal  ETA 0:01:02  SKIPPED"
    )


def test_an_event_is_a_line_at_once(tmp_path):
    for terminal in (False, True):
        out = io.StringIO()
        sink = Terminal(Console(file=out, force_terminal=terminal, width=160), run_config(tmp_path))
        sink.tell({"step": 7, "time": "now", "event": "rollback", "text": "from step 7 back to [step_000004]"})
        sink.close()
        assert "step 7  ROLLBACK: from step 7 back to [step_000004]" in out.getvalue()
