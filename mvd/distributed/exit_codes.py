"""Exit codes of training and test processes, and of the commands."""

OK = 0
INVALID = 2  # a setting or input is invalid; restarting does not help
STOPPED = 75  # stopped by a signal, with everything saved (EX_TEMPFAIL of sysexits.h)
RETRYABLE = 76  # a process or a host was lost: start again, on other hosts if possible
