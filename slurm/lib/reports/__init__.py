"""A report as one HTML page: what is drawn, and the page around it. matplotlib draws: imported when asked for."""

MARK = '<meta name="generator" content="skyrl launch.py report">'  # by which a report is known that may be replaced
