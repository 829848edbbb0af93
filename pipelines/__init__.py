"""How diffusers pipelines are loaded and driven."""

from t2i_align.pipelines.loading import PipelineError, call_defaults, card_of, load_pipeline

__all__ = ["PipelineError", "call_defaults", "card_of", "load_pipeline"]
