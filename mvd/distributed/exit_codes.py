"""Exit codes of a training or test process, and of the commands."""

OK = 0
INVALID = 2  # it cannot work as it is, and starting it again does not help; one sentence says why
STOPPED = 75  # stopped by a signal, with everything saved (EX_TEMPFAIL of sysexits.h)
RETRYABLE = 76  # a process or a host was lost: start it again, on other hosts if possible
