"""The policy file, its rules, and judge(policy, report) to a Verdict. Needs no torch."""
