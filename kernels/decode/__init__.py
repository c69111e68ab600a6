"""Attention of few queries to long rows of a cache: four launches, whose programs are many at any batch.

    compressed.py       scores of the windows and partial results of the compressed branch, by splits of the windows
    select_blocks.py    the blocks that each query attends to, by those scores
    near.py             partial results of the selected and the sliding branch, by splits of their keys
    combine.py          partial results to outputs, gates and the sum

    shape.py            sizes of a step
    cache.py            where keys lie: rows in one piece, or pages; positions of the queries
    partial.py          the online softmax of a split, and what it leaves behind

Query i of batch row b stands at start[b] + i for i < count[b]; other queries are padding. Splits divide the keys that
the row has, not those that it has room for, and a program whose split is empty ends at once. Partial results are put
together in the order of the splits.
"""
