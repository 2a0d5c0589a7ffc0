"""beartype, with an int where a float is asked for allowed as Python's typing does."""

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
