import contextlib
import io
import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

import gradguard as gg
from gradguard.findings import RECORDING_FAULT, Finding, Severity
from gradguard.records import Drift, StepOutcome, StepRecord
from gradguard.runlog import RunLog
from gradguard.views.tally import ViewState
from gradguard.views.terminal import LiveView, outcome_line, status_table, summary_table
from tests.gradguard.record_strategies import records

APPLIED, SKIPPED = StepOutcome.APPLIED, StepOutcome.SKIPPED_BY_SCALER

SKIPPED_STEP = StepRecord(
    step=0,
    optimizer="optimizer",
    outcome=SKIPPED,
    loss=8.0,
    loss_scale_before=2.0**24,
    gradient_norm=math.inf,
    nan_count=12,
    inf_count=0,
    first_nonfinite="head.weight",
    learning_rates=(5e-4, 1e-3),
    guard_s=0.5,
)


def applied(step, **changes):
    """Build an applied step that took two seconds, 20 ms of them the guard's."""
    drift = Drift(
        name="all",
        update_norm=0.5 / step,
        weight_norm=100.0,
        moved_fraction=1.0,
        sampled=10,
        total=10,
        relative_error=0.0,
    )
    fields = {
        "step": step,
        "optimizer": "optimizer",
        "outcome": APPLIED,
        "loss": 4.0 / step,
        "loss_scale_before": 2.0**23,
        "gradient_norm": 1.25,
        "drift": drift,
        "learning_rates": (5e-4, 1e-3),
        "wall_s": 2.0,
        "guard_s": 0.02,
    }
    return StepRecord(**fields | changes)


VETOED_STEP = applied(
    2, outcome=StepOutcome.VETOED, drift=None, reason="gradient norm 99\nis above 5"
)
UNMEASURED_STEP = StepRecord(step=0, optimizer="optimizer", outcome=APPLIED)
RUN = (SKIPPED_STEP, applied(1), VETOED_STEP, applied(4))


def rendered(renderable, *, width=100):
    """Return what a console of this width shows, without blanks at the ends of lines."""
    console = Console(file=io.StringIO(), width=width)
    console.print(renderable)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def state_after(some_records, **fields):
    """Return the state of a view that has seen these records."""
    state = ViewState(**fields)
    for record in some_records:
        state = state.after(record)
    return state


def shown(some_records, **options):
    """Return what a view prints of these records to something that is no terminal."""
    console = Console(file=io.StringIO(), width=options.pop("width", 80))
    with LiveView(console=console, **options) as view:
        for record in some_records:
            view(record)
    return console.file.getvalue()


def watched_steps(poisons):
    """Train a tiny model with a view of its guard; NaN and Inf in ``poisons`` make a step overflow.

    Returns what was printed and the guard's log.
    """
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    console = Console(file=io.StringIO(), width=200)
    with gg.watch(model, optimizer, scaler=scaler, lag=8, strict=True) as guard:
        with LiveView(guard, console=console):
            for poison in poisons:
                scaler.scale(model(torch.tensor([[1.0, poison]])).sum()).backward()
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
        after_the_view = console.file.getvalue()
        optimizer.step()
    assert console.file.getvalue() == after_the_view
    return after_the_view, guard.log


def test_an_applied_step_is_one_line_of_readings():
    """The line holds step, outcome, loss, scale, norm, ratio and learning rates, in columns."""
    assert outcome_line(applied(4)).plain == (
        "step      4  APPLIED            loss 1           scale 2^23    gradient norm 1.25      "
        "  update/weight 0.00125     lr 0.0005 0.001"
    )


def test_a_step_not_taken_says_why():
    """A skipped step tells what was not finite and where, a vetoed one the gate's reason."""
    assert outcome_line(SKIPPED_STEP).plain == (
        "step      0  SKIPPED_BY_SCALER  loss 8           scale 2^24    gradient norm inf       "
        "  update/weight -           lr 0.0005 0.001  12 NaN, first in head.weight"
    )
    assert outcome_line(VETOED_STEP).plain.endswith("lr 0.0005 0.001  gradient norm 99 is above 5")


def test_what_was_not_measured_is_a_dash():
    """A record without readings shows dashes, and no number but its own step."""
    line = outcome_line(UNMEASURED_STEP).plain
    assert re.findall(r"\d+", line) == ["0"]
    assert line.split()[3:] == (
        "loss - scale - gradient norm - update/weight - lr -".split()  # noqa: SIM905
    )
    readings = "\n".join(rendered(status_table(state_after([UNMEASURED_STEP]))))
    for label in ("loss", "loss scale", "gradient norm", "update/weight", "guard cost"):
        assert re.search(rf"{label} +-(\s|$)", readings), label


