"""The command line: one file per verb; heavy libraries load inside the verbs."""
