"""The parts behind launch.py and the job scripts; each module answers one question."""
