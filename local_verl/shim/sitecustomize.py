"""Python runs this at every start with this folder on PYTHONPATH: it puts our adaptation beside VERL's modules."""

from local_verl.adaptation import install

install()
