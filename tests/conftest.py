"""What holds for all tests."""

import signal

# A shell that starts the tests in the background, or nohup, ignores these signals for them and for all that
# they start: what the tests start is to meet them as at a terminal.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)
