"""`secure-export demo`: the whole job on scikit-learn's handwritten digits, offline, in minutes.

The only part of the package in which a backdoor is planted (`plant.py`), so that there is something to find.
"""

from secure_export.demo.data import clean_digits, digits
from secure_export.demo.job import run_demo
from secure_export.demo.network import digits_cnn

__all__ = ["clean_digits", "digits", "digits_cnn", "run_demo"]
