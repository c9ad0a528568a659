"""The command line: arguments, jobs, sessions, plans."""
