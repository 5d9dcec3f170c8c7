"""Other systems that start the same sandbox: installed from PyPI at released versions, driven as published."""
