"""Batch scoring: folders, tables and shards of images -> a table of scores; one bad row never stops the rest."""

from __future__ import annotations

from t2i_align.data.tables import write_table
from t2i_align.scoring.batch import Scoring, check_dtype, score_columns, score_rows
from t2i_align.scoring.inputs import Row, Rows, Survey, open_rows, read_rows, survey
from t2i_align.scoring.job import Outcome, check_output, score_file
from t2i_align.scoring.processes import Processes

__all__ = [
    "Outcome",
    "Processes",
    "Row",
    "Rows",
    "Scoring",
    "Survey",
    "check_dtype",
    "check_output",
    "open_rows",
    "read_rows",
    "score_columns",
    "score_file",
    "score_rows",
    "survey",
    "write_table",
]
