"""A table in, a table out: prompts from the columns of its rows, an answer for each row.

All that can be wrong with what was asked is found before the first row is answered.
"""
