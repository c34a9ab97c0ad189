"""What holds for all tests."""

import os

# Before torch is imported, here and in the processes that tests start: the tests share the cores
# among themselves, and sums over another number of threads differ in their last bits.
os.environ["OMP_NUM_THREADS"] = "1"
