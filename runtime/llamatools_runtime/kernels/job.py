"""What a kernel is told: a record of integers, most of them addresses, that a kernel reads by the names below.

A kernel is called with the address of its job and a range of rows, `kernel(job, start, stop)`, from threads that hold
no lock of Python's. It can therefore take no arrays; `array_at` makes one of an address.
"""

from __future__ import annotations

# What belongs to the matrix, or to the activations where these are quantized.
FUNCTION = 0  # address of the kernel
N_ROWS = 1  # rows of the matrix; tokens, where activations are quantized
GRAIN = 2  # rows that a thread takes at a time
N_CHUNKS = 3  # N_ROWS / GRAIN, rounded up
BLOCKS = 4  # the matrix, (n_rows, n_in) as its dtype stores it

Y = 5  # float32, where row 0 of token 0 goes
Y_STRIDE = 6  # floats from a token's results to the next token's

X = 7  # float32 (n_tokens, n_in)
N_IN = 8  # columns
N_TOKENS = 9

# Activations in eight bits, see activations.py.
CODES = 10  # int8 (n_in / 32, n_tokens, 32)
SCALES = 11  # float32 (n_in / 32, n_tokens)
SUMS = 12  # float32 (n_in / 32, n_tokens), of the codes
FIRST_SUMS = 13  # float32 (n_in / 32, n_tokens), of the first sixteen codes of each
PARTIAL_SUMS = 14  # of a single token: int32 (n_in / 8,) where blocks are of 32, (n_in / 16,) where they are of 256

N_FIELDS = 16  # of every job; attention.py needs all of them
