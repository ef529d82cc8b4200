"""What holds for all tests."""

import signal

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell that starts the tests in the background ignores Ctrl-C for them and for all that they start.
    signal.signal(signal.SIGINT, signal.default_int_handler)
