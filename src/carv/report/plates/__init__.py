"""The figures of the page, one a file: each has `plate(found, key)`, which is `None` where its data is missing.

`chart` is of an experiment's charts, not of findings.
"""
