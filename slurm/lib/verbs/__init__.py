"""The verbs of launch.py: command line, printing and exit code of each."""
