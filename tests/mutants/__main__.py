"""`python -m tests.mutants [NAME...]`: judges those named, or all, and prints a line for each."""

import sys

from .suite import MUTANTS, judge_all, score

chosen = [mutant for mutant in MUTANTS if not sys.argv[1:] or mutant.name in sys.argv[1:]]
verdicts = judge_all(chosen)
for verdict in verdicts:
    print(verdict)
print(score(verdicts))
sys.exit(not all(verdict.is_caught for verdict in verdicts))
