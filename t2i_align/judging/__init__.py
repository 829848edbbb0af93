"""Judging scorers: do they agree with people, are they calibrated, stable, and do they read what they claim to read?"""
