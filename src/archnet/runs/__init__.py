"""A run's folder, and what every run does whatever it is for.

`folder` alone is loaded here: it reads run folders without torch. Beside it `device` says where a
run computes, `preprocessing` how images become a network's input, `look` what a classifier is worth
before it is converted, `teacher`, `student` and `quant` what a run makes, keeps and reads again.
"""

from archnet.runs.folder import RunError, RunFolder, atomic, read_json, read_text, write_json

__all__ = ["RunError", "RunFolder", "atomic", "read_json", "read_text", "write_json"]