def test_the_panel_shows_newest_readings_and_all_counts():
    """The status holds the latest step, one count per outcome and the guard's cost."""
    assert rendered(status_table(state_after(RUN))) == [
        "step            4                  applied            2",
        "outcome         applied            skipped by scaler  1",
        "loss            1                  vetoed             1",
        "loss scale      2^23               no gradient        0",
        "gradient norm   1.25               no motion          0",
        "update/weight   0.00125            corrupted          0",
        "learning rates  0.0005 0.001       guard cost         1 %",
    ]


def test_the_panel_tells_how_much_is_left():
    """Below the panel stand attempts of those expected, and the time left at the pace so far."""
    view = LiveView(console=Console(file=io.StringIO()), total_steps=10)
    assert " 0 of 10 steps " in rendered(view)[-1]
    for record in RUN:
        view(record)
    assert " 4 of 10 steps, 9 s left " in rendered(view)[-1]


def test_two_optimizers_have_a_column_each():
    """Readings and counts of several optimizers stand side by side under their names."""
    other = applied(7, optimizer="critic", loss=None)
    lines = rendered(status_table(state_after([applied(1), other])))
    assert lines[0].split() == ["optimizer", "critic"] * 2
    assert lines[1].split() == ["step", "1", "7", "applied", "1", "1"]
    assert lines[3].split() == ["loss", "4", "-", "vetoed", "0", "0"]


def test_the_summary_tells_the_whole_run():
    """The summary holds outcomes, fall of the loss, update norms of applied steps, time and cost."""
    finding = Finding(code=RECORDING_FAULT, severity=Severity.WARNING, message="disk [b]full")
    assert rendered(summary_table(RunLog(RUN, [finding]))) == [
        "                    Summary of the run",
        "┌─────────────────────────────────┬──────────────────────┐",
        "│ attempted                       │ 4                    │",
        "│ applied                         │ 2                    │",
        "│ skipped by scaler               │ 1                    │",
        "│ vetoed                          │ 1                    │",
        "│ no gradient                     │ 0                    │",
        "│ no motion                       │ 0                    │",
        "│ corrupted                       │ 0                    │",
        "│ loss, first -> last             │ 8 -> 1 (fell 87.5 %) │",
        "│ update norm, min / median / max │ 0.125 / 0.3125 / 0.5 │",
        "│ time since the first step       │ 6 s                  │",
        "│ of it the guard                 │ 0.06 s (1 %)         │",
        "└─────────────────────────────────┴──────────────────────┘",
        "GG002 warning: disk [b]full",
    ]


def test_the_summary_of_unmeasured_steps_has_dashes():
    """Without losses, drift and times the summary says "-" and not 0."""
    lines = rendered(summary_table(RunLog([UNMEASURED_STEP])))
    cells = dict(line.strip("│ ").split(" │ ") for line in lines if " │ " in line)
    cells = {label.strip(): value.strip() for label, value in cells.items()}
    assert cells["loss, first -> last"] == "-"
    assert cells["update norm, min / median / max"] == "-"
    assert cells["time since the first step"] == "-"
    assert cells["of it the guard"] == "- (-)"


def test_an_empty_run_has_a_summary_too():
    """A run that never stepped says so."""
    assert "no optimizer step was recorded" in "\n".join(rendered(summary_table(RunLog())))
    assert rendered(status_table(ViewState())) == ["waiting for the first optimizer step"]


@settings(deadline=None, max_examples=50)
@given(st.lists(records, max_size=4), st.integers(min_value=1, max_value=200))
def test_any_record_is_one_plain_line_away_from_a_terminal(some_records, width):
    """A file gets one whole line per record, at any width, whatever names and numbers it holds."""
    text = shown(some_records, width=width)
    assert len(text.splitlines()) == text.count("\n") == len(some_records)
    assert text.replace("\n", "").isprintable()
    for record, line in zip(some_records, text.splitlines(), strict=True):
        assert line.startswith(f"step {record.step:>6}  ")
        assert record.outcome in line


