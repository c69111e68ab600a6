"""The Triton and Gluon kernels. They import only triton and know nothing of JAX.

    branch       pass                         any GPU (Triton)     Hopper (Gluon, sm90/)
    -----------  ---------------------------  -------------------  -------------------------
    all          cleaning of keys and values  clean.py             (the portable one)
                 who sees one that was not    clean.py             (the portable one)
                   finite
    compressed,  forward                      interval.py          interval.py
      sliding    d_query                      interval.py          (the portable one)
                 d_key, d_value               interval.py          interval_keys.py
    selection    forward, has no gradient     select_blocks.py     select_blocks.py
    selected     walks of the tiles           block_lists.py       (the portable one)
                 forward                      selected.py          selected.py
                 d_query                      selected.py          selected.py
                 d_key, d_value               selected_keys.py     selected_keys.py
                 sum of what items give       selected_keys.py     (the portable one)
    all, of few  forward, has no gradient     decode/              (the portable one)
      queries

The forward pass of interval.py on Hopper also adds up the gated outputs of all branches. What kernels share:

    shape.py               the sizes that a kernel is compiled for, SHAPE; each kernel's file has its own
    selected_shape.py      those of the selected branch, which several files share
    softmax.py, tiles.py   online softmax; tiles of any width: loads, stores, products
    sm90/ring.py           slots in shared memory that one partition fills and others use
    sm90/ptx.py            all inline assembly
    sm90/rows.py           tiles in shared memory, copies of query rows, the order of units
    sm90/key_pass.py       what interval_keys.py and selected_keys.py do alike
    sm90/pairs.py          two programs that copy into each other's shared memory
    sm90/window_sums.py    of selection: probabilities of windows, from the warps that multiply to those that keep lists
    sm90/block_ranks.py    of selection: the lists of the best blocks

Glossary, one word per thing:

    B, T, C       batch rows; queries of a batch row; keys of a batch row (of the compressed branch: windows)
    N, H, G       query heads, kv heads, query heads of a kv head: N = H * G
    K, V          key width, value width
    base, offset  of rows of memory: a 64-bit scalar where a tile begins, and 32-bit distances from there
    AHEAD         whether a loop loads what the next step needs at the end of a step
    batch row     row b of the batch; `row` where there is no query row that it could be taken for
    chooser       a query that wants a block, in the inverse of a selection
    chunk         of selection: the windows whose blocks are compared with the lists at once
    dead          a query row that sees nothing or is not finite: in passes from the keys' side it does not count
    edge tile     a tile that some query row sees only in part, so that it needs a mask
    head          a kv head, with the G query heads of its group
    item          a block and some of the queries that selected it
    list          of selection: the best blocks of a token so far, each with its rank, the bits of its importance
    near          so close behind a block that the sliding window may reach it
    number        of a key: its index in the batch row
    partition     the warps of a program that do the same thing: copy, bring statistics, multiply
    parts         the powers of two into which a width is cut
    piece         a part of a block, KEYS keys, that one program does; of queries: what one copy takes
    place         a query's index in its key row, and nothing else
    position      a token's index in its segment
    query row     a (token, head of the group) pair, number token * G + head; `row` of a tile
    ring          slots that are used in turn; the n-th thing lies in slot n % STAGES
    sight         what a query sees: 0 nothing, 1 what is finite, 2 also what is not
    slot          one of the tiles of a ring
    SHAPE         the sizes that a kernel is compiled for, a frozen dataclass
    splits        parts of a reduction that the caller adds up
    statistics    of a query row: lse, delta (what gradients of its scores subtract), weight (its gate)
    tile          what is loaded or multiplied at once
    token         a query's index in its batch row of queries
    unit          what a persistent program takes next
    walk          the list of blocks that the tokens of a tile go through
    warpgroup     four warps that multiply together
"""
