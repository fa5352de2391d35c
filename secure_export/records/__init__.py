"""Records: the frozen values that flow between the stages.

`memory` lives as long as the process; `measured`, `searches` and `reported` are what a stored report holds.
"""
