"""The version, alone, so that building the package imports nothing."""

VERSION = "0.1.0"
