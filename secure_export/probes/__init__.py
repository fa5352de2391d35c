"""Probes: search for a trigger on a compressed variant. None ships yet; every report says so."""
