"""What is told of a run: the words, and a report as one HTML page. matplotlib draws it: imported when asked for."""

MARK = '<meta name="generator" content="skyrl launch.py report">'  # by which a report is known that may be replaced