@settings(deadline=None, max_examples=50)
@given(st.lists(records, min_size=1, max_size=3), st.integers(min_value=20, max_value=120))
def test_tables_fit_the_width_for_any_record(some_records, width):
    """Panel and summary of arbitrary records never run over the edge, and names are no markup."""
    view = LiveView(console=Console(file=io.StringIO()))
    for record in some_records:
        view(record)
    for line in (*rendered(view, width=width), *rendered(summary_table(RunLog(some_records)))):
        assert Console(width=200).render_str(line, markup=False).cell_len <= max(width, 100)


def test_names_that_look_like_markup_are_shown_as_they_are():
    """An optimizer called "[/]" is no closing tag."""
    odd = [applied(1, optimizer="[/]"), applied(1, optimizer="[red]x")]
    for renderable in (status_table(state_after(odd)), summary_table(RunLog(odd))):
        text = "\n".join(rendered(renderable))
        assert "[/]" in text
        assert "[red]x" in text


def test_every_counts_applied_steps_only():
    """With every=4 only each fourth applied step is printed, and every other outcome."""
    lines = shown((*RUN, applied(5), applied(8)), every=4).splitlines()
    assert [int(line.split()[1]) for line in lines] == [0, 2, 4, 8]


def test_a_line_names_the_optimizer_that_was_given_a_name():
    """The one optimizer of most loops is not named on each line; those of a mapping are."""
    lines = shown([applied(1), applied(1, optimizer="critic")]).splitlines()
    assert [line.split()[2] for line in lines] == ["APPLIED", "critic"]


def test_a_terminal_gets_lines_above_a_panel():
    """On a terminal the panel is drawn below the lines, no line is wider, the cursor comes back."""
    console = Console(file=io.StringIO(), width=60, force_terminal=True, color_system=None)
    with LiveView(console=console, total_steps=4) as view:
        for record in RUN:
            view(record)
    text = console.file.getvalue()
    assert text.startswith("\x1b[?25l")
    assert text.endswith("\x1b[?25h")
    visible = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text.replace("\r", "\n"))
    assert max(map(len, visible.splitlines())) <= 60
    positions = [visible.index(f"step {record.step:>6}  {record.outcome}") for record in RUN]
    assert positions == sorted(positions)
    assert visible.rindex("4 of 4 steps") > positions[-1]


@pytest.mark.parametrize("environment", [{"FORCE_COLOR": "1"}, {"TERM": "dumb"}])
def test_a_pipe_is_never_mistaken_for_a_terminal(monkeypatch, environment):
    """Neither FORCE_COLOR nor a dumb terminal makes the view move the cursor in a file."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    output = io.StringIO()
    with contextlib.redirect_stdout(output), LiveView() as view:
        view(applied(1))
    text = re.sub(r"\x1b\[[0-9;]*m", "", output.getvalue())  # colours were asked for
    assert text.startswith("step      1  APPLIED")
    assert "\x1b" not in text


def test_an_output_without_unicode_is_no_reason_to_stop():
    """A name the output cannot encode is shown with question marks and training goes on."""
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    with LiveView(console=Console(file=stream, width=80)) as view:
        view(applied(1, first_nonfinite="слой.weight"))
    assert raw.getvalue().rstrip().endswith(b"first in ????.weight")


def test_a_view_of_a_guard_shows_one_true_line_for_every_step():
    """Steps still on their way when the block ends are shown too, and none after it."""
    poisons = [1.0, math.inf, 1.0, math.nan, 1.0]
    text, log = watched_steps(poisons)
    words = [line.split()[:3] for line in text.splitlines()]
    assert words == [
        ["step", str(number), "APPLIED" if poison == 1.0 else "SKIPPED_BY_SCALER"]
        for number, poison in enumerate(poisons)
    ]
    assert [record.outcome for record in log[:5]] == [word[2] for word in words]


def test_a_raising_block_gives_the_terminal_back():
    """An exception of the user comes through after the last lines, with the cursor restored."""
    console = Console(file=io.StringIO(), width=80, force_terminal=True)
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def train():
        with gg.watch(model, optimizer) as guard, LiveView(guard, console=console):
            model(torch.ones(1)).backward()
            optimizer.step()
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        train()
    assert "APPLIED" in console.file.getvalue()
    assert console.file.getvalue().endswith("\x1b[?25h")


@pytest.mark.parametrize("options", [{"every": 0}, {"total_steps": 0}])
def test_counts_below_one_are_refused(options):
    """A misuse is an error with the name and the value of the option."""
    (name,) = options
    with pytest.raises(ValueError, match=f"LiveView got {name}=0; pass a whole number from 1"):
        LiveView(**options)
