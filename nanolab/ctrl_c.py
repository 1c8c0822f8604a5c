"""Ctrl-C while a script still imports: one line instead of a traceback. Its first import."""

import os
import signal
import sys


def leave(number, frame):
    script = os.path.basename(sys.argv[0])
    os.write(2, f"{script}: stopped before it began\n".encode(errors="replace"))
    os._exit(130)


if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where it is ignored
    signal.signal(signal.SIGINT, leave)
