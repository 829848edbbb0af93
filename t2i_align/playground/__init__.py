"""The embedded default: a small real world in which every claim can be checked on two CPU cores."""
