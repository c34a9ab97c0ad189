"""What holds for all tests."""

import os
import sys

# Before torch is imported, here and in the processes that tests start: the tests share the cores
# among themselves, and sums over another number of threads differ in their last bits.
os.environ["OMP_NUM_THREADS"] = "1"
# Where Python is told to keep no bytecode, each of those processes takes 20 seconds to import all
# packages, else 6.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
