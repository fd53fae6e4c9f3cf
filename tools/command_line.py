"""What the commands in this folder share: exit statuses, progress over bytes that are read, termination."""

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from typing import NoReturn

from megatron_amopo.errors import AmopoError

#: Told bytes done, bytes in all and records so far.
ReadProgress = Callable[[int, int, int], None]


def exit_status(run: Callable[[], int], *, interrupted: str = "error: interrupted") -> int:
    """The status that ``run`` gives; 2 for errors meant for people and those of files and disks, 130 when interrupted,
    with a line on stderr.

    Args:
        run: the command.
        interrupted: what is said when somebody stops it.
    """
    try:
        return run()
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130
    except AmopoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        where = "" if error.filename is None else f"{error.filename}: "  # a write to a full disk doesn't know its file
        print(f"error: {where}{error.strerror or error}", file=sys.stderr)
        return 2


@contextlib.contextmanager
def read_progress(description: str) -> Iterator[ReadProgress]:
    """A progress bar over bytes that are read, with records counted; in a log it says a line now and then."""
    from tqdm import tqdm

    on_terminal = sys.stderr.isatty()
    with tqdm(
        unit="B", unit_scale=True, desc=description, mininterval=0.2 if on_terminal else 10, leave=on_terminal
    ) as bar:

        def progress(done: int, total: int, records: int) -> None:
            bar.total = total
            bar.set_postfix_str(f"{records:,} records", refresh=False)
            bar.update(done - bar.n)

        yield progress


def clean_up_when_terminated() -> None:
    """Let SIGTERM end the process as an interruption does, so that nothing half-written stays."""
    signal.signal(signal.SIGTERM, _interrupt)


def _interrupt(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt
